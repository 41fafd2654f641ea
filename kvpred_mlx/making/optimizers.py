"""Optimizers of a training, and its learning rate."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optimizers

from kvpred_mlx.making.settings import TrainingSettings

LEARNING_RATES = {"adamw": 3e-4, "muon": 3e-3}  # to begin with, by name of the optimizer
MUON_REST = 0.1  # AdamW's share of the learning rate where Muon takes the matrices


def make_optimizer(settings: TrainingSettings) -> optimizers.Optimizer:
    """The optimizer of the settings' name.

    `adamw` is the paper's: betas (0.9, 0.95), eps 1e-8, no weight decay on norms and biases.  `muon` trains the layers'
    matrices with mlx's Muon, without weight decay, and the rest (embeddings, the head, stacked experts, norms,
    biases) with AdamW at a tenth of the learning rate.

    Raises:
        ValueError: there is no such optimizer.
    """
    if settings.optimizer == "muon":
        matrices = optimizers.Muon(schedule(settings), weight_decay=0)
        rest = _adamw(settings, MUON_REST * settings.learning_rate, 0.0)
        return optimizers.MultiOptimizer([matrices, rest], [_is_layers_matrix])
    if settings.optimizer == "adamw":
        decayed, plain = (_adamw(settings, settings.learning_rate, d) for d in (settings.weight_decay, 0.0))
        return optimizers.MultiOptimizer([decayed, plain], [lambda path, a: a.ndim > 1])
    raise ValueError(f"optimizer {settings.optimizer!r}, expected {' or '.join(LEARNING_RATES)}")


def schedule(settings: TrainingSettings, peak: float | None = None) -> Callable[[mx.array], mx.array]:
    """The learning rate by step: linear warm-up, then a cosine; `peak` in place of the settings' learning rate."""
    peak = settings.learning_rate if peak is None else peak
    warmup = min(settings.warmup, settings.iters - 1)
    rest = settings.iters - warmup
    cosine = optimizers.cosine_decay(peak, rest, peak * settings.end_learning_rate)
    if not warmup:
        return cosine
    return optimizers.join_schedules(
        [optimizers.linear_schedule(peak / warmup, peak, warmup), cosine], [warmup]
    )


def current_learning_rate(optimizer: optimizers.Optimizer) -> float:
    """Of the last step; the first optimizer's where there are several."""
    first = optimizer.optimizers[0] if isinstance(optimizer, optimizers.MultiOptimizer) else optimizer
    return float(first.learning_rate)


def _is_layers_matrix(path: str, array: mx.array) -> bool:
    """Whether a parameter is a matrix in a list, as all layers are, and embeddings and heads are not."""
    return array.ndim == 2 and any(part.isdigit() for part in path.split("."))


def _adamw(settings: TrainingSettings, peak: float, weight_decay: float) -> optimizers.Optimizer:
    return optimizers.AdamW(schedule(settings, peak), [0.9, 0.95], 1e-8, weight_decay, bias_correction=True)
