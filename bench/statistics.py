"""Medians, spreads, and bootstrap intervals of ratios."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

NOISY = 0.2  # a spread over this is reported


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """The median of the ratios pair by pair, trials side by side in one run."""
    ratios = np.asarray(numerators) / np.asarray(denominators)
    return _interval((ratios,), lambda sample: float(np.median(sample)), seed)


def ratio_of_medians(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """Median over median of two independent samples."""
    samples = (np.asarray(numerators), np.asarray(denominators))
    return _interval(samples, lambda a, b: float(np.median(a) / np.median(b)), seed)


def spread(samples: Sequence[float]) -> float:
    """(largest - smallest) / median."""
    return float((max(samples) - min(samples)) / np.median(samples))


def _interval(samples: tuple[np.ndarray, ...], statistic: Any, seed: int) -> Interval:
    middle = statistic(*samples)
    if min(len(sample) for sample in samples) < 2:
        return Interval(middle, middle, middle)
    with warnings.catch_warnings():  # equal samples have an interval too: their value
        warnings.simplefilter("ignore")
        result = bootstrap(
            samples, statistic, vectorized=False, method="percentile", n_resamples=2000,
            rng=np.random.default_rng(seed),
        )  # fmt: skip
    return Interval(middle, *map(float, result.confidence_interval))
