"""Errors that several rooms raise, and how they are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UnsupportedModelError(ValueError):
    """A model that cannot do what is asked of it; the message names its family and the reason."""


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, entry by entry, for a run that is to be gone on with."""
    return [
        f"{k.rpartition('.')[2]} {then.get(k)!r}, now {now.get(k)!r}"
        for k in {**then, **now}
        if then.get(k) != now.get(k)
    ]
