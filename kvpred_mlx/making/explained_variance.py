"""How much of the base's keys and values the predicted ones explain."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kvpred_mlx.pair.model import KVPredictionModel


class ExplainedVariance:
    """Sums for the explained variance of predicted keys and values, layer by layer."""

    def __init__(self, pair: KVPredictionModel):
        self._pair, self._count = pair, 0
        self._sums = [[_Deviation(width) for width in widths] for widths in pair.base_taps.widths]

    def add(self, tokens: mx.array) -> None:
        """Read `tokens` [B, L]."""
        true, _ = self._pair.base_taps.record(tokens)
        predicted = self._pair.predictor(self._pair.auxiliary_features(tokens))
        for sums, *layer in zip(self._sums, predicted, true, strict=True):
            for deviation, p, t in zip(sums, *layer, strict=True):
                deviation.add(p, t)
        self._count += tokens.size

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
