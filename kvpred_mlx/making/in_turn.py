"""Windows of several lengths for one training."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from kvpred_mlx.making.fresh_windows import FreshWindows
from kvpred_mlx.making.recording import Batch, Recording


class InTurn:
    """A batch of each part in turn: rows of a batch are of one length, and every length has as many batches.

    Args:
        parts: of the same models.
    """

    def __init__(self, parts: Sequence[Recording | FreshWindows]):
        self._parts = parts
        self.folder, self.layout = parts[0].folder, parts[0].layout

    @property
    def tokens_per_row(self) -> int:
        """Tokens of a window, on average."""
        return round(sum(part.tokens_per_row for part in self._parts) / len(self._parts))

    def checksum(self) -> int:
        """Of the windows of all parts."""
        return zlib.crc32(np.array([part.checksum() for part in self._parts], np.int64).tobytes())

    def batch(self, index: int, batch_size: int, seed: int) -> Batch:
        """Batch number `index`."""
        turn, part = divmod(index, len(self._parts))
        return self._parts[part].batch(turn, batch_size, seed)
