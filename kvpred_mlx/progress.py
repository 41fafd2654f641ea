"""How long work tells how far it is; the command line shows it, other callers may ignore it."""

from __future__ import annotations

from typing import Protocol


class ProgressCallback(Protocol):
    """Called with how much is done, the total, and what is going on if that has changed."""

    def __call__(self, done: int, total: int, what: str | None = None) -> None: ...


def no_progress(done: int, total: int, what: str | None = None) -> None:
    """Tells nobody."""
