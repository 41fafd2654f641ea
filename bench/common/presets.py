"""The paper's pairs with random weights of the true shapes: timing needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.utils import get_total_parameters

from kvpred_mlx.bench.common.machine import available_bytes
from kvpred_mlx.convert.published import facts, openelm_shape
from kvpred_mlx.pair.config import ModelArgs
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.saved_model import Model


@dataclass(frozen=True)
class Preset:
    """A published pair by name, `base:auxiliary` in lower case.

    Args:
        base: OpenELM's name of the base.
        auxiliary: OpenELM's or the paper's name of the auxiliary.
        layer_map: as published.
    """

    base: str
    auxiliary: str
    layer_map: list[int]

    @property
    def name(self) -> str:
        return f"{self.base}:{self.auxiliary}".lower()

    def model(self) -> KVPredictionModel:
        """The pair, its weights random and made only when they are used."""
        base, auxiliary = map(_config, (self.base, self.auxiliary))
        return Model(ModelArgs("kvpred", base, auxiliary, self.layer_map))

    def parameters(self) -> tuple[int, int, int]:
        """Numbers of parameters of base, auxiliary and predictor."""
        model = self.model()
        base, auxiliary, predictor = map(get_total_parameters, (model.base, model.auxiliary, model.predictor))
        return base, auxiliary, predictor


def presets() -> dict[str, Preset]:
    """Every published pair by name."""
    pairs = facts()["pairs"].values()
    every = (Preset(pair["base"], pair["auxiliary"], pair["layer_map"]) for pair in pairs)
    return {preset.name: preset for preset in every}


def find_preset(name: str) -> Preset:
    """The preset of that name, whatever the case.

    Raises:
        ValueError: there is none; the message lists them.
    """
    known = presets()
    if name.lower() not in known:
        raise ValueError(f"preset {name!r}, expected one of {', '.join(known)}, or list")
    return known[name.lower()]


def build_preset(name: str, dtype: mx.Dtype, seed: int) -> KVPredictionModel:
    """A preset's pair in memory.

    Raises:
        ValueError: there is no such preset.
        MemoryError: its weights do not fit; names what is needed and what there is.
    """
    preset = find_preset(name)
    model = preset.model()
    needed, free = get_total_parameters(model) * dtype.size, available_bytes()
    if needed > free:
        raise MemoryError(
            f"{preset.name} needs {needed / 1e9:.1f} GB for its weights, {free / 1e9:.1f} GB are free"
        )
    materialize(model, dtype, seed)
    return model


def materialize(model: nn.Module, dtype: mx.Dtype, seed: int) -> None:
    """Make a model's random weights, one array at a time, in `dtype`."""
    mx.random.seed(seed)

    def make(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        made = _random(array.shape).astype(dtype)
        mx.eval(made)
        return made

    model.update(tree_map(make, model.parameters()))


def _config(name: str) -> dict[str, Any]:
    shape = openelm_shape(name)
    assert shape is not None, name
    return shape.config(facts()["openelm"]["common"]["vocab_size_corenet"])


def _random(shape: tuple[int, ...]) -> mx.array:
    # Norm weights are ones; matrices keep the size of what they are multiplied with.
    return mx.random.uniform(-1, 1, shape) * (3 / shape[-1]) ** 0.5 if len(shape) > 1 else mx.ones(shape)
