"""Ridge regression from one streaming pass: sums in double precision, solved for any ridge and any targets."""

from __future__ import annotations

from collections.abc import Sequence
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
        n: samples, or the sum of their weights.
        x, y: sums, `[a]` and `[b]`.
        xx, xy: sums of products, `[a, a]` and `[a, b]`.
        yy: sums of the targets' squares, `[b]`.
    """

    n: float
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray

    @classmethod
    def zeros(cls, features: int, targets: int) -> Moments:
        a, b = features, targets
        return cls(0, np.zeros(a), np.zeros(b), np.zeros((a, a)), np.zeros((a, b)), np.zeros(b))

    def add(self, x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Add samples: `x` [T, a] and `y` [T, b], in double precision; `weights` [T] instead of 1 each."""
        wx, wy = (x, y) if weights is None else (x * weights[:, None], y * weights[:, None])
        self.n += len(x) if weights is None else float(weights.sum())
        self.x += wx.sum(0)
        self.y += wy.sum(0)
        self.xx += wx.T @ x
        self.xy += wx.T @ y
        self.yy += np.einsum("tb,tb->b", wy, y)

    def merge(self, other: Moments) -> None:
        """Add the sums over other samples."""
        self.n += other.n
        for part in ("x", "y", "xx", "xy", "yy"):
            total = getattr(self, part)
            total += getattr(other, part)

    def __add__(self, other: Moments) -> Moments:
        parts = ("x", "y", "xx", "xy", "yy")
        return Moments(self.n + other.n, *(getattr(self, p) + getattr(other, p) for p in parts))

    def centred(self, mean_x: np.ndarray, mean_y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`xx`, `xy` and `yy` of x - mean_x and y - mean_y."""
        n, x, y = self.n, self.x, self.y
        xx = self.xx - np.outer(x, mean_x) - np.outer(mean_x, x - n * mean_x)
        xy = self.xy - np.outer(x, mean_y) - np.outer(mean_x, y - n * mean_y)
        return xx, xy, self.yy - mean_y * (2 * y - n * mean_y)

    def deviations(self) -> np.ndarray:
        """The sum of squared deviations from the mean, for each target `[b]`."""
        return self.yy - self.y**2 / max(self.n, 1)


def explained_variance(errors: np.ndarray, deviations: np.ndarray) -> float:
    """1 - (squared errors) / (squared deviations from the mean), over targets together; 0 if they do not vary."""
    total = float(deviations.sum())
    return 1 - float(errors.sum()) / total if total > 0 else 0.0


class Ridge:
    """Ridge regression on standardized features with an intercept, for many ridges at the price of one.

    Minimizes, per target, mean (y - w x - b)^2 + ridge * sum of (w * standard deviation of x)^2.  Directions without
    variance get no weight, so ridge 0 is the least-squares solution of least norm.

    Args:
        moments: of the samples to fit.
    """

    def __init__(self, moments: Moments):
        n = moments.n
        self._mean_x, self._mean_y = moments.x / n, moments.y / n
        xx, xy, _ = moments.centred(self._mean_x, self._mean_y)
        deviation = np.sqrt(np.maximum(np.diag(xx) / n, 0))
        scale = np.where(deviation > 0, deviation, 1)[:, None]
        self._values, vectors = np.linalg.eigh(xx / n / scale / scale.T)
        self._directions = vectors / scale  # along these, features vary independently of each other
        self._covariance = self._directions.T @ xy / n

    def solve(self, ridge: float | np.ndarray) -> LinearMap:
        """The map to all targets; `ridge` is one number, or one for each target `[b]`."""
        weight = (self._directions @ self._along_directions(ridge)).T
        return LinearMap(weight, self._mean_y - weight @ self._mean_x)

    def squared_errors(self, moments: Moments, ridges: Sequence[float]) -> np.ndarray:
        """The sums of squared errors over samples, these or others, for each ridge and target `[ridges, b]`."""
        xx, xy, yy = moments.centred(self._mean_x, self._mean_y)
        xx, xy = self._directions.T @ xx @ self._directions, self._directions.T @ xy
        solutions = (self._along_directions(ridge) for ridge in ridges)
        return np.stack([yy + np.einsum("ab,ab->b", w, xx @ w - 2 * xy) for w in solutions])

    def _along_directions(self, ridge: float | np.ndarray) -> np.ndarray:
        """Weights `[a, b]` of the features' directions."""
        values = self._values[:, None]
        floor = self._values.max(initial=0) * len(self._values) * np.finfo(float).eps
        return np.where(values > floor, self._covariance / np.maximum(values + ridge, floor or 1), 0)
