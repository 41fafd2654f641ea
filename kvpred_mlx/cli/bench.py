"""`kvpred-mlx bench`: TTFT against a full base prefill."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpred_mlx.cli.dial import ExactFirst, ExactLast, ExactTop, dial, set_dial
from kvpred_mlx.console import numbers, progress_bar, read_text

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from kvpred_mlx.bench.common.results import Results
    from kvpred_mlx.bench.ttft.settings import BenchSettings
    from kvpred_mlx.pair.model import KVPredictionModel

DTYPES = ("float32", "float16", "bfloat16")
NEEDED = {"scipy": "scipy", "psutil": "psutil"}


def bench(
    model: Annotated[
        str | None,
        typer.Option(help="Pair: a directory or a Hugging Face repo. Without it, the bundled demo pair."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A published pair's shapes with random weights; 'list' shows their names."),
    ] = None,
    prompt_lens: Annotated[
        list[str] | None, typer.Option(help="Prompt lengths in tokens, 512,2048; may be repeated.")
    ] = None,
    batch_sizes: Annotated[list[str] | None, typer.Option(help="Prompts side by side, 1,4.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Timed generations of each mode and shape.")] = 5,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Tokens to generate.")] = 16,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16. Default: the pair's own; a preset's by device."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or gpu. Default: MLX's own choice.")] = None,
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
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw no picture.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of random prompts and weights.")] = 0,
    exact_first: ExactFirst = None,
    exact_last: ExactLast = None,
    exact_top: ExactTop = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two results.json: the change of every ratio.")
    ] = None,
) -> None:
    """Measure how much sooner the first token comes than with a full base prefill."""
    check_installed()
    if compare is not None:
        return _compare(*compare)
    if preset == "list":
        return _list_presets()
    if model is not None and preset is not None:
        raise typer.BadParameter("given with --model, expected one of the two", param_hint="--preset")
    lengths = numbers("--prompt-lens", prompt_lens or ["512,2048"], 2)
    batches = numbers("--batch-sizes", batch_sizes or ["1"], 1)
    steps = numbers("--prefill-step-size", prefill_step_size or ["2048"], 1)
    exact_positions = dial(exact_first, exact_last, exact_top, None)
    set_device(device)
    if dtype not in (None, *DTYPES):
        raise typer.BadParameter(f"{dtype!r}, expected {', '.join(DTYPES)}", param_hint="--dtype")

    from kvpred_mlx.bench.ttft.files import check_new, write
    from kvpred_mlx.bench.ttft.run import bench as run_bench
    from kvpred_mlx.bench.ttft.settings import BenchSettings

    settings = BenchSettings(lengths, batches, trials, max_tokens, steps, seed)
    name, path = name_and_path(model, preset)
    folder = output_dir or Path("bench-results", f"{datetime.now():%Y%m%d-%H%M%S}-{name.replace(':', '-')}")
    check_new(folder)
    notes = [] if path is None else _check_context(path, lengths, model is None)
    pair, prompt = _load(path, preset, dtype, settings, prompt_file)
    if exact_positions is not None:
        set_dial(pair, dial(exact_first, exact_last, exact_top, pair.exact_positions))
    results: Results = {}

    def finished(so_far: Results) -> None:
        results.update(so_far)
        write(folder, results, plot=not no_plot)

    try:
        with progress_bar("warming up") as progress:
            run_bench(pair, name, settings, prompt, notes, progress, finished)
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


def _load(
    path: Path | None,
    preset: str | None,
    dtype: str | None,
    settings: BenchSettings,
    prompt_file: Path | None,
) -> tuple[KVPredictionModel, list[int] | None]:
    if path is None and prompt_file is not None:
        raise typer.BadParameter(
            "given with --preset, which has no tokenizer, expected --model", param_hint="--prompt-file"
        )
    longest = max(settings.prompt_lens)
    text = read_text("--prompt-file", prompt_file) if prompt_file else None
    pair, tokenizer = load_pair(path, preset, dtype, settings.seed)
    if text is None:
        return pair, None
    if tokenizer is None:
        raise ValueError(f"{path}: the pair has no tokenizer, so --prompt-file cannot be read")
    ids = tokenizer.encode(text)
    if len(ids) < longest:
        raise typer.BadParameter(
            f"{prompt_file} has {len(ids)} tokens, expected at least {longest}", param_hint="--prompt-file"
        )
    return pair, ids


def load_pair(
    path: Path | None, preset: str | None, dtype: str | None, seed: int
) -> tuple[KVPredictionModel, TokenizerWrapper | None]:
    """A pair and its tokenizer, or a preset's pair with random weights, in the type that was asked for."""
    import mlx.core as mx

    if dtype not in (None, *DTYPES):
        raise typer.BadParameter(f"{dtype!r}, expected {', '.join(DTYPES)}", param_hint="--dtype")
    if path is None:
        from kvpred_mlx.bench.common.presets import build_preset
        from kvpred_mlx.pair.cpu_prefill import on_cpu

        default = "float32" if on_cpu() else "bfloat16"
        return build_preset(preset or "", getattr(mx, dtype or default), seed), None

    from kvpred_mlx.pair.loading import load

    pair, tokenizer = load(path)
    if dtype is not None:
        pair.set_dtype(getattr(mx, dtype))
        mx.eval(pair.parameters())
    return pair, tokenizer


def _check_context(path: Path, lengths: list[int], is_demo: bool) -> list[str]:
    """Refuse lengths over the pair's context; the demo pair may be timed beyond its own, with a warning."""
    from kvpred_mlx.pair.loading import context_length, read_config

    context = context_length(read_config(path))
    over = [n for n in lengths if context is not None and n > context]
    if over and not is_demo:
        raise typer.BadParameter(
            f"{', '.join(map(str, over))} tokens, expected no more than the pair's context of {context}",
            param_hint="--prompt-lens",
        )
    return [f"the demo pair was made for {context} tokens: longer prompts show times only"] if over else []


def name_and_path(model: str | None, preset: str | None) -> tuple[str, Path | None]:
    """What the results call the pair, and where it is; a preset is nowhere."""
    if preset is not None:
        from kvpred_mlx.bench.common.presets import find_preset

        try:
            return find_preset(preset).name, None
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--preset") from error
    from kvpred_mlx.pair.loading import DEMO_PAIR, find_pair

    path = find_pair(model or DEMO_PAIR)
    return path.name, path


def set_device(device: str | None) -> None:
    """Choose MLX's device, before mlx-lm is imported: its generation stream is made for the device of that moment."""
    if device is None:
        return
    import mlx.core as mx

    if device not in ("cpu", "gpu"):
        raise typer.BadParameter(f"{device!r}, expected cpu or gpu", param_hint="--device")
    if not mx.is_available(getattr(mx, device)):
        raise typer.BadParameter(f"{device!r} is not available in this build of MLX", param_hint="--device")
    mx.set_default_device(getattr(mx, device))


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


def check_installed() -> None:
    """Refuse to begin without the packages of the extra `bench`."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"the bench needs {' and '.join(missing)}: pip install 'kvpred-mlx[bench]'")
