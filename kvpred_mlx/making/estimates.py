"""Means over documents with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over documents with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, means: np.ndarray) -> Estimate:
        """From the sample's mean and those of its resamples `[1 + RESAMPLES]`."""
        return cls(float(means[0]), *map(float, np.quantile(means[1:], (0.025, 0.975))))


class Resampling:
    """The documents of a sample, drawn again with replacement `RESAMPLES` times.

    All values are averaged over the same draws, so that differences and ratios of their means have intervals too.
    Windows of one document alone are drawn as if each were of its own.

    Args:
        documents: `[W]`, which document each window is from.
        seed: of the draws.
    """

    def __init__(self, documents: np.ndarray, seed: int):
        names, self._group = np.unique(documents, return_inverse=True)
        if len(names) == 1:
            names = self._group = np.arange(len(documents))
        n = len(names)
        drawn = np.random.default_rng(seed).multinomial(n, [1 / n] * n, RESAMPLES)
        self._draws = np.vstack([np.ones(n, int), drawn])

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means over documents of `values` [W]: the sample's own first, then the resamples' `[1 + RESAMPLES]`."""
        by_document = np.bincount(self._group, values) / np.bincount(self._group)
        return self._draws @ by_document / self._draws.shape[1]
