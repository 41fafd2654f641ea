"""The dial: which of a prompt's positions the base computes exactly, and how deep it goes for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from typing import Any

Depth = tuple[int, float]  # so many layers, up to that share of the prompt


@dataclass(frozen=True)
class ExactPositions:
    """Which of a prompt's tokens the base computes exactly; the prompt's last token always is, and does not count.

    >>> ExactPositions(last=0.1)  # the prompt's last tenth
    ExactPositions(first=0, last=0.1, top=0.0, depth=())
    >>> ExactPositions(depth=((8, 0.6), (14, 0.9)))  # and of a pair that reads with its base's first layers
    ExactPositions(first=0, last=0, top=0.0, depth=((8, 0.6), (14, 0.9)))

    Args:
        first: tokens at the beginning (attention sinks).
        last: the end, in tokens (int) or as a fraction of the prompt (float); the auxiliary leaves it to the
            base, unless it is asked for `top`.
        top: a fraction of the prompt, chosen among the others by the attention of the auxiliary's last queries.
        depth: for pairs that read with their base's first layers: how many layers read the prompt up to which share
            of it, in order; what is behind the last share is exact.  Empty: the pair's deepest, to the end.

    Raises:
        ValueError: naming what is out of range.
    """

    first: int = 0
    last: int | float = 0
    top: float = 0.0
    depth: Sequence[Depth] = ()

    def __post_init__(self) -> None:
        wrong = []
        if type(self.first) is not int or self.first < 0:
            wrong.append(f"first is {self.first!r}, expected a number of tokens")
        fits = type(self.last) is int or (type(self.last) is float and self.last <= 1)
        if not fits or not self.last >= 0:
            wrong.append(f"last is {self.last!r}, expected a number of tokens, or a fraction from 0.0 to 1.0")
        if type(self.top) not in (int, float) or not 0 <= self.top <= 1:
            wrong.append(f"top is {self.top!r}, expected a fraction from 0 to 1")
        if not _is_depth(self.depth):
            wrong.append(
                f"depth is {self.depth!r}, expected pairs of a number of layers and a share, the shares rising up to 1"
            )
        if wrong:
            raise ValueError("exact positions: " + "; ".join(wrong))
        object.__setattr__(self, "depth", tuple((k, float(end)) for k, end in self.depth))

    def __bool__(self) -> bool:
        return bool(self.first or self.last or self.top or self.depth)

    def last_of(self, tokens: int) -> int:
        """How many of `tokens` tokens at the end are exact."""
        last = self.last if isinstance(self.last, int) else share(self.last, tokens)
        behind = tokens - share(self.depth[-1][1], tokens) if self.depth else 0
        return min(tokens, max(last, behind))

    def top_of(self, tokens: int) -> int:
        """How many of `tokens` tokens `top` means."""
        return share(self.top, tokens)

    def as_dict(self) -> dict[str, Any]:
        """As a pair's `config.json` holds it."""
        fields = asdict(self)
        return fields if self.depth else {name: value for name, value in fields.items() if name != "depth"}


def share(fraction: float, tokens: int) -> int:
    """How many of `tokens` tokens a fraction of them is, rounded up."""
    return ceil(round(fraction * tokens, 6))


def parse_depth(text: str) -> tuple[Depth, ...]:
    """`8:0.6,14:0.9`: 8 layers for the first six tenths, 14 up to nine tenths; `14` alone goes to the end.

    Raises:
        ValueError: it does not read like that.
    """
    try:
        words = [word.partition(":") for word in text.replace("/", ",").split(",")]
        depth = tuple((int(layers), float(end) if colon else 1.0) for layers, colon, end in words)
    except ValueError:
        depth = ()
    if not depth or not _is_depth(depth):
        raise ValueError(
            f"depth {text!r}, expected layers and shares of the prompt such as 8:0.6,14:0.9, or 14"
        )
    return depth


def _is_depth(depth: Any) -> bool:
    try:
        spans = [(k, float(end)) for k, end in depth]
    except (TypeError, ValueError):
        return False
    ends = [0.0, *(end for _, end in spans)]
    return all(type(k) is int and k > 0 for k, _ in spans) and all(a < b <= 1 for a, b in pairwise(ends))
