"""Pretraining of a small model on packed text, as much as a time budget allows: a step of `make demo-pair`.

Not a product: just enough to make the bundled pair's base and auxiliary.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.bench.common import command
from kvpred_mlx.making.data import PackedSequences
from kvpred_mlx.making.loop import Trainer
from kvpred_mlx.making.pairing import load_part
from kvpred_mlx.making.settings import TrainingSettings
from kvpred_mlx.making.step import Terms
from kvpred_mlx.pair.config import build_model

TIMED_STEPS = 8
SHORT_SHARE = 0.6  # of the steps, at the beginning, on halved rows: attention costs half there


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to train: `iters` steps, or without them as many as take about `minutes`."""

    minutes: float = 0.0
    iters: int | None = None


@dataclasses.dataclass(frozen=True)
class Curriculum(PackedSequences):
    """Rows in halves for the first `short` batches, then whole."""

    short: int = 0

    def batch(self, index: int, batch_size: int, seed: int) -> mx.array:
        rows = super().batch(index, batch_size, seed)
        half = (rows.shape[1] - 1) // 2
        return (
            mx.concatenate([rows[:, : half + 1], rows[:, half : 2 * half + 1]])
            if index < self.short
            else rows
        )


def pretrain(
    config: dict[str, Any],
    rows: PackedSequences,
    budget: Budget,
    settings: TrainingSettings,
    folder: Path,
    begin: Path | None = None,
    short: float = SHORT_SHARE,
) -> nn.Module:
    """A model of `config`, trained from random weights or the model in `begin`.

    A state in `folder` is resumed from.
    """

    def trainer(rows: PackedSequences, settings: TrainingSettings, states: Path | None) -> Trainer:
        model = load_part(str(begin)).model if begin else new_model(config, settings.seed)
        return Trainer(model, next_token_loss, rows, settings, states)

    return run(trainer, rows, budget, settings, folder, short).model


def run(
    make: Callable[[PackedSequences, TrainingSettings, Path | None], Trainer],
    rows: PackedSequences,
    budget: Budget,
    settings: TrainingSettings,
    folder: Path,
    short: float = SHORT_SHARE,
) -> Trainer:
    """Train what `make` makes for as many steps as the budget allows, a share of them on short rows first."""
    plan = folder / "plan.json"
    if plan.exists():
        iters = json.loads(plan.read_text())["iters"]
    else:
        iters = budget.iters or _affordable(make(rows, settings, None), budget.minutes)
        folder.mkdir(parents=True, exist_ok=True)
        if not mx.distributed.init().rank():
            plan.write_text(json.dumps({"iters": iters}))
    trainer = make(
        Curriculum(rows.rows, int(short * iters)), dataclasses.replace(settings, iters=iters), folder
    )
    trainer.run(command.tell)
    return trainer


def new_model(config: dict[str, Any], seed: int) -> nn.Module:
    """Random weights for a model that passes its input through and does not expect it again.

    Branches begin at zero, and embeddings are small.
    """
    mx.random.seed(seed)
    model = build_model(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and type(module) is not nn.LayerNorm:
            module.weight = mx.zeros_like(module.weight)  # Nemotron's norms add one to their weight
        if isinstance(module, nn.Embedding):
            module.weight = mx.random.normal(module.weight.shape) * 0.02
        if name.endswith(("o_proj", "out_proj", "down_proj", ".w2")):
            module.weight = mx.zeros_like(module.weight)
    mx.eval(model.parameters())
    return model


def next_token_loss(model: nn.Module, batch: mx.array) -> tuple[mx.array, Terms]:
    """Mean cross-entropy of the next token, for a batch `[B, L + 1]`."""
    logits = model(batch[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, batch[:, 1:], reduction="mean"), {}


def _affordable(trial: Trainer, minutes: float) -> int:
    """How many steps the time allows, by timing a few of a trainer that is thrown away."""
    trial.run(until=TIMED_STEPS // 2)
    start = time.perf_counter()
    trial.run(until=TIMED_STEPS)
    seconds = (time.perf_counter() - start) / (TIMED_STEPS - TIMED_STEPS // 2)
    total: Any = mx.distributed.all_sum(mx.array(seconds)).item()  # alike in every process
    return max(1, int(60 * minutes * trial.group.size() / total))
