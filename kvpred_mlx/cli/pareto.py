"""`kvpred-mlx pareto`: quality against TTFT, for the dial and for what people use today."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpred_mlx.cli import making
from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.bench import NEEDED
from kvpred_mlx.cli.opening import OtherModels, beside_another, locate, one_pair, open_for_measuring
from kvpred_mlx.cli.values import check_installed, set_device
from kvpred_mlx.console import numbers, progress_bar

if TYPE_CHECKING:
    from kvpred_mlx.bench.front.pareto import Data, Results
    from kvpred_mlx.cli.opening import OpenedPair


def pareto(
    pair: o.PairArgument = None,
    model: o.ModelOption = None,
    base: o.OtherBase = None,
    auxiliary: o.OtherAuxiliary = None,
    force: o.Force = False,
    data: o.OptionalData = None,
    preset: o.PresetOption = None,
    prompt_lens: o.PromptLens = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Methods, by name; 'list' shows them. Default: all.")
    ] = None,
    budgets: Annotated[list[str] | None, typer.Option(help="Shares of the prompt, 0.05,0.1,0.2,0.4.")] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="Other pairs of the same base, as further lines: predictions and dials; repeatable."
        ),
    ] = None,
    windows: o.Windows = 160,
    score_tokens: o.ScoreTokens = 64,
    questions: Annotated[
        int, typer.Option(min=0, help="Recall questions of each kind at each depth; 0: none.")
    ] = 10,
    trials: Annotated[int, typer.Option(min=1, help="Timed first tokens of each method and budget.")] = 5,
    all_documents: o.AllDocuments = False,
    text_key: o.TextKey = "text",
    dtype: o.Dtype = None,
    dequantize: o.Dequantize = False,
    device: o.Device = None,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for results; an interrupted run goes on from what is there.")
    ] = Path("pareto-results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")] = False,
    no_plot: o.NoPlot = False,
    seed: Annotated[
        int, typer.Option(min=0, max=o.LARGEST_SEED, help="Seed of questions, random tokens and bootstraps.")
    ] = 0,
) -> None:
    """Measure quality against FLOPs and TTFT: exact positions, sparse prefill, dropped tokens, smaller models."""
    check_installed("bench", NEEDED)
    names = _methods(methods)
    if names is None:
        return
    if (data is None) == (preset is None):
        raise typer.BadParameter("expected one of the two", param_hint="--data or --preset")
    model = one_pair(model, pair)
    if preset is not None and model is not None:
        raise typer.BadParameter("given with --model, expected one of the two", param_hint="--preset")
    lengths = numbers("--prompt-lens", prompt_lens or ["256,512"], 2)
    shares = _shares(budgets or ["0.05,0.1,0.2,0.4"])
    set_device(device)

    from kvpred_mlx.bench.front.files import read, write
    from kvpred_mlx.bench.front.pareto import pareto as run
    from kvpred_mlx.bench.front.settings import FrontSettings
    from kvpred_mlx.files import kept_if_filled

    others = _names(beside or [], model)
    settings = FrontSettings(
        lengths, names, shares, windows, score_tokens, questions, trials, seed, [*others]
    )
    there = output_dir / "results.json"
    before = read(there) if there.exists() else None
    documents = [] if data is None else making.read_held_out(data, text_key, all_documents)
    opened = open_for_measuring(
        model, preset, dtype, settings.seed, others=OtherModels(base, auxiliary, force)
    )
    further = {name: beside_another(place, opened, dtype) for name, place in others.items()}
    held_out = _encode(opened, documents) if documents else None
    if dequantize:
        making.dequantize(opened.pair, *further.values())
    with kept_if_filled(output_dir):
        results: Results = {}

        def finished(so_far: Results) -> None:
            results.update(so_far)
            write(output_dir, results, plot=False)

        try:
            with progress_bar("counting FLOPs") as progress:
                name = opened.short_name
                run(opened.pair, name, settings, held_out, before, progress, finished, further)
        finally:
            if results:
                write(output_dir, results, plot=not no_plot)
                _show(results, output_dir, as_json)


def _methods(given: list[str] | None) -> list[str] | None:
    """The methods by name; None if they were only to be listed."""
    from kvpred_mlx.bench.front.baselines import METHODS

    names = [word.strip() for text in given or [",".join(METHODS)] for word in text.split(",")]
    if names == ["list"]:
        for name, method in METHODS.items():
            print(f"{name:12} {method.title}")
        return None
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise typer.BadParameter(
            f"{', '.join(map(repr, unknown))}, expected some of {', '.join(METHODS)}", param_hint="--methods"
        )
    return list(dict.fromkeys(names))


def _names(beside: list[str], model: str | None) -> dict[str, str]:
    """The places of other pairs than `model` by what results call them, the names of their folders."""
    found: dict[str, str] = {}
    own = locate(model)[1].resolve() if beside else None
    for place in beside:
        if not place:
            raise typer.BadParameter("'', expected a pair", param_hint="--beside")
        path = locate(place)[1].resolve()
        if path == own:
            raise typer.BadParameter(
                f"{place!r} is --model itself, expected another pair", param_hint="--beside"
            )
        name = path.name
        if name in found:
            raise typer.BadParameter(
                f"{place!r} and {found[name]!r}, expected pairs whose folders have different names",
                param_hint="--beside",
            )
        found[name] = place
    return found


def _shares(given: list[str]) -> list[float]:
    words = [word.strip() for text in given for word in text.split(",")]
    try:
        shares = [float(word) for word in words]
    except ValueError:
        shares = [0.0]
    if not all(0 < share <= 1 for share in shares):
        raise typer.BadParameter(
            f"{', '.join(map(repr, words))}, expected shares above 0 and up to 1, such as 0.05,0.1",
            param_hint="--budgets",
        )
    return list(dict.fromkeys(shares))


def _encode(opened: OpenedPair, documents: list[str]) -> Data:
    from kvpred_mlx.bench.front.pareto import Data

    tokenizer = opened.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    return Data(tokenizer, documents, ids)


def _show(results: Results, folder: Path, as_json: bool) -> None:
    from rich.console import Console

    from kvpred_mlx.bench.front.report import remarks, table

    if as_json:
        print(json.dumps(results))
    else:
        console, made = Console(), table(results)
        needed = console.measure(made, options=console.options.update(max_width=200)).maximum
        Console(width=max(console.width, needed)).print(made)  # no digit is cut off
    for line in remarks(results):
        print(line, file=sys.stderr)
    print(f"results: {folder}", file=sys.stderr)
