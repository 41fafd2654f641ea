"""Windows that are recorded when a step asks for them, and forgotten.

A recording costs a disk 10 MB and more a window, and a computer without a GPU a second and more to make: there it is
read many times.  Where a GPU reads prompts faster than a disk, training can use all of the text instead.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np

from kvpred_mlx.making.recording import Batch, Layout, draw, observe
from kvpred_mlx.making.windows import Windows
from kvpred_mlx.pair.model import KVPredictionModel

KEPT = ("kv", "top_ids", "top_logprobs")


class FreshWindows:
    """What `kvpred_mlx.making.recording.Recording` gives a training, computed anew for every batch.

    Args:
        pair: its base is run over each window, and what its predictor reads is kept; the predictor may be trained
            meanwhile.
        windows: of which every one is read once an epoch.
    """

    folder = Path()

    def __init__(self, pair: KVPredictionModel, windows: Windows):
        self._pair, self._windows = pair, windows
        self.layout = Layout.of(pair)

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def tokens_per_row(self) -> int:
        """Tokens of a window."""
        return self._windows.prompts.shape[1] + self._windows.continuations.shape[1]

    def checksum(self) -> int:
        """Of the windows."""
        rows = np.hstack([self._windows.prompts, self._windows.continuations])
        return zlib.crc32(rows.astype(np.int64).tobytes())

    def batch(self, index: int, batch_size: int, seed: int) -> Batch:
        """Batch number `index`, as `Recording.rows` but for the losses; no gradient goes into it."""
        rows = draw(len(self), index, batch_size, seed)
        prompts, continuations = (
            mx.array(array[rows].astype(np.int32))
            for array in (self._windows.prompts, self._windows.continuations)
        )
        seen = observe(self._pair, prompts, continuations)
        features = {name: array.astype(mx.float32) for name, array in seen["features"].items()}
        batch = {"prompts": prompts, "continuations": continuations} | {k: seen[k] for k in KEPT} | features
        mx.eval(batch)
        return batch
