"""Quality against FLOPs and against measured TTFT, one line for each method.

`pareto.png` has every figure at every prompt length, `front.png` agreement and recall at the longest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kvpred_mlx.bench.common.results import Results, machine_text
from kvpred_mlx.bench.front.baselines import METHODS
from kvpred_mlx.bench.front.cells import FIGURES, Cell, exact_cell, figure

STYLES = {
    "exact": ("black", "*", ""),
    "predicted": ("tab:purple", "D", ""),
    "auxiliary": ("tab:green", "s", ""),
    "dial-last": ("tab:blue", "o", "-"),
    "dial-top": ("tab:cyan", "o", "-"),
    "dial-both": ("navy", "o", "-"),
    "sparse-top": ("tab:red", "^", "--"),
    "sparse-both": ("tab:orange", "^", "--"),
    "last-only": ("tab:brown", "v", ":"),
    "random": ("tab:pink", "v", ":"),
    "pruned": ("tab:gray", "d", "-."),
}
OTHERS = ("tab:olive", "magenta", "teal", "saddlebrown")  # of other pairs, in turn
TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
AXES = {"flops": "FLOPs, share of the base's", "ttft": "TTFT, share of the base's"}


def plot(results: Results, path: Path) -> None:
    """Rows: figures of quality; columns: FLOPs and TTFT at every prompt length."""
    _draw(results, path, list(FIGURES), results["settings"]["prompt_lens"])


def plot_front(results: Results, path: Path) -> None:
    """The same for agreement and recall at the longest prompt."""
    _draw(results, path, ["agreement", "recall"], [max(results["settings"]["prompt_lens"])])


def _draw(results: Results, path: Path, names: list[str], lengths: list[int]) -> None:
    rows = [name for name in names if any(figure(c, name) for c in results["cells"])]
    columns = [(n, axis) for n in lengths for axis in AXES if any(c[axis] for c in _at(results, n))]
    size = (3.2 * len(columns) + 2.4, 2.6 * max(1, len(rows)) + 1)
    drawing = Figure(figsize=size, layout="constrained")
    grid: Any = drawing.subplots(max(1, len(rows)), len(columns), squeeze=False)
    for c, (n, axis) in enumerate(columns):
        for r, name in enumerate(rows or [None]):
            _lines(grid[r][c], results, n, axis, name)
            grid[r][c].set(
                title=f"{n} tokens" if r == 0 else None,
                xlabel=AXES[axis] if r == max(0, len(rows) - 1) else None,
                ylabel=(FIGURES[name] if name else "share of the prompt exact") if c == 0 else None,
            )
    handles, labels = grid[0][0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right upper", fontsize=7)
    drawing.supxlabel(f"{results['pair']['name']}; {machine_text(results)}", fontsize=5)
    drawing.savefig(path, dpi=150, format="png")


def _at(results: Results, n: int) -> list[Cell]:
    return [c for c in results["cells"] if c["prompt_tokens"] == n and c["skipped"] is None]


def _lines(axes: Any, results: Results, n: int, axis: str, name: str | None) -> None:
    exact = exact_cell(results, n)
    for (pair, method), (color, marker, line) in _styles(results).items():
        cells = [c for c in _at(results, n) if (c.get("pair"), c["method"]) == (pair, method) and c[axis]]
        found = [(c[axis] / exact[axis], _height(c, name)) for c in cells]
        points = sorted(((x, y) for x, y in found if y is not None), key=lambda point: point[0])
        if points:
            x, y = [x for x, _ in points], [y["mean"] for _, y in points]
            spans = [[y["mean"] - y["low"] for _, y in points], [y["high"] - y["mean"] for _, y in points]]
            style = {"color": color, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1}
            title = METHODS[method].title if pair is None else f"{pair}: {METHODS[method].title}"
            axes.errorbar(x, y, yerr=spans, elinewidth=0.5, label=title, **style)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    smallest = min(c[axis] / exact[axis] for c in _at(results, n) if c[axis])
    axes.set_xlim(0.8 * smallest, 1.2)
    if name == "recall":
        axes.set_ylim(-0.05, 1.05)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)


def _styles(results: Results) -> dict[tuple[str | None, str], tuple[str, str, str]]:
    """Color, marker and line of every method, of other pairs in colors of their own."""
    pairs: list[str] = results["settings"].get("beside", [])
    styles: dict[tuple[str | None, str], tuple[str, str, str]] = {(None, m): s for m, s in STYLES.items()}
    for i, pair in enumerate(pairs):
        color = OTHERS[i % len(OTHERS)]
        styles |= {(pair, m): (color, marker, line) for m, (_, marker, line) in STYLES.items()}
    return styles


def _height(cell: Cell, name: str | None) -> dict[str, float] | None:
    if name is not None:
        return figure(cell, name)
    share = 1.0 if cell["method"] == "exact" else cell["budget"] or 0.0
    return {"mean": share, "low": share, "high": share}
