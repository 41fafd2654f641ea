"""Ridge regression from one streaming pass: sums in double precision, solved for any ridge and any targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class LinearMap(NamedTuple):
    """y = weight x + bias; weight `[targets, features]`, bias `[targets]`."""

    weight: np.ndarray
    bias: np.ndarray


@dataclass
class Moments:
    """Sums over samples of features x `[a]` and targets y `[b]`; their size does not depend on their number.

    Args:
        n: samples.
        x, y: sums, `[a]` and `[b]`.
        xx, xy: sums of products, `[a, a]` and `[a, b]`.
        yy: sums of the targets' squares, `[b]`.
    """

    n: int
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray

    @classmethod
    def zeros(cls, features: int, targets: int) -> Moments:
        a, b = features, targets
        return cls(0, np.zeros(a), np.zeros(b), np.zeros((a, a)), np.zeros((a, b)), np.zeros(b))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add samples: `x` [T, a] and `y` [T, b], in double precision."""
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += np.einsum("tb,tb->b", y, y)

    def __add__(self, other: Moments) -> Moments:
        parts = ("x", "y", "xx", "xy", "yy")
        return Moments(self.n + other.n, *(getattr(self, p) + getattr(other, p) for p in parts))

    def of_targets(self, columns: slice) -> Moments:
        """The same features with some of the targets."""
        return Moments(self.n, self.x, self.y[columns], self.xx, self.xy[:, columns], self.yy[columns])

    def squared_errors(self, fitted: LinearMap) -> np.ndarray:
        """The sum of squared errors of `fitted` over these samples, for each target `[b]`."""
        w, b = fitted
        quadratic = np.einsum("ba,ba->b", w @ self.xx, w)
        cross = np.einsum("ba,ab->b", w, self.xy)
        return self.yy - 2 * cross - 2 * b * self.y + quadratic + 2 * b * (w @ self.x) + self.n * b * b

    def explained_variance(self, fitted: LinearMap) -> float:
        """1 - (squared errors) / (squared deviations from the mean), over all targets together."""
        total = float((self.yy - self.y**2 / self.n).sum())
        return 1 - float(self.squared_errors(fitted).sum()) / total if total > 0 else 0.0


class Ridge:
    """Ridge regression on standardized features with an intercept, for many ridges at the price of one.

    Minimizes, per target, mean (y - w x - b)^2 + ridge * sum of (w * standard deviation of x)^2.  Directions without
    variance get no weight, so ridge 0 is the least-squares solution of least norm.

    Args:
        moments: of the samples to fit.
    """

    def __init__(self, moments: Moments):
        n = moments.n
        self._mean = moments.x / n
        covariance = moments.xx / n - np.outer(self._mean, self._mean)
        deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
        self._scale = np.where(deviation > 0, deviation, 1)
        self._values, self._vectors = np.linalg.eigh(covariance / np.outer(self._scale, self._scale))

    def solve(self, moments: Moments, ridge: float) -> LinearMap:
        """The map to the targets of `moments` (of the same samples)."""
        mean_y = moments.y / moments.n
        covariance = (moments.xy / moments.n - np.outer(self._mean, mean_y)) / self._scale[:, None]
        floor = self._values.max(initial=0) * len(self._values) * np.finfo(float).eps
        inverse = np.where(self._values > floor, 1 / np.maximum(self._values + ridge, floor or 1), 0)
        solution = self._vectors @ (inverse[:, None] * (self._vectors.T @ covariance))
        weight = (solution / self._scale[:, None]).T
        return LinearMap(weight, mean_y - weight @ self._mean)
