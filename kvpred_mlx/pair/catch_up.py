"""What an auxiliary that lags behind has to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


class CatchUp:
    """Tokens for the auxiliary to read, and where the predicted positions lie among them.

    Args:
        tokens: `[B, T]`, right-padded.
        ends: tokens of each row that are not padding (None: all).
        lags: catch-up tokens that stand before the predicted ones: one number for all rows, or one each.
    """

    def __init__(self, tokens: mx.array, ends: list[int] | None, lags: int | list[int]):
        self.tokens, self.ends, self.lags = tokens, ends, lags

    def prepare(self, caches: Sequence[Any]) -> None:
        """Tell the auxiliary's caches about the padding, before the auxiliary reads."""
        for c in caches if self.ends is not None else ():
            padding = [self.tokens.shape[1] - end for end in self.ends or []]
            c.prepare(lengths=self.ends, right_padding=padding)

    def finalize(self, caches: Sequence[Any]) -> None:
        """Roll the padding out of the auxiliary's caches, after the auxiliary has read."""
        for c in caches if self.ends is not None else ():
            c.finalize()

    def predicted(self, recorded: mx.array, n: int) -> mx.array:
        """The `n` columns of `recorded` [B, T, width] that belong to the predicted positions."""
        if isinstance(self.lags, int):
            return recorded[:, self.lags : self.lags + n]
        columns = mx.minimum(mx.array(self.lags)[:, None] + mx.arange(n), recorded.shape[1] - 1)
        return mx.take_along_axis(recorded, columns[..., None], axis=1)
