"""One optimizer step: gradients averaged over batches and processes, clipped, applied."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer, clip_grad_norm
from mlx.utils import tree_map

from kvpred_mlx.making.settings import TrainingSettings

Terms = dict[str, mx.array]
Loss = Callable[[Any, Any], tuple[mx.array, Terms]]


class Step:
    """A step of the parameters of `model` that are not frozen.

    Args:
        loss: `loss(model, batch)` gives the loss and named terms of a batch `[B, L + 1]`.
        optimizer: with the state that the training goes on with.
        settings: of the gradient's norm and of the type to compute in.
        group: processes that share the work.
        compiled: compile the step.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        settings: TrainingSettings,
        group: mx.distributed.Group,
        *,
        compiled: bool = True,
    ):
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self._settings, self._group = settings, group
        self._take: Callable[[list[Any]], tuple[mx.array, Terms]] = self._update
        if compiled:
            state = [model.state, optimizer.state]
            self._take = partial(mx.compile, inputs=state, outputs=state)(self._update)

    def __call__(self, batches: list[Any]) -> dict[str, float]:
        """Take the step over `batches`, each `[B, L + 1]`: the loss under `loss`, and its terms, of all processes."""
        loss, terms = self._take(batches)
        mx.eval(loss, terms, self._model.state, self._optimizer.state)
        return self._over_processes({"loss": loss, **terms})

    def _update(self, batches: list[Any]) -> tuple[mx.array, Terms]:
        loss_and_grad = nn.value_and_grad(self._model, self._in_dtype)
        total: Any = None
        for batch in batches:
            result, gradient = loss_and_grad(self._model, batch)
            whole = (result, gradient)
            total = whole if total is None else tree_map(mx.add, total, whole)
        (loss, terms), gradient = tree_map(lambda a: a / len(batches), total)
        gradient = nn.average_gradients(gradient, self._group)
        if self._settings.grad_clip:
            gradient, _ = clip_grad_norm(gradient, self._settings.grad_clip)
        self._optimizer.update(self._model, gradient)
        return loss, terms

    def _in_dtype(self, model: nn.Module, batch: Any) -> tuple[mx.array, Terms]:
        """The loss computed in the settings' type; gradients and updates are those of the float32 weights."""
        kept = model.trainable_parameters()
        dtype = getattr(mx, self._settings.dtype)
        model.update(tree_map(lambda p: p.astype(dtype), kept))
        try:
            return self._loss(model, batch)
        finally:
            model.update(kept)

    def _over_processes(self, terms: Terms) -> dict[str, float]:
        values = mx.stack([t.astype(mx.float32) for t in terms.values()])
        numbers: Any = (mx.distributed.all_sum(values, group=self._group) / self._group.size()).tolist()
        return dict(zip(terms, numbers, strict=True))
