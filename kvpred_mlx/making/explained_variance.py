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
        self._count, self._places = 0, pair.base_taps.places
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

    def by_place(self) -> list[dict[str, float]]:
        """The same for every place (`kvpred_mlx.taps.places`) of every layer, by the place's name."""
        found = []
        for places, sums in zip(self._places, self._sums, strict=True):
            named, starts = dict[str, float](), [0, 0]
            for place in places:
                stops = [start + width for start, width in zip(starts, place.widths, strict=True)]
                parts = [
                    deviation.sums(self._count, slice(start, stop))
                    for deviation, start, stop in zip(sums, starts, stops, strict=True)
                ]
                errors, total = (sum(part) for part in zip(*parts, strict=True))
                named[place.name], starts = _share(errors, total), stops
            found.append(named)
        return found


class _Deviation:
    def __init__(self, width: int):
        self._errors, self._sum, self._squares = np.zeros(width), np.zeros(width), np.zeros(width)

    def add(self, predicted: mx.array, true: mx.array) -> None:
        p, t = (np.array(a.astype(mx.float32).flatten(0, -2)).astype(float) for a in (predicted, true))
        self._errors += ((p - t) ** 2).sum(0)
        self._sum += t.sum(0)
        self._squares += (t * t).sum(0)

    def sums(self, count: int, columns: slice) -> tuple[float, float]:
        """Squared errors and squared deviations from the mean of some columns."""
        deviations = self._squares[columns] - self._sum[columns] ** 2 / count
        return float(self._errors[columns].sum()), float(deviations.sum())

    def explained(self, count: int) -> float:
        return _share(*self.sums(count, slice(None)))


def _share(errors: float, total: float) -> float:
    return 1 - errors / total if total > 0 else 0.0
