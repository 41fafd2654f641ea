"""Low-rank adapters on the layers that read a prompt, trained together with the maps behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from kvpred_mlx.making.recording import Batch
from kvpred_mlx.taps.kv_taps import KVTaps

SCALE = 2.0
LINEAR: Any = (nn.Linear, nn.QuantizedLinear)


class Adapted(nn.Module):
    """First layers with adapters (LoRA, arXiv 2106.09685) on what is linear in them, and the maps behind.

    The base itself has none: its decoding, and what it is compared with, stay as they are.  Keys and values of the
    layers that read are those of the adapted ones, so a prompt is read once, as without adapters.

    Args:
        model: the base; its weights are shared, and frozen here.
        depth: how many layers read.
        maps: of what layer `depth` reads, under that name, to the keys and values behind it.
        rank: of the adapters.
    """

    def __init__(self, model: nn.Module, depth: int, maps: Callable[[Batch], mx.array], rank: int):
        super().__init__()
        weights: Any = tree_flatten(model.parameters())
        shared = {id(array): array for _, array in weights}
        self.reader, self.maps, self._depth = copy.deepcopy(model, shared), maps, depth
        self.reader.freeze()
        layers: Any = self.reader.layers
        for layer in layers[:depth]:
            linear = [(name, module) for name, module in layer.named_modules() if isinstance(module, LINEAR)]
            adapted = [(name, LoRALinear.from_base(module, r=rank, scale=SCALE)) for name, module in linear]
            layer.update_modules(tree_unflatten(adapted))
            for _, module in adapted:
                module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        self._taps = KVTaps(self.reader)

    def __call__(self, batch: Batch) -> mx.array:
        """Keys and values of all layers, side by side, `[B, P - 1, width]`."""
        inputs = list[mx.array]()
        # Lazy: no layer behind `depth` is computed.
        read, _ = self._taps.record(batch["prompts"][:, :-1], inputs=inputs)
        own = [array for kv in read[: self._depth + 1] for array in kv]
        return mx.concatenate([*own, self.maps({f"layer_{self._depth}": inputs[self._depth]})], axis=-1)
