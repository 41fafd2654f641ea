"""Medians, spreads, and intervals of ratios and of shares."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap

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
    return _interval((ratios,), lambda sample, axis=-1: np.median(sample, axis), seed)


def share(right: Sequence[float]) -> dict[str, float]:
    """The share of right answers (1, the others 0), with its 95 % Wilson interval."""
    interval = binomtest(int(sum(right)), len(right)).proportion_ci(method="wilson")
    return {"mean": sum(right) / len(right), "low": float(interval.low), "high": float(interval.high)}


def paired_shares(right: Sequence[bool], other: Sequence[bool]) -> dict[str, float]:
    """The difference of two shares of right answers to the same questions, with its 95 % interval.

    Newcombe's hybrid of two Wilson intervals for paired answers (Statistics in Medicine 17, 1998, method 10):
    unlike a bootstrap it has a width where all pairs agree.
    """
    n, both = len(right), sum(a and b for a, b in zip(right, other, strict=True))
    p, q = share(right), share(other)
    a, b = sum(right), sum(other)
    product = a * (n - a) * b * (n - b)
    agreement: float = both * (n - a - b + both) - (a - both) * (b - both)
    if agreement > 0:
        agreement = max(agreement - n / 2, 0)
    phi = agreement / product**0.5 if product else 0.0

    def reach(down: float, up: float) -> float:
        return float(max(down**2 - 2 * phi * down * up + up**2, 0) ** 0.5)

    mean = (a - b) / n
    low = reach(p["mean"] - p["low"], q["high"] - q["mean"])
    high = reach(p["high"] - p["mean"], q["mean"] - q["low"])
    return {"mean": mean, "low": mean - low, "high": mean + high}


def ratio_of_medians(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """Median over median of two independent samples."""
    samples = (np.asarray(numerators), np.asarray(denominators))
    return _interval(samples, lambda a, b, axis=-1: np.median(a, axis) / np.median(b, axis), seed)


def spread(samples: Sequence[float]) -> float:
    """(largest - smallest) / median."""
    return float((max(samples) - min(samples)) / np.median(samples))


def _interval(samples: tuple[np.ndarray, ...], statistic: Any, seed: int) -> Interval:
    middle = float(statistic(*samples))
    if min(len(sample) for sample in samples) < 2:
        return Interval(middle, middle, middle)
    with warnings.catch_warnings():  # equal samples have an interval too: their value
        warnings.simplefilter("ignore")
        result = bootstrap(
            samples, statistic, vectorized=True, method="percentile", n_resamples=2000,
            rng=np.random.default_rng(seed),
        )  # fmt: skip
    return Interval(middle, *map(float, result.confidence_interval))
