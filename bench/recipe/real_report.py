"""What is known of the pairs of real models, `bench/results/real-pairs/results.json`, as tables and a picture.

`python -m kvpred_mlx.bench.recipe.real_report FOLDER` draws `FOLDER/real-pairs.png`; `make readme` writes the tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpred_mlx.bench.common import command

LENGTHS = (448, 1984)
COLORS = {
    "closed form": "tab:gray",
    "trained": "tab:blue",
    "trained, 4 bits": "tab:orange",
    "trained longer, 4 bits": "tab:red",
    "read by Qwen2.5-Coder-0.5B (trained)": "tab:purple",
    "sparse prefill, tokens chosen by the 0.5B": "tab:green",
}


def read(path: Path) -> dict[str, Any]:
    """The results.

    Raises:
        OSError, ValueError: they cannot be read.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "humaneval" not in found:
        raise ValueError(f"{path}: not the results of pairs of real models")
    return found


def quality_markdown(results: dict[str, Any]) -> str:
    """Retention, agreement, first token and recall by depth and predictor."""
    heads = ["layers", "predictor", "FLOPs to the first token", "retention at 448 (95 %)", "at 1,984 (95 %)"]
    heads += [
        "agreement at 448 (95 %)",
        "at 1,984 (95 %)",
        "first token at 448, 1,984",
        "recall at 448, 1,984",
    ]
    exact = [f"{results['recall_exact'][str(n)]['all']['mean']:.2f}" for n in LENGTHS]
    rows = [["28", "exact", "1", "1", "1", "1", "1", "1", ", ".join(exact)]]
    for row in sorted(results["quality"], key=lambda r: r["layers"]):
        held = [row[f"held-{n}"] for n in LENGTHS]
        figures = [_interval(h[metric]) for metric in ("retention", "agreement") for h in held]
        recall = ", ".join(f"{row[f'recall-{n}']['all']['mean']:.2f}" for n in LENGTHS)
        first = ", ".join(f"{h['first_token_agreement']['mean']:.2f}" for h in held)
        share = f"{_share(results, row['layers']):.2f}"
        rows.append([str(row["layers"]), row["predictor"], share, *figures, first, recall])
    return _table(heads, rows)


def humaneval_markdown(results: dict[str, Any]) -> str:
    """HumanEval's pass@1 by who answers and how the prompt is read."""
    rows = [
        [_who(row), row["mode"], f"{flops(results, row):.2f}", _interval(row["pass@1"])]
        for row in sorted(results["humaneval"], key=lambda row: -flops(results, row))
    ]
    return _table(["who reads", "mode", "FLOPs to the first token", "pass@1 (95 %)"], rows)


def longer_markdown(results: dict[str, Any]) -> str:
    """What longer training gave: agreement and retention by length of prompt, of the same windows for all rows."""
    longer = results["longer"]
    metrics = ("agreement", "retention")
    heads = ["layers", "predictor"]
    heads += [f"{metric} at {int(n):,} (95 %)" for metric in metrics for n in longer["windows"]]
    rows = [
        [str(row["layers"]), row["predictor"]]
        + [_interval(row[f"held-{n}"][metric]) for metric in metrics for n in longer["windows"]]
        for row in sorted(longer["quality"], key=lambda r: (r["layers"], "longer" in r["predictor"]))
    ]
    return _table(heads, rows)


def flops(results: dict[str, Any], row: dict[str, Any]) -> float:
    """The share of a full prefill's FLOPs until the first token: as counted, or from that of depth and last tokens."""
    if "share" in row:
        return float(row["share"])
    if row["layers"] is None:
        return 1.0 if row["predictor"] == "exact" else float(results["half_billion_share"])
    last = float(row["mode"].partition("=")[2] or 0)
    share = _share(results, row["layers"])
    return share + last * (1 - share)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw agreement and HumanEval against FLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, color in COLORS.items():
        rows = sorted((r for r in results["quality"] if r["predictor"] == name), key=lambda r: r["layers"])
        if not rows:
            continue
        xs = [_share(results, r["layers"]) for r in rows]
        _points(left, xs, [r["held-448"]["agreement"] for r in rows], color, f"first layers, {name}")
        if name == "closed form":
            for x, row in zip(xs, rows, strict=True):
                left.annotate(f"{row['layers']} of 28", (x, row["held-448"]["agreement"]["mean"] - 0.025))
    left.plot([1], [1], "k*", markersize=12, label="exact")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(results["humaneval"], key=lambda r: flops(results, r)):
        lines.setdefault(_who(row), []).append(row)
    for who, rows in lines.items():
        xs, color = [flops(results, r) for r in rows], COLORS.get(rows[0]["predictor"], "black")
        dial = "; last 0, 0.1, 0.3 exact" if rows[-1]["mode"].startswith("exact-last") else ""
        marker = {10: "s", 14: "o"}.get(rows[0]["layers"], "*" if rows[0]["predictor"] == "exact" else "^")
        _points(right, xs, [r["pass@1"] for r in rows], color, f"{who}{dial}", marker)
    left.set_ylabel("agreement, 448 tokens of Python")
    right.set(ylabel="HumanEval pass@1", ylim=(0, 0.65))
    for axes in (left, right):
        axes.set_xlabel("FLOPs to the first token / full prefill")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.suptitle("Qwen2.5-Coder-1.5B-Instruct")
    figure.savefig(path, dpi=120, format="png")


def _points(axes: Any, xs: list[float], found: Any, color: str, label: str, marker: str = "o") -> None:
    means = [f["mean"] for f in found]
    bars = [[f["mean"] - f["low"] for f in found], [f["high"] - f["mean"] for f in found]]
    axes.errorbar(xs, means, bars, fmt=f"{marker}-", color=color, capsize=3, label=label, markersize=5)


def _share(results: dict[str, Any], layers: int) -> float:
    return 1 / float(results["flops_ratio"][str(layers)])


def _who(row: dict[str, Any]) -> str:
    if row["layers"] is None:
        return "the base, exactly" if row["predictor"] == "exact" else str(row["predictor"])
    return f"its first {row['layers']} layers ({row['predictor']})"


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(folder: Annotated[Path, typer.Argument(help="With results.json.")]) -> None:
    """Draw the picture of the pairs of real models."""
    plot(read(folder / "results.json"), folder / "real-pairs.png")


if __name__ == "__main__":
    command.run(main)
