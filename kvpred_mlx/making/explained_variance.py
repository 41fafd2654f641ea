"""How much of the base's keys and values the predicted ones explain."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.taps.kv import KV


class ExplainedVariance:
    """Sums for the explained variance of predicted keys and values, layer by layer."""

    def __init__(self, pair: KVPredictionModel):
        self._count = 0
        self._sums = [[_Deviation(width) for width in widths] for widths in pair.base_taps.widths]

    def add(self, true: Sequence[KV], predicted: Sequence[KV]) -> None:
        """Add raw keys and values of every KV layer, `[B, L, width]`."""
        for sums, *layer in zip(self._sums, predicted, true, strict=True):
            for deviation, p, t in zip(sums, *layer, strict=True):
                deviation.add(p, t)
        self._count += true[0].keys.shape[0] * true[0].keys.shape[1]

    def explained(self) -> dict[str, list[float]]:
        """1 - squared errors / squared deviations from the mean; 0 where a layer has no values of its own."""
        parts = zip(*self._sums, strict=True)
        return {
            name: [d.explained(self._count) for d in part]
            for name, part in zip(("keys", "values"), parts, strict=True)
        }


class _Deviation:
    def __init__(self, width: int):
        self._errors, self._sum, self._squares = 0.0, np.zeros(width), 0.0

    def add(self, predicted: mx.array, true: mx.array) -> None:
        p, t = (
            np.array(a.astype(mx.float32)).reshape(-1, a.shape[-1]).astype(float) for a in (predicted, true)
        )
        self._errors += float(((p - t) ** 2).sum())
        self._sum += t.sum(0)
        self._squares += float((t * t).sum())

    def explained(self, count: int) -> float:
        total = self._squares - float((self._sum**2).sum()) / count
        return 1 - self._errors / total if total > 0 else 0.0
