"""A training loop: batches by number, states that resume exactly, several processes, clean interruption."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from kvpred_mlx.making.optimizers import current_learning_rate, make_optimizer
from kvpred_mlx.making.reports import Report, Tally
from kvpred_mlx.making.settings import TrainingSettings
from kvpred_mlx.making.states import resume, save_state, saved_states
from kvpred_mlx.making.step import Loss, Step


class TrainingData(Protocol):
    """Batches by number, so that training can go on where it was stopped."""

    @property
    def tokens_per_row(self) -> int:
        """Tokens that are read of a row."""
        ...

    def batch(self, index: int, batch_size: int, seed: int) -> Any:
        """Batch number `index`: arrays, or a tree of them, with `batch_size` rows."""
        ...

    def checksum(self) -> int:
        """Of all data, to tell other data from the same."""
        ...


class DivergedError(ArithmeticError):
    """The loss is no longer a number."""


class Trainer:
    """Trains the parameters of `model` that are not frozen.

    Args:
        model: any module; `loss(model, batch)` gives its loss and named terms for a batch of the data.
        state_folder: where states are saved; what is there is resumed from (None: nothing is saved).
        identity: what else must be the same for a saved state to be resumed, as JSON.
        compiled: compile the step.

    Raises:
        ValueError: the saved state belongs to other settings, or the batch size cannot be shared by the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: TrainingData,
        settings: TrainingSettings,
        state_folder: Path | None = None,
        *,
        identity: dict[str, Any] | None = None,
        compiled: bool = True,
    ):
        self.model, self.data, self.settings, self.folder = model, data, settings, state_folder
        self.optimizer = make_optimizer(settings)
        self.group = mx.distributed.init()
        self._identity = {"settings": asdict(settings), "data": data.checksum(), **(identity or {})}
        if settings.batch_size % self.group.size():
            raise ValueError(
                f"batch size {settings.batch_size}, expected a multiple of the {self.group.size()} processes"
            )
        self.optimizer.init(model.trainable_parameters())
        self.step = 0 if state_folder is None else resume(state_folder, model, self.optimizer, self._identity)
        self._take_step = Step(model, loss, self.optimizer, settings, self.group, compiled=compiled)

    def run(self, report: Callable[[Report], None] = lambda report: None, until: int | None = None) -> None:
        """Train until `settings.iters` (or `until`) steps are done; the state is saved on an interruption.

        Raises:
            DivergedError: the loss is not finite; the last good state is kept.
            KeyboardInterrupt: after the step that was under way, when the state has been saved.
        """
        settings = self.settings
        end = min(settings.iters, until or settings.iters)
        self.model.train()
        tally = Tally(settings, length=self.data.tokens_per_row)
        with _deferred_interrupt() as interrupted:
            while self.step < end:
                tally.add(*self._one_step())
                if self.step % settings.steps_per_report == 0 or self.step == end:
                    report(tally.report(self.step, current_learning_rate(self.optimizer)))
                if interrupted():
                    self.save()
                    raise KeyboardInterrupt
                if self.step % settings.save_every == 0 or self.step == settings.iters:
                    self.save()
        self.model.eval()

    def save(self) -> None:
        """Save the state, from the first process alone."""
        if self.folder is not None and not self.group.rank():
            save_state(self.folder, self.step, self.model, self.optimizer, self._identity)

    def _one_step(self) -> tuple[float, dict[str, float]]:
        """The loss of the next step, and its terms."""
        numbers = self._take_step(self._batches())
        loss = numbers.pop("loss")
        if not math.isfinite(loss):
            kept = self.folder is not None and saved_states(self.folder)
            raise DivergedError(
                f"the loss of step {self.step + 1} is {loss}: try a lower learning rate"
                + (f"; the last good state is in {self.folder}" if kept else "")
            )
        self.step += 1
        return loss, numbers

    def _batches(self) -> list[Any]:
        """This process's share of the next step's batches."""
        settings, rank = self.settings, self.group.rank()
        share = settings.batch_size // self.group.size()
        first = self.step * settings.grad_accumulation_steps
        whole = (
            self.data.batch(i, settings.batch_size, settings.seed)
            for i in range(first, first + settings.grad_accumulation_steps)
        )
        part = slice(rank * share, (rank + 1) * share)
        return [tree_map(lambda rows: rows[part], batch) for batch in whole]


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait for the end of a step; pressed twice, it does not wait."""
    pressed = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
