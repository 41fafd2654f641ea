"""What the dial means in one call: which tokens are exact, which are predicted and how deep, and who reads what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from kvpred_mlx.dial.importance import choose
from kvpred_mlx.dial.positions import ExactPositions, share


@dataclass(frozen=True)
class Span:
    """The tokens `[start, stop)` of a call.

    Args:
        exact: the base computes them; else they are predicted.
        depth: by how many of the base's first layers (None: the pair's own choice).
    """

    start: int
    stop: int
    exact: bool = False
    depth: int | None = None


@dataclass(frozen=True)
class Call:
    """What the dial means in one call of `tokens` tokens.

    The call's tokens `[0, first)` and `[last, tokens)` are exact and the rest is predicted; then `top` of the
    tokens `[candidates)`, numbered from the first of the last `seen` ones, are made exact.  The auxiliary reads the
    tokens `[0, read)`.  `depths` cuts the predicted part into spans of one depth each, by where they end.
    """

    tokens: int
    first: int
    last: int
    top: int
    candidates: tuple[int, int]
    seen: int
    read: int
    depths: tuple[tuple[int | None, int], ...] = ()

    @classmethod
    def of(cls, dial: ExactPositions, tokens: int, announced: tuple[int, int] | None, windowed: bool) -> Call:
        """Without an announced prompt (tokens done, tokens in all) every call is taken for a whole one."""
        done, total = announced or (0, tokens)
        head = total - dial.last_of(total)
        first = min(max(dial.first - done, 0), tokens)
        last = max(first, min(head - done, tokens))
        if windowed or announced is None:
            whole, start, end, top = tokens, first, last, dial.top_of(tokens)
        else:  # all in one, in the call in which the predicted part ends
            whole, start, end = done + tokens, dial.first, head
            top = dial.top_of(total) if done < head <= done + tokens else 0
        if windowed and top and last - first == 1:  # no gap in a ring: a single token is simply exact
            first = last = end = start
        top = min(top, max(0, end - start))
        read = tokens if dial.top else last if last > first else 0
        depths = tuple((k, share(end, total) - done) for k, end in dial.depth)
        return cls(tokens, first, last, top, (start, end), whole, read, depths)

    @classmethod
    def padded(cls, dial: ExactPositions, tokens: int) -> Call:
        """Each row ends elsewhere, so all that is exact is made so afterwards, and all rows are read equally deep."""
        deepest = max((k for k, _ in dial.depth), default=None)
        start = min(dial.first, tokens)
        return cls(
            tokens, 0, tokens, dial.top_of(tokens), (start, tokens), tokens, tokens, ((deepest, tokens),)
        )

    def spans(self) -> list[Span]:
        """The call's tokens in order; with a `top` the first ones go through the base together with it."""
        begin = 0 if self.top else self.first
        cuts = [*((k, min(max(end, begin), self.last)) for k, end in self.depths), (None, self.last)]
        if self.depths:
            cuts[-1] = (self.depths[-1][0], self.last)
        spans, start = [Span(0, begin, exact=True)], begin
        for depth, stop in cuts:
            spans.append(Span(start, stop, depth=depth))
            start = stop
        spans.append(Span(self.last, self.tokens, exact=True))
        return [span for span in spans if span.stop > span.start]

    def chosen(self, scores: mx.array) -> mx.array:
        """The first and the top tokens [B, n] among the last `seen` ones, ascending, by their `scores` [B, seen]."""
        start, end = self.candidates
        rows = scores.shape[0]
        top = start + choose(scores[:, start:end], [self.top] * rows, [end - start] * rows)
        first = mx.arange(self.first) + (self.seen - self.tokens)
        return mx.concatenate([mx.broadcast_to(first, (rows, self.first)), top], axis=1)


def keeps_all(cache: Sequence[Any]) -> bool:
    """Whether every entry keeps all tokens of one row, or of rows of one length: no windows, no batches."""
    return all(isinstance(c, KVCache | QuantizedKVCache) for c in cache)
