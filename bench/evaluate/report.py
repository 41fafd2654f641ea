"""An evaluation for people: a table, a picture, and files of both."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from kvpred_mlx.bench.common.results import Results, write_json
from kvpred_mlx.files import write_file


def table(results: Results) -> Table:
    """Scores with 95 % intervals, their share of the exact mode's, FLOPs and seconds to the first token."""
    made = Table(
        title=f"{results['pair']['name']}, {results['pair']['dtype']}",
        caption="with 95 % intervals; kept: share of the exact score, at most all of it\n"
        "GFLOPs, s: until the first token, mean and median",
        box=box.SIMPLE_HEAD,
    )
    for name in ("", "items", "score", "kept", "GFLOPs", "s"):
        made.add_column(name, justify="right" if name else "left", no_wrap=True)
    before, shares = None, _shares(results["rows"])
    for row in results["rows"]:
        what = f"{row['task']} {row['metric']}"
        if before != what:
            made.add_section()
            made.add_row(what)
        before = what
        made.add_row(
            f"  {row['mode']}",
            str(row["items"]),
            (_percent if what in shares else _number)(row, "score", "low", "high"),
            _percent(row, "retention", "retention_low", "retention_high", most=1.0),
            "" if row["ttft_flops"] is None else f"{row['ttft_flops'] / 1e9:.3g}",
            "" if row["ttft"] is None else f"{row['ttft']:.3f}",
        )
    return made


def write(folder: Path, results: Results, plot: bool) -> None:
    """`results.json` and `quality.png`; without matplotlib there is no picture."""
    write_json(folder / "results.json", results)
    if plot and results["rows"] and find_spec("matplotlib") is not None:
        write_file(folder / "quality.png", lambda path: draw(results, path))


def draw(results: Results, path: Path) -> None:
    """Score against FLOPs until the first token, a panel for each task and metric."""
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    shares = _shares(results["rows"])
    for row in results["rows"]:
        if row["ttft_flops"] is not None:
            panels.setdefault(f"{row['task']} {row['metric']}", []).append(row)
    figure = Figure(figsize=(1 + 4.5 * max(1, len(panels)), 4.2), layout="constrained")
    all_axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axes, (title, rows) in zip(all_axes, panels.items(), strict=False):
        for row in rows:
            unit = 100 if title in shares else 1
            x, y = row["ttft_flops"] / 1e9, unit * row["score"]
            ends = (
                [[abs(y - unit * row["low"])], [abs(unit * row["high"] - y)]]
                if row["low"] is not None
                else None
            )
            axes.errorbar([x], [y], yerr=ends, marker="o", capsize=3, label=row["mode"])
        axes.set(
            title=title,
            xlabel="GFLOPs until the first token",
            ylabel="score, %" if title in shares else "score",
            xscale="log",
            ylim=(0, None),
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{results['pair']['name']}, {results['pair']['dtype']}")
    figure.savefig(path, dpi=150, format="png")


def _shares(rows: list[dict[str, Any]]) -> set[str]:
    """Tasks and metrics that are told in percent: no perplexities, and none that are in percent already."""
    told = {f"{row['task']} {row['metric']}" for row in rows}
    plain = {
        f"{row['task']} {row['metric']}"
        for row in rows
        if not row.get("higher_is_better", True) or not 0 <= row["score"] <= 1
    }
    return told - plain


def _percent(row: dict[str, Any], *names: str, most: float = np.inf) -> str:
    values = [None if row[name] is None else min(row[name], most) for name in names]
    return _figure([None if v is None else f"{100 * v:.1f}" for v in values], " %")


def _number(row: dict[str, Any], *names: str) -> str:
    return _figure([None if row[name] is None else f"{row[name]:.4g}" for name in names])


def _figure(texts: list[str | None], unit: str = "") -> str:
    value, low, high = texts
    ends = "" if low is None else f" ({low} to {high})"
    return "" if value is None else f"{value}{unit}{ends}"
