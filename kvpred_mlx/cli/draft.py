"""The flags of speculative decoding, for the commands that generate."""

from __future__ import annotations

from typing import Annotated

import typer

DraftOption = Annotated[
    str | None,
    typer.Option(help="'auxiliary': speculative decoding; the auxiliary has read the prompt already."),
]
NumDraftTokensOption = Annotated[int, typer.Option(min=1, help="Tokens to draft at a time.")]


def check_draft(draft: str | None) -> None:
    """Refuse any draft but the pair's own."""
    if draft not in (None, "auxiliary"):
        raise typer.BadParameter(f"{draft!r}, expected auxiliary", param_hint="--draft")
