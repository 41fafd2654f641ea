"""The Pareto front for people and programs: table, Markdown, CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from rich.table import Table

from kvpred_mlx.bench.common import formats
from kvpred_mlx.bench.common.results import Results
from kvpred_mlx.bench.front.cells import FIGURES, SHOWN, Cell, exact_cell, figure, label


def table(results: Results) -> Table:
    """One row for each cell."""
    title = f"{results['pair']['name']}: quality against TTFT"
    caption = "len: prompt tokens; fewer FLOPs and sooner: against the base alone; 95 % intervals"
    caption += f"; {data_line(results)}" if results["data"] else ""
    made = formats.tight_table(title, caption)
    made.add_column("len", justify="right", no_wrap=True)
    made.add_column("method", no_wrap=True)
    for name in ("fewer FLOPs", "sooner", *FIGURES.values()):
        made.add_column(name, justify="right", min_width=5 if name == "fewer FLOPs" else 9)
    last = None
    for cell in results["cells"]:
        if last not in (None, cell["prompt_tokens"]):
            made.add_section()
        last = cell["prompt_tokens"]
        made.add_row(str(last), label(cell), *_values(results, cell, short=True))
    return made


def markdown(results: Results) -> str:
    """The same as a Markdown table."""
    names = ["Fewer FLOPs", "Times sooner", *map(str.capitalize, FIGURES.values())]
    return _markdown(names, [(c, [*_values(results, c)]) for c in results["cells"] if c["skipped"] is None])


def recall_markdown(results: Results) -> str:
    """Recall by depth (mean of the kinds), a row for each cell that recalls anything."""
    asked = [c for c in results["cells"] if c["recall"] and c["recall"]["all"]["mean"]]
    depths = list(next((kind for c in asked for kind in c["recall"]["depths"].values()), {}))

    def shares(cell: Cell) -> list[str]:
        kinds = cell["recall"]["depths"].values()
        return [f"{mean(kind[depth]['mean'] for kind in kinds):.2f}" for depth in depths]

    return _markdown([f"depth {depth}" for depth in depths], [(c, shares(c)) for c in asked])


def gain_markdown(results: Results) -> str:
    """What the dial and sparse prefill have over plain prediction, on the same windows and questions."""
    cells = [c for c in results["cells"] if c["gain"] and c["method"].startswith(("dial-", "sparse-"))]

    def gains(cell: Cell) -> list[str]:
        return [_interval(cell["gain"].get(name), "mean", "{:+.3f}", False) for name in FIGURES]

    names = ["Fewer FLOPs", *map(str.capitalize, FIGURES.values())]
    return _markdown(names, [(c, [_fewer(results, c), *gains(c)]) for c in cells])


def data_line(results: Results) -> str:
    """How much text the quality figures are from; empty without text."""
    data = results["data"] or {"windows": {}}
    parts = [
        f"{n} tokens: {w} windows of {data['documents'][n]} documents" for n, w in data["windows"].items()
    ]
    return "; ".join(parts)


def remarks(results: Results) -> list[str]:
    """Warnings, cells that the pair cannot do, and whether the run was cut short; one line each."""
    lines = [f"warning: {text}" for text in results["warnings"]]
    lines += sorted({f"skipped: {c['method']}: {c['skipped']}" for c in results["cells"] if c["skipped"]})
    return lines if results["complete"] else [*lines, "interrupted: the same command goes on from here"]


def csv_text(results: Results) -> str:
    """One row for each cell."""
    return formats.csv_text(_csv_rows(results))


def _markdown(names: list[str], rows: list[tuple[Cell, list[str]]]) -> str:
    """A Markdown table: for each cell its prompt length, its label and the values of the columns `names`."""
    return formats.markdown_table(
        ["Prompt", "Method", *names],
        [(cell["prompt_tokens"], label(cell), *values) for cell, values in rows],
    )


def _values(results: Results, cell: Cell, short: bool = False) -> Iterator[str]:
    if cell["skipped"]:
        yield from ["skipped", *[""] * (1 + len(FIGURES))]
        return
    yield _fewer(results, cell)
    yield _interval(cell["sooner"], "median", "{:.2f}", short)
    for name in FIGURES:
        yield _interval(figure(cell, name), "mean", "{:.3f}", short)


def _fewer(results: Results, cell: Cell) -> str:
    return f"{exact_cell(results, cell['prompt_tokens'])['flops'] / cell['flops']:.2f}"


def _interval(found: dict[str, float] | None, middle: str, form: str, short: bool) -> str:
    if found is None:
        return ""
    show: Callable[[float], str] = form.format
    if short:  # a terminal has 80 columns
        return f"{show(found[middle])}\n{found['low']:.2f}-{found['high']:.2f}"
    return f"{show(found[middle])} ({show(found['low'])} to {show(found['high'])})"


def _csv_rows(results: Results) -> Iterator[dict[str, Any]]:
    for cell in results["cells"]:
        row = {"pair": cell.get("pair") or results["pair"]["name"]}
        row |= {
            name: cell[name] for name in ("prompt_tokens", "method", "budget", "flops", "ttft", "skipped")
        }
        for name, found in (
            ("sooner", cell["sooner"]),
            *((name, figure(cell, name)) for name in (*SHOWN, "recall")),
            *((f"{name}_gain", cell["gain"] and cell["gain"].get(name)) for name in (*SHOWN, "recall")),
        ):
            middle = "median" if name == "sooner" else "mean"
            row |= {
                f"{name}{end}": found and found[key]
                for end, key in (("", middle), ("_low", "low"), ("_high", "high"))
            }
        yield row
