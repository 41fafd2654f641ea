"""The cells of a front, a method at a budget and a prompt length each, and what is read off them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpred_mlx.bench.common.results import Results
from kvpred_mlx.bench.front.baselines import METHODS, usable
from kvpred_mlx.bench.front.settings import FrontSettings
from kvpred_mlx.pair.model import KVPredictionModel

Cell = dict[str, Any]
SHOWN = ("agreement", "first_token_agreement", "retention", "cross_entropy")  # of a cell's `quality`
FIGURES = {
    "agreement": "agreement",
    "first_token_agreement": "first token",
    "recall": "recall",
    "retention": "retention",
}


def make_cells(
    pair: KVPredictionModel, settings: FrontSettings, beside: Mapping[str, KVPredictionModel]
) -> list[Cell]:
    """Every cell, its FLOPs counted and nothing measured; `skipped` says why the pair cannot do one."""
    names = ["exact", *(m for m in settings.methods if m != "exact")]
    dials = [m for m in names if METHODS[m].dial]
    lines: list[tuple[str | None, KVPredictionModel, list[str]]] = [(None, pair, names)]
    lines += [(other, beside[other], dials) for other in settings.beside]
    reasons = [usable(of, methods) for _, of, methods in lines]
    return [
        _cell(of, n, method, budget, cannot.get(method)) | {"pair": called}
        for n in settings.prompt_lens
        for (called, of, methods), cannot in zip(lines, reasons, strict=True)
        for method in methods
        for budget in (settings.budgets if METHODS[method].budgets else [None])
    ]


def _cell(pair: KVPredictionModel, n: int, method: str, budget: float | None, reason: str | None) -> Cell:
    flops = None if reason else METHODS[method].flops(pair, n, budget or 0.0)
    return {
        "prompt_tokens": n,
        "method": method,
        "budget": budget,
        "flops": flops,
        "quality": None,
        "recall": None,
        "gain": None,
        "ttft": None,
        "sooner": None,
        "trials": [],
        "skipped": reason,
    }


def label(cell: Cell) -> str:
    """`dial-last 0.1`, or `exact`; with the name of its pair before, if that is another one."""
    name = cell["method"] if cell["budget"] is None else f"{cell['method']} {cell['budget']:g}"
    return name if cell.get("pair") is None else f"{cell['pair']}: {name}"


def figure(cell: Cell, name: str) -> dict[str, float] | None:
    """Mean, low and high of one of `FIGURES` (or of `SHOWN`), if the cell has it."""
    if name == "recall":
        return cell["recall"] and cell["recall"]["all"]
    return cell["quality"] and cell["quality"][name]


def exact_cell(results: Results, prompt_tokens: int) -> Cell:
    """The base alone at that length."""
    return next(c for c in results["cells"] if (c["prompt_tokens"], c["method"]) == (prompt_tokens, "exact"))
