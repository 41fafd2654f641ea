"""What a training says of itself, every few steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx

from kvpred_mlx.making.settings import TrainingSettings


@dataclass(frozen=True)
class Report:
    """What happened since the last report.

    Args:
        step: steps done.
        loss: mean over the steps, and `terms` likewise.
        learning_rate: of the last step.
        tokens_per_second: of all processes together.
        seconds_left: an estimate.
        peak_bytes: MLX's, of this process.
    """

    step: int
    loss: float
    terms: dict[str, float]
    learning_rate: float
    tokens_per_second: float
    seconds_left: float
    peak_bytes: int


class Tally:
    """Sums over the steps since the last report.

    Args:
        settings: the training's.
        length: tokens of a sequence.
    """

    def __init__(self, settings: TrainingSettings, length: int):
        self._settings, self._length = settings, length
        self._begin()

    def _begin(self) -> None:
        self._steps, self._loss, self._terms, self._started = 0, 0.0, dict[str, float](), time.perf_counter()

    def add(self, loss: float, terms: dict[str, float]) -> None:
        """One step more."""
        self._steps += 1
        self._loss += loss
        self._terms = {name: self._terms.get(name, 0.0) + value for name, value in terms.items()}

    def report(self, step: int, learning_rate: float) -> Report:
        """The report after `step` steps of the training; the next one begins here."""
        settings, steps, seconds = self._settings, self._steps, time.perf_counter() - self._started
        tokens = steps * settings.batch_size * settings.grad_accumulation_steps * self._length
        means = {name: value / steps for name, value in self._terms.items()}
        found = Report(
            step, self._loss / steps, means, learning_rate, tokens / seconds,
            seconds_left=(settings.iters - step) * seconds / steps, peak_bytes=mx.get_peak_memory(),
        )  # fmt: skip
        self._begin()
        return found
