"""`kvpred-mlx bench`: TTFT against a full base prefill."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.dial import Depth, ExactFirst, ExactLast, ExactTop, dial
from kvpred_mlx.cli.opening import OpenedPair, OtherModels, locate, open_for_measuring, preset_name
from kvpred_mlx.cli.values import check_installed, set_device
from kvpred_mlx.console import numbers, progress_bar, read_text

if TYPE_CHECKING:
    from kvpred_mlx.bench.ttft.run import Results

NEEDED = ("scipy", "psutil")


def bench(
    model: o.ModelOption = None,
    base: o.OtherBase = None,
    auxiliary: o.OtherAuxiliary = None,
    force: o.Force = False,
    preset: o.PresetOption = None,
    prompt_lens: o.PromptLens = None,
    batch_sizes: Annotated[list[str] | None, typer.Option(help="Prompts side by side, 1,4.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Timed generations of each mode and shape.")] = 5,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Tokens to generate.")] = 16,
    dtype: o.Dtype = None,
    device: o.Device = None,
    prefill_step_size: Annotated[
        list[str] | None,
        typer.Option(help="Prompt tokens to process at a time; several compare best with best too."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Text to take the prompts from, instead of random tokens.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="New folder for results. Default: bench-results/DATE-PAIR.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of tables.")] = False,
    no_plot: o.NoPlot = False,
    seed: Annotated[
        int, typer.Option(min=0, max=o.LARGEST_SEED, help="Seed of random prompts and weights.")
    ] = 0,
    exact_first: ExactFirst = None,
    exact_last: ExactLast = None,
    exact_top: ExactTop = None,
    depth: Depth = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two results.json: the change of every ratio.")
    ] = None,
) -> None:
    """Measure how much sooner the first token comes than with a full base prefill."""
    check_installed("bench", NEEDED)
    if compare is not None:
        return _compare(*compare)
    if preset == "list":
        return _list_presets()
    given_dial = dial(exact_first, exact_last, exact_top, depth)
    if model is not None and preset is not None:
        raise typer.BadParameter("given with --model, expected one of the two", param_hint="--preset")
    if prompt_file is not None and preset is not None:
        raise typer.BadParameter(
            "given with --preset, which has no tokenizer, expected --model", param_hint="--prompt-file"
        )
    lengths = numbers("--prompt-lens", prompt_lens or ["512,2048"], 2)
    batches = numbers("--batch-sizes", batch_sizes or ["1"], 1)
    steps = numbers("--prefill-step-size", prefill_step_size or ["2048"], 1)
    set_device(device)

    from kvpred_mlx.bench.ttft.files import check_new, write
    from kvpred_mlx.bench.ttft.run import bench as run_bench
    from kvpred_mlx.bench.ttft.settings import BenchSettings
    from kvpred_mlx.files import kept_if_filled

    settings = BenchSettings(lengths, batches, trials, max_tokens, steps, seed)
    path, name = _what(model, preset)
    others = OtherModels(base, auxiliary, force)
    folder = output_dir or Path("bench-results", f"{datetime.now():%Y%m%d-%H%M%S}-{name.replace(':', '-')}")
    with kept_if_filled(folder):
        check_new(folder)
        notes = [] if path is None else _check_context(path, base, lengths, model is None)
        text = None if prompt_file is None else read_text("--prompt-file", prompt_file)
        opened = open_for_measuring(path, preset, dtype, seed, given_dial, others)
        prompt = None if text is None else _prompt(opened, text, prompt_file, max(lengths))
        results: Results = {}

        def finished(so_far: Results) -> None:
            results.update(so_far)
            write(folder, results, plot=not no_plot)

        try:
            with progress_bar("warming up") as progress:
                run_bench(opened.pair, name, settings, prompt, notes, progress, finished)
        finally:
            if results:
                _show(results, folder, as_json)


def _show(results: Results, folder: Path, as_json: bool) -> None:
    from rich.console import Console

    from kvpred_mlx.bench.ttft.report import machine_line, remarks, tables

    if as_json:
        print(json.dumps(results))
    else:
        console = Console()
        console.print(tables(results))
        console.print(machine_line(results), markup=False, highlight=False)
    for line in remarks(results):
        print(line, file=sys.stderr)
    print(f"results: {folder}", file=sys.stderr)


def _what(model: str | None, preset: str | None) -> tuple[Path | None, str]:
    """Where the pair is, and what the results call it; a preset is nowhere."""
    if preset is not None:
        return None, preset_name(preset)
    _, path = locate(model)
    return path, path.name


def _prompt(opened: OpenedPair, text: str, file: Path | None, longest: int) -> list[int]:
    """A text's tokens, if they are enough for the longest prompt."""
    ids = opened.tokenizer.encode(text)
    if len(ids) < longest:
        raise typer.BadParameter(
            f"{file} has {len(ids)} tokens, expected at least {longest}", param_hint="--prompt-file"
        )
    return ids


def _check_context(path: Path, base: str | None, lengths: list[int], is_demo: bool) -> list[str]:
    """Refuse lengths over the pair's context; the demo pair may be timed beyond its own, with a warning."""
    from kvpred_mlx.pair.loading import context_length, read_base_config

    context = context_length(read_base_config(path, base))
    over = [n for n in lengths if context is not None and n > context]
    if over and not is_demo:
        raise typer.BadParameter(
            f"{', '.join(map(str, over))} tokens, expected no more than the pair's context of {context}",
            param_hint="--prompt-lens",
        )
    return [f"the demo pair was made for {context} tokens: longer prompts show times only"] if over else []


def _list_presets() -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from kvpred_mlx.bench.common.presets import presets

    table = Table(
        caption="base + auxiliary + predictor, weights only: a cache and room to compute come on top",
        box=SIMPLE_HEAD,
    )
    for column in ("preset", "M parameters", "float32", "bfloat16"):
        table.add_column(column, justify="left" if column == "preset" else "right", no_wrap=True)
    for name, known in presets().items():
        counts = known.parameters()
        sizes = (f"{sum(counts) * width / 1e9:.1f} GB" for width in (4, 2))
        table.add_row(name, " + ".join(f"{count / 1e6:.0f}" for count in counts), *sizes)
    Console().print(table)


def _compare(a: Path, b: Path) -> None:
    from rich.console import Console

    from kvpred_mlx.bench.ttft.files import read
    from kvpred_mlx.bench.ttft.report import compare, machine_line

    results = read(a), read(b)
    table = compare(*results)
    if not table.row_count:
        raise ValueError(f"{a} and {b} have no shape in common")
    console = Console()
    for name, one in zip("AB", results, strict=True):
        console.print(f"{name}: {one['pair']['name']}, {machine_line(one)}", markup=False, highlight=False)
    console.print(table)
