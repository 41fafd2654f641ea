"""An auxiliary that is some of the base's layers with the base's own weights (paper, KVP-LP): kept once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.pair.config import build_model

LAYER_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")


class KeptLayers:
    """Which weight of the base each weight of the auxiliary is.

    Args:
        base: the model whose layers are kept.
        kept: their numbers, ascending; the auxiliary's layer i is the base's layer `kept[i]`.

    Raises:
        ValueError: the base has no list of layers, or fewer than are asked for.
    """

    def __init__(self, base: nn.Module, kept: Sequence[int]):
        first, self._kept = base.layers[0], kept
        owners = [name for name, module in base.named_modules() if module is first]
        if not owners or kept[-1] >= len(base.layers):
            raise ValueError(f"layers {list(kept)} of a base with {len(base.layers)} layers cannot be kept")
        self._prefix = owners[0].rpartition(".")[0]

    def original(self, name: str) -> str:
        """The base's name of an auxiliary's module or weight: `model.layers.1.mlp` may be its `model.layers.4.mlp`."""
        if not name.startswith(f"{self._prefix}."):
            return name
        number, _, rest = name.removeprefix(f"{self._prefix}.").partition(".")
        return f"{self._prefix}.{self._kept[int(number)]}" + (f".{rest}" if rest else "")

    def shared(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The auxiliary's weights among a base's, by the auxiliary's names: the same arrays, not copies."""
        names = {self.original(f"{self._prefix}.{i}"): f"{self._prefix}.{i}" for i in range(len(self._kept))}
        found = {}
        for name, array in weights.items():
            if not name.startswith(f"{self._prefix}."):
                found[name] = array
                continue
            layer, _, rest = name.removeprefix(f"{self._prefix}.").partition(".")
            if own := names.get(f"{self._prefix}.{layer}"):
                found[f"{own}.{rest}"] = array
        return found


def keep_layers(
    base: nn.Module, config: dict[str, Any], kept: Sequence[int]
) -> tuple[nn.Module, dict[str, Any]]:
    """A model made of some of a base's layers, with the base's own weights, not copies, and its config.

    Raises:
        UnsupportedModelError: the family's config does not tell its number of layers in a known way.
    """
    own = _with_layers(copy.deepcopy(config), len(base.layers), kept)
    model = build_model(own)
    if len(model.layers) != len(kept):
        raise UnsupportedModelError(f"{config['model_type']}: layers cannot be left out of this family")
    layers = KeptLayers(base, kept)
    quantized = {n: m for n, m in base.named_modules() if "scales" in m and hasattr(m, "bits")}

    def like_the_base(name: str, module: nn.Module) -> bool | dict[str, Any]:
        found = quantized.get(layers.original(name))
        return {"group_size": found.group_size, "bits": found.bits, "mode": found.mode} if found else False

    if quantized:
        nn.quantize(model, class_predicate=like_the_base)
    model.load_weights(list(layers.shared(dict(tree_flatten(base.parameters()))).items()))
    return model, own


def _with_layers(config: dict[str, Any], n_layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """The config of a model with `kept` of its `n_layers`; lists with an entry a layer are cut too."""
    for part in (config, config.get("text_config", {})):
        for name, value in part.items():
            if name in LAYER_COUNTS and value == n_layers:
                part[name] = len(kept)
            elif isinstance(value, list) and len(value) == n_layers:
                part[name] = [value[i] for i in kept]
    return config
