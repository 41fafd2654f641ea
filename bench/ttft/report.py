"""A bench for people: tables for the terminal, rows for CSV, Markdown, and what to be wary of."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table

from kvpred_mlx.bench.common import formats
from kvpred_mlx.bench.common.results import Results, machine_text
from kvpred_mlx.bench.common.statistics import Interval, ratio_of_medians
from kvpred_mlx.bench.ttft.measure import PARTS
from kvpred_mlx.bench.ttft.run import BEST

MODE_NAMES = {"exact": "full prefill", "predicted": "KV prediction", "auxiliary": "auxiliary"}


def tables(results: Results) -> Group:
    """Times, ratios and parts of a bench."""
    made = (_times(results), _ratios(results), _parts(results))
    return Group(*(table for table in made if table.row_count))


def remarks(results: Results) -> list[str]:
    """Warnings, skipped shapes, and whether the bench was cut short; one line each."""
    lines = [f"warning: {text}" for text in results["warnings"]]
    for shape in results["shapes"]:
        lines += [f"warning: {_size(shape)}: {text}" for text in shape["warnings"]]
    for shape in results["skipped"]:
        needed, free = (shape[k] / 1e9 for k in ("estimated_bytes", "available_bytes"))
        lines.append(
            f"skipped: {_size(shape)}: {shape['reason']}: about {needed:.1f} GB beside the weights, "
            f"{free:.1f} GB free"
        )
    return lines if results["complete"] else [*lines, "interrupted: these are the shapes that were finished"]


def machine_line(results: Results) -> str:
    """What the bench ran on, in one line."""
    peak = results["matrix_product_flops_per_second"] / 1e9
    return f"{machine_text(results)}; matrix products at most {peak:.0f} GFLOP/s"


def csv_text(results: Results) -> str:
    """One row for each trial."""
    return formats.csv_text(_csv_rows(results), empty=["pair"])


def markdown(results: Results) -> str:
    """The ratios as a Markdown table."""
    names = ["Prompt", "Batch", "Compared", "Full prefill", "KV prediction"]
    rows = (
        (
            shape["prompt_tokens"],
            shape["batch_size"],
            _steps(ratio),
            f"{exact:.2f} s",
            f"{predicted:.2f} s",
            _interval(ratio),
            f"{shape['flops_ratio']:.2f}",
        )
        for shape, ratio, exact, predicted in _compared(results)
    )
    return formats.markdown_table([*names, "Times sooner (95 %)", "FLOPs allow"], rows)


def compare(a: Results, b: Results) -> Table:
    """The change of every ratio from one bench to another, at the shapes and comparisons that both have."""
    columns = ("tokens", "batch", "compared", "A", "B", "B / A")
    table = _table("times sooner, B / A", "95 % bootstrap intervals", *columns)
    samples_b = dict(_samples(b))
    for key, before in _samples(a):
        if key in samples_b:
            after = samples_b[key]
            change = ratio_of_medians(after, before)
            table.add_row(*map(str, key), f"{median(before):.2f}", f"{median(after):.2f}", str(change))
    return table


def _times(results: Results) -> Table:
    mode = results["pair"].get("mode", "predicted")  # since 0.1.0's first results
    dial = "" if mode == "predicted" else f", {mode}"
    title = f"{results['pair']['name']}, {results['pair']['dtype']}{dial}: time to first token"
    columns = (
        "tokens",
        "batch",
        "mode",
        "step",
        "TTFT s",
        "spread",
        "GFLOP/s",
        "tok/s",
        "peak GB",
        "cache MB",
    )
    table = _table(title, "tok/s: decode, all rows; peak: this mode's models alone", *columns)
    for shape in results["shapes"]:
        for run in shape["runs"]:
            rates = [t["decode_tokens_per_second"] for t in run["trials"]]
            table.add_row(
                str(shape["prompt_tokens"]),
                str(shape["batch_size"]),
                MODE_NAMES[run["mode"]],
                str(run["prefill_step_size"]),
                f"{run['ttft']:.3f}",
                f"{run['ttft_spread']:.0%}",
                f"{run['flops_per_second'] / 1e9:.0f}",
                f"{median(rates):.1f}" if None not in rates else "",
                f"{max(t['peak_bytes'] for t in run['trials']) / 1e9:.2f}",
                f"{run['trials'][-1]['cache_bytes'] / 1e6:.1f}",
            )
        table.add_section()
    return table


def _ratios(results: Results) -> Table:
    caption = "median of trial pairs, 95 % bootstrap interval; quotient: measured / FLOPs allow"
    columns = ("tokens", "batch", "compared", "measured", "FLOPs allow", "quotient")
    table = _table("how many times sooner", caption, *columns)
    for shape, ratio, _, _ in _compared(results):
        table.add_row(
            str(shape["prompt_tokens"]),
            str(shape["batch_size"]),
            _steps(ratio),
            _interval(ratio),
            f"{shape['flops_ratio']:.2f}",
            f"{ratio['quotient']:.2f}",
        )
    return table


def _parts(results: Results) -> Table:
    caption = "seconds, each part evaluated before the next begins: their sum is not the TTFT"
    columns = ("tokens", "batch", *PARTS.values(), "TTFT / (aux. + step)")
    table = _table("parts of a predicted TTFT, measured by themselves", caption, *columns)
    for shape in results["shapes"]:
        if shape["parts"]:
            spent = part_medians(shape)
            predicted = next(r["ttft"] for r in shape["runs"] if r["mode"] == "predicted")
            table.add_row(
                str(shape["prompt_tokens"]),
                str(shape["batch_size"]),
                *(f"{seconds:.3f}" for seconds in spent.values()),
                f"{predicted / (spent['auxiliary'] + spent['base_step']):.3f}",
            )
    return table


def _table(title: str, caption: str, *columns: str) -> Table:
    table = formats.tight_table(title, caption)
    for column in columns:
        table.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
    return table


def part_medians(shape: dict[str, Any]) -> dict[str, float]:
    """The median seconds of each part of a shape's predicted TTFT."""
    return {k: median(p[k] for p in shape["parts"]) for k in PARTS}


def _compared(results: Results) -> Iterator[tuple[dict[str, Any], dict[str, Any], float, float]]:
    """Shape, ratio, and the two TTFTs that it compares."""
    for shape in results["shapes"]:
        ttft = {(r["mode"], r["prefill_step_size"]): r["ttft"] for r in shape["runs"]}
        for ratio in shape["ratios"]:
            chosen = (ttft[m, ratio[f"{m}_step_size"]] for m in ("exact", "predicted"))
            yield shape, ratio, *chosen


def _samples(results: Results) -> Iterator[tuple[tuple[Any, ...], list[float]]]:
    for shape, ratio, _, _ in _compared(results):
        seconds = {
            r["mode"]: [t["ttft"] for t in r["trials"]]
            for r in shape["runs"]
            if r["prefill_step_size"] == ratio.get(f"{r['mode']}_step_size")
        }
        pairs = zip(seconds["exact"], seconds["predicted"], strict=True)
        key = (shape["prompt_tokens"], shape["batch_size"], ratio["compared"])
        yield key, [exact / predicted for exact, predicted in pairs]


def _csv_rows(results: Results) -> Iterator[dict[str, Any]]:
    for shape in results["shapes"]:
        for run in shape["runs"]:
            for i, trial in enumerate(run["trials"]):
                yield {
                    "pair": results["pair"]["name"],
                    "dtype": results["pair"]["dtype"],
                    "device": results["machine"]["device"],
                    "prompt_tokens": shape["prompt_tokens"],
                    "batch_size": shape["batch_size"],
                    "mode": run["mode"],
                    "prefill_step_size": run["prefill_step_size"],
                    "trial": i,
                    "flops": shape["flops"][run["mode"]],
                    **trial,
                }


def _interval(ratio: dict[str, Any]) -> str:
    return str(Interval(ratio["median"], ratio["low"], ratio["high"]))


def _steps(ratio: dict[str, Any]) -> str:
    if ratio["compared"] == BEST:
        return f"best: {ratio['exact_step_size']}, {ratio['predicted_step_size']}"
    return f"step {ratio['exact_step_size']}"


def _size(shape: dict[str, Any]) -> str:
    return f"{shape['prompt_tokens']} tokens x {shape['batch_size']}"
