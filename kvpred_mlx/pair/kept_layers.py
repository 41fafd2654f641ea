"""An auxiliary that is some of the base's layers with the base's own weights (paper, KVP-LP): kept once."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn


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
