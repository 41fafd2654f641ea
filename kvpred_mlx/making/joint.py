"""The paper's joint training: auxiliary and predictor learn, the base is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.making.data import PackedSequences
from kvpred_mlx.making.loop import Trainer
from kvpred_mlx.making.loss import KVPredictionLoss, LossWeights
from kvpred_mlx.making.settings import TrainingSettings
from kvpred_mlx.pair.links import float_type
from kvpred_mlx.pair.loading import own_auxiliary, quantization_config
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.scans.when import on_cpu


def joint_trainer(
    pair: KVPredictionModel,
    data: PackedSequences,
    settings: TrainingSettings,
    weights: LossWeights | None = None,
    state_folder: Path | None = None,
    *,
    freeze_auxiliary: bool = False,
    grad_checkpoint: bool = False,
    compiled: bool = True,
) -> Trainer:
    """A trainer of the pair's auxiliary and predictor (paper, section 3.2; the recipe is CoreNet's).

    What is trained is held in float32 from now on; `restored_types` gives a pair its own types back.

    Args:
        state_folder: where states are saved and resumed from.
        freeze_auxiliary: train the predictor alone.
        grad_checkpoint: compute layers again in the backward pass instead of keeping their activations.

    Raises:
        ValueError: weights to be trained are quantized.
    """
    trained: dict[str, nn.Module] = {"predictor": pair.predictor}
    if pair.auxiliary is not None:
        pair.auxiliary_taps.checkpointed = grad_checkpoint
        if not freeze_auxiliary:
            trained["auxiliary"] = pair.auxiliary
            own_auxiliary(pair)
    quantized = [name for name, module in trained.items() if quantization_config(module)]
    if quantized:
        hint = ", or --freeze-auxiliary" if quantized == ["auxiliary"] else ""
        raise ValueError(
            f"the {' and '.join(quantized)} is quantized, expected float weights to train: --dequantize{hint}"
        )
    pair.freeze()
    for module in trained.values():
        module.unfreeze()
        module.set_dtype(mx.float32)
    weights = weights or LossWeights()
    loss = KVPredictionLoss(pair, weights)
    identity = {"weights": asdict(weights), "trained": sorted(trained), "source": pair.predictor.source}
    pair.base_taps.checkpointed = grad_checkpoint
    return Trainer(pair, loss, data, settings, state_folder, identity=identity, compiled=compiled)


@contextmanager
def restored_types(pair: KVPredictionModel) -> Iterator[None]:
    """Give auxiliary and predictor at the end the types that they have now."""
    modules = [module for module in (pair.auxiliary, pair.predictor) if module is not None]
    before = [(module, float_type(module)) for module in modules]
    try:
        yield
    finally:
        for module, dtype in before:
            module.set_dtype(dtype)
        pair.unfreeze()
        pair.eval()


def default_dtype() -> str:
    """bfloat16 on a GPU; MLX's CPU backend is slow in half precision."""
    return "float32" if on_cpu() else "bfloat16"
