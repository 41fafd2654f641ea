"""The dial's options, for every command that has them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kvpred_mlx.pair.model import KVPredictionModel

ExactFirst = Annotated[
    int | None,
    typer.Option("--exact-first", min=0, help="The prompt's first tokens that the base computes exactly."),
]
ExactLast = Annotated[
    str | None,
    typer.Option(
        "--exact-last",
        metavar="N|FRACTION",
        help="The prompt's end that the base computes exactly: 16, or 0.1.",
    ),
]
ExactTop = Annotated[
    float | None,
    typer.Option(
        "--exact-top",
        min=0,
        max=1,
        metavar="FRACTION",
        help="Tokens that the base computes exactly because the auxiliary attends to them, as a share.",
    ),
]


Depth = Annotated[
    str | None,
    typer.Option(
        "--depth",
        metavar="LAYERS[:SHARE],...",
        help="How many of the base's first layers read the prompt, up to which share: 14, or 8:0.6,14:0.9.",
    ),
]


def dial(first: int | None, last: str | None, top: float | None, depth: str | None = None) -> dict[str, Any]:
    """The fields of `ExactPositions` that a command's options give."""
    given: dict[str, Any] = {"first": first, "last": None if last is None else _count(last), "top": top}
    if depth is not None:
        from kvpred_mlx.dial.positions import parse_depth

        try:
            given["depth"] = parse_depth(depth)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--depth") from error
    return {name: value for name, value in given.items() if value is not None}


def set_dial(pair: KVPredictionModel, given: dict[str, Any]) -> None:
    """Turn a pair's dial: what `dial` gave in the place of its own setting.

    That its base cannot do it is said now, and not in the middle of a prompt.

    Raises:
        UnsupportedModelError: the pair's families cannot choose or compute the top positions.
        ValueError: the pair has no maps for a depth.
    """
    from kvpred_mlx.dial.positions import ExactPositions
    from kvpred_mlx.pair.modes import Mode

    positions = pair.exact_positions
    if given:
        positions = dataclasses.replace(positions or ExactPositions(), **given)
    Mode(positions=positions).check(pair)
    pair.exact_positions = positions


def _count(text: str) -> int | float:
    """`16` is a number of tokens; `0.1` and `1.0` are fractions."""
    try:
        number = int(text) if text.strip().isascii() and text.strip().isdigit() else float(text)
    except ValueError:
        number = -1
    if not number >= 0 or (isinstance(number, float) and number > 1):
        raise typer.BadParameter(
            f"{text!r}, expected a number of tokens such as 16, or a fraction such as 0.1",
            param_hint="--exact-last",
        )
    return number
