"""Errors that several rooms raise, and how they are told."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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


def check_ranges(
    given: Mapping[str, Any],
    least: Mapping[str, float],
    most: Mapping[str, float] | None = None,
    whole: Collection[str] = (),
) -> None:
    """Refuse values that are out of their range, or no numbers; None is none given.

    Args:
        least, most: of each value; `most` may leave some out.
        whole: names of those that are whole numbers.

    Raises:
        ValueError: naming what was given and what was expected.
    """
    wrong, most = list[str](), most or {}
    for name, low in least.items():
        value, high = given.get(name), most.get(name)
        if value is None:
            continue
        kinds = (int,) if name in whole else (int, float)
        if type(value) not in kinds or not low <= value or (high is not None and not value <= high):
            kind = "a whole number, " if type(value) not in kinds and name in whole else ""
            wrong.append(f"{name} is {value!r}, expected {kind}{_range(low, high)}")
    if wrong:
        raise ValueError("; ".join(wrong))


def check_list(
    name: str, values: Collection[Any], least: float, most: float | None = None, *, whole: bool = False
) -> None:
    """Refuse a list that is empty or has a member out of its range (see `check_ranges`).

    Raises:
        ValueError: naming what was given and what was expected.
    """
    if not values:
        raise ValueError(f"{name} is {values!r}, expected at least one")
    for value in values:
        check_ranges(
            {name: value}, {name: least}, {} if most is None else {name: most}, [name] if whole else ()
        )


def _range(low: float, high: float | None) -> str:
    if high is not None:
        return f"{low:g} to {high:g}"
    return f"at least {low:g}" if low else "0 or more"
