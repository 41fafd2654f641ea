"""`ttft.png`: TTFT against prompt length, and what a predicted TTFT is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kvpred_mlx.bench.common.results import Results
from kvpred_mlx.bench.ttft.measure import PARTS
from kvpred_mlx.bench.ttft.report import MODE_NAMES, machine_line, part_medians

COLORS = {"exact": "tab:gray", "predicted": "tab:blue", "auxiliary": "tab:green"}


def plot(results: Results, path: Path) -> None:
    """Draw the shapes of the smallest batch that was measured."""
    batch_size = min(s["batch_size"] for s in results["shapes"])
    shapes = sorted(
        (s for s in results["shapes"] if s["batch_size"] == batch_size), key=lambda s: s["prompt_tokens"]
    )
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _lines(left, shapes)
    _stacks(right, [s for s in shapes if s["parts"]])
    figure.suptitle(f"{results['pair']['name']}, {results['pair']['dtype']}, batch {batch_size}")
    figure.supxlabel(machine_line(results), fontsize=6)
    figure.savefig(path, dpi=150, format="png")


def _lines(axes: Any, shapes: list[dict[str, Any]]) -> None:
    lengths = [s["prompt_tokens"] for s in shapes]
    for mode, color in COLORS.items():
        measured = [[r for r in s["runs"] if r["mode"] == mode] for s in shapes]
        if not all(measured):  # where the base's own first layers read there is no auxiliary
            continue
        runs = [found[0] for found in measured]
        seconds = [[t["ttft"] for t in r["trials"]] for r in runs]
        axes.plot(lengths, [r["ttft"] for r in runs], color=color, marker="o", label=MODE_NAMES[mode])
        axes.fill_between(lengths, [*map(min, seconds)], [*map(max, seconds)], color=color, alpha=0.2)
    exact = [next(r["ttft"] for r in s["runs"] if r["mode"] == "exact") for s in shapes]
    bound = [ttft / s["flops_ratio"] for ttft, s in zip(exact, shapes, strict=True)]
    label = "full prefill / FLOPs ratio"
    axes.plot(lengths, bound, color=COLORS["predicted"], linestyle="--", label=label)
    axes.set(xlabel="prompt tokens", ylabel="TTFT, seconds", xscale="log", yscale="log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def _stacks(axes: Any, shapes: list[dict[str, Any]]) -> None:
    labels = [str(s["prompt_tokens"]) for s in shapes]
    bottom = [0.0] * len(shapes)
    for part, label in PARTS.items():
        heights = [part_medians(s)[part] for s in shapes]
        axes.bar(labels, heights, bottom=bottom, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set(
        xlabel="prompt tokens", ylabel="seconds", title="parts of a predicted TTFT, measured by themselves"
    )
    if shapes:
        axes.legend()
