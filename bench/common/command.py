"""How studies and recipes are run, each one function: `python -m kvpred_mlx.bench.studies.NAME --help`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from kvpred_mlx import console

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from kvpred_mlx.making.reports import Report
    from kvpred_mlx.pair.model import KVPredictionModel

Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="Pair: a directory or a Hugging Face repo. Without it, the bundled demo pair."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


def run(command: Callable[..., None], pass_on: bool = False) -> NoReturn:
    """Run a function as its module's command line, with the exit codes and one-line errors of `kvpred-mlx`.

    Args:
        pass_on: options that it does not know are arguments, for another command.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings={"ignore_unknown_options": pass_on})(command)
    console.run(app, Path(sys.argv[0]).stem)


def open_pair(model: str | None) -> tuple[KVPredictionModel, TokenizerWrapper]:
    """A pair that reads text, and its tokenizer; the bundled one without `model`.

    Raises:
        FileNotFoundError: no such directory, and no such repository could be fetched.
        ValueError: it is not a pair, or it has no tokenizer.
    """
    from kvpred_mlx.pair.loading import load
    from kvpred_mlx.pair.locating import DEMO_PAIR, find_pair

    path = find_pair(model or DEMO_PAIR)
    pair, tokenizer = load(path)
    if tokenizer is None:
        raise ValueError(f"{path}: the pair has no tokenizer, expected one that reads text")
    return pair, tokenizer


def tell(report: Report) -> None:
    """Print what a training says of itself, as one line, from the first process alone."""
    import mlx.core as mx

    if mx.distributed.init().rank():
        return
    terms = ", ".join(f"{name} {value:.4f}" for name, value in {"loss": report.loss, **report.terms}.items())
    left = report.seconds_left / 60
    print(
        f"step {report.step}: {terms}, {report.tokens_per_second:.0f} tokens/s, {left:.1f} min left",
        flush=True,
    )
