"""`kvpred-mlx pairs`: what `--model` takes by name."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvpred_mlx.cli import options as o

if TYPE_CHECKING:
    from kvpred_mlx.pair.catalogue import Listed


def pairs(
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the Hugging Face hub.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """List the pairs that come with the package, and those on the Hugging Face hub."""
    from kvpred_mlx.pair.catalogue import TAG, bundled, on_the_hub

    here, there = list(bundled()), list[str]()
    if not as_json:
        _show(here)  # first: a hub that does not answer is asked again and again for half a minute
    try:
        there = [] if offline else on_the_hub()
    except OSError as error:
        print(f"note: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"bundled": [asdict(pair) for pair in here], "hub": there}))
    elif there:
        print(f"\non the Hugging Face hub, under the tag {TAG}:")
        print("\n".join(there))


def _show(listed: list[Listed]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("name", "prompts are read by", "MB", "retention", "agreement"):
        table.add_column(column, justify="right" if column == "MB" else "left", no_wrap=True)
    for pair in listed:
        table.add_row(
            pair.name, pair.reads, f"{(pair.bytes or 0) / 1e6:.1f}",
            pair.figures.get("retention", ""), pair.figures.get("agreement", ""),
        )  # fmt: skip
    Console().print(table)
    print()
    for part, there in {part: there for pair in listed for part, there in pair.parts.items()}.items():
        of = ", ".join(pair.name for pair in listed if part in pair.parts)
        print(f"{of}: {part}, {'in the local cache' if there else 'not downloaded yet'}", flush=True)
