"""Errors that several rooms raise, and how they are told."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """A model that cannot do what is asked of it; the message names its family and the reason."""


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
