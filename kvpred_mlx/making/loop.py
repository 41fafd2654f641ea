"""A training loop: batches by number, states that resume exactly, several processes, clean interruption."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from kvpred_mlx.files import new_directory
from kvpred_mlx.making.data import PackedSequences
from kvpred_mlx.making.optimizers import current_learning_rate, make_optimizer

Terms = dict[str, mx.array]
Loss = Callable[[Any, mx.array], tuple[mx.array, Terms]]
KEPT_STATES = 2


@dataclass(frozen=True)
class Settings:
    """How to train; the names are mlx-lm's.

    Args:
        iters: optimizer steps.
        batch_size: sequences of one step and one accumulation, over all processes together.
        learning_rate: the highest, at the end of the warm-up.
        end_learning_rate: the share of it that the cosine ends on.
        warmup: steps over which the learning rate rises from zero.
        optimizer: `adamw` or `muon` (see `make_optimizer`).
        weight_decay: of AdamW's matrices; norms and biases have none.
        grad_clip: the gradient's largest norm, 0 for no limit.
        grad_accumulation_steps: batches whose gradients are averaged for one step.
        save_every: steps between saved states.
        steps_per_report: steps between reports.
        seed: of the order of the data.
        dtype: what to compute in; weights are kept and updated in float32.
    """

    iters: int = 1000
    batch_size: int = 4
    learning_rate: float = 1e-3
    end_learning_rate: float = 0.1
    warmup: int = 100
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    grad_accumulation_steps: int = 1
    save_every: int = 100
    steps_per_report: int = 10
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        least = {
            "iters": 1,
            "batch_size": 1,
            "grad_accumulation_steps": 1,
            "save_every": 1,
            "steps_per_report": 1,
        }
        wrong = [
            f"{k} is {getattr(self, k)}, expected at least {v}"
            for k, v in least.items()
            if getattr(self, k) < v
        ]
        names = ("learning_rate", "end_learning_rate", "warmup", "weight_decay", "grad_clip")
        wrong += [
            f"{k} is {getattr(self, k)}, expected 0 or more" for k in names if not getattr(self, k) >= 0
        ]
        if wrong:
            raise ValueError("; ".join(wrong))


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


class DivergedError(ArithmeticError):
    """The loss is no longer a number."""


class Trainer:
    """Trains the parameters of `model` that are not frozen.

    Args:
        model: any module; `loss(model, batch)` gives its loss and named terms for a batch `[B, L + 1]`.
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
        data: PackedSequences,
        settings: Settings,
        state_folder: Path | None = None,
        *,
        identity: dict[str, Any] | None = None,
        compiled: bool = True,
    ):
        self.model, self.data, self.settings, self.folder = model, data, settings, state_folder
        self.optimizer = make_optimizer(settings)
        self.group = mx.distributed.init()
        self.step = 0
        self._identity = {"settings": asdict(settings), "data": data.checksum(), **(identity or {})}
        if settings.batch_size % self.group.size():
            raise ValueError(
                f"batch size {settings.batch_size}, expected a multiple of the {self.group.size()} processes"
            )
        self.optimizer.init(model.trainable_parameters())
        self._resume()
        self._loss = loss
        state = [model.state, self.optimizer.state]
        self._update = (
            partial(mx.compile, inputs=state, outputs=state)(self._take_step) if compiled else self._take_step
        )

    def run(self, report: Callable[[Report], None] = lambda report: None, until: int | None = None) -> None:
        """Train until `settings.iters` (or `until`) steps are done; the state is saved on an interruption.

        Raises:
            DivergedError: the loss is not finite; the last good state is kept.
            KeyboardInterrupt: after the step that was under way, when the state has been saved.
        """
        end = min(self.settings.iters, until or self.settings.iters)
        sums, since, started = _Sums(), self.step, time.perf_counter()
        self.model.train()
        with _deferred_interrupt() as interrupted:
            while self.step < end:
                sums.add(*self._one_step())
                if self.step % self.settings.steps_per_report == 0 or self.step == end:
                    report(self._report(sums, self.step - since, time.perf_counter() - started))
                    sums, since, started = _Sums(), self.step, time.perf_counter()
                if interrupted():
                    self.save()
                    raise KeyboardInterrupt
                if self.step % self.settings.save_every == 0 or self.step == self.settings.iters:
                    self.save()
        self.model.eval()

    def save(self) -> None:
        """Save the state beside and rename it; older states but the last are removed."""
        if self.folder is None or self.group.rank():
            return
        with new_directory(self.folder / f"step-{self.step:08d}", overwrite=True) as directory:
            mx.save_safetensors(
                str(directory / "trainable.safetensors"), _flat(self.model.trainable_parameters())
            )
            mx.save_safetensors(str(directory / "optimizer.safetensors"), _flat(self.optimizer.state))
            (directory / "config.json").write_text(json.dumps({"step": self.step, **self._identity}))
        for old in saved_states(self.folder)[:-KEPT_STATES]:
            shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> None:
        states = saved_states(self.folder) if self.folder is not None else []
        if not states:
            return
        facts = json.loads((states[-1] / "config.json").read_text())
        then = dict(tree_flatten({k: v for k, v in facts.items() if k != "step"}))
        now = dict(tree_flatten(self._identity))
        differ = [
            f"{k.rpartition('.')[2]} {then.get(k)!r}, now {now.get(k)!r}"
            for k in then | now
            if then.get(k) != now.get(k)
        ]
        if differ:
            raise ValueError(
                f"{states[-1]} was trained with {'; '.join(differ)}: give the same, or remove it to start anew"
            )
        self.model.update(_nested(mx.load(str(states[-1] / "trainable.safetensors"))))
        self.optimizer.state = _nested(mx.load(str(states[-1] / "optimizer.safetensors")))
        self.optimizer.init(self.model.trainable_parameters())
        self.step = facts["step"]
        mx.eval(self.model.parameters(), self.optimizer.state)

    def _one_step(self) -> tuple[float, dict[str, float]]:
        n, rank, size = self.settings.grad_accumulation_steps, self.group.rank(), self.group.size()
        share = self.settings.batch_size // size
        batches = [
            self.data.batch(self.step * n + i, self.settings.batch_size, self.settings.seed)[
                rank * share : (rank + 1) * share
            ]
            for i in range(n)
        ]
        loss, terms = self._update(batches)
        mx.eval(loss, terms, self.model.state, self.optimizer.state)
        numbers = _mean_over_processes({"loss": loss, **terms}, self.group)
        if not math.isfinite(numbers["loss"]):
            raise DivergedError(
                f"the loss of step {self.step + 1} is {numbers['loss']}: try a lower learning rate"
                + (
                    f"; the last good state is in {self.folder}"
                    if self.folder and saved_states(self.folder)
                    else ""
                )
            )
        self.step += 1
        return numbers.pop("loss"), numbers

    def _take_step(self, batches: list[mx.array]) -> tuple[mx.array, Terms]:
        loss_and_grad = nn.value_and_grad(self.model, self._in_dtype)
        total: Any = None
        for batch in batches:
            result, gradient = loss_and_grad(self.model, batch)
            whole = (result, gradient)
            total = whole if total is None else tree_map(mx.add, total, whole)
        (loss, terms), gradient = tree_map(lambda a: a / len(batches), total)
        gradient = nn.average_gradients(gradient, self.group)
        if self.settings.grad_clip:
            gradient, _ = clip_grad_norm(gradient, self.settings.grad_clip)
        self.optimizer.update(self.model, gradient)
        return loss, terms

    def _in_dtype(self, model: nn.Module, batch: mx.array) -> tuple[mx.array, Terms]:
        """The loss computed in the settings' type; gradients and updates are those of the float32 weights."""
        kept = model.trainable_parameters()
        dtype = getattr(mx, self.settings.dtype)
        model.update(tree_map(lambda p: p.astype(dtype), kept))
        try:
            return self._loss(model, batch)
        finally:
            model.update(kept)

    def _report(self, sums: _Sums, steps: int, seconds: float) -> Report:
        settings = self.settings
        tokens = (
            steps * settings.batch_size * settings.grad_accumulation_steps * (self.data.rows.shape[1] - 1)
        )
        left = (settings.iters - self.step) * seconds / max(1, steps)
        learning_rate = current_learning_rate(self.optimizer)
        return Report(
            self.step, sums.loss / steps, {k: v / steps for k, v in sums.terms.items()},
            learning_rate, tokens / seconds, left, mx.get_peak_memory(),
        )  # fmt: skip


def saved_states(folder: Path) -> list[Path]:
    """The states in `folder`, the latest last."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


@dataclass
class _Sums:
    loss: float = 0.0
    terms: dict[str, float] | Any = None

    def add(self, loss: float, terms: dict[str, float]) -> None:
        self.loss += loss
        before = self.terms or dict.fromkeys(terms, 0.0)
        self.terms = {k: before[k] + v for k, v in terms.items()}


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


def _mean_over_processes(terms: Terms, group: Any) -> dict[str, float]:
    values = mx.distributed.all_sum(mx.stack([t.astype(mx.float32) for t in terms.values()]), group=group)
    numbers: Any = (values / group.size()).tolist()
    return dict(zip(terms, numbers, strict=True))


def _flat(tree: Any) -> dict[str, mx.array]:
    return {k: v for k, v in dict(tree_flatten(tree)).items() if isinstance(v, mx.array)}


def _nested(flat: Any) -> Any:
    return tree_unflatten(list(flat.items()))
