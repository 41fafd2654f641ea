"""The learned linear maps from the auxiliary's keys and values to the base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.pair.sources import check_source
from kvpred_mlx.taps.kv import KV

Widths = Sequence[tuple[int, int]]
Map = tuple[mx.array, mx.array]


class Predictor(nn.Module):
    r"""Predicts raw base keys and values from what is read of the auxiliary (paper, section 3.1).

    With the layer map :math:`m`, for every base KV layer :math:`i`, from the auxiliary's keys and values

    .. math::
        K_i = K^{aux}_{m_i} {W^k_i}^\top + b^k_i, \qquad V_i = V^{aux}_{m_i} {W^v_i}^\top + b^v_i

    Other sources put other features in the place of :math:`K^{aux}` and :math:`V^{aux}` (`kvpred_mlx.pair.sources`).

    The maps that read the same auxiliary layer are stacked, in base layer order, into one `nn.Linear`:
    `key_maps[s]` and `value_maps[s]` belong to the auxiliary layer `auxiliary_layers[s]`.

    Args:
        layer_map: for each base KV layer the auxiliary KV layer that it is predicted from.
        auxiliary_widths: for each auxiliary KV layer, the widths of what keys and values are predicted from
            (`kvpred_mlx.pair.sources.feature_widths`).
        base_widths: (key width, value width) of each base KV layer.
        source: what is read of the auxiliary, one of `kvpred_mlx.pair.sources.SOURCES`.

    Raises:
        ValueError: if there is no such source, the map's length is not the base's number of KV layers, an entry is not
            an auxiliary layer, or values would be predicted from a layer that has none.
    """

    def __init__(
        self, layer_map: Sequence[int], auxiliary_widths: Widths, base_widths: Widths, source: str = "kv"
    ):
        super().__init__()
        check_source(source)
        _check(layer_map, auxiliary_widths, base_widths)
        self.layer_map, self.source = tuple(layer_map), source
        self.auxiliary_widths = tuple(map(tuple, auxiliary_widths))
        self.base_widths = tuple(map(tuple, base_widths))
        self.key_maps = [self._stacked(layer, 0) for layer in self.auxiliary_layers]
        self.value_maps = [self._stacked(layer, 1) for layer in self.auxiliary_layers]

    def __call__(
        self, auxiliary: Sequence[Sequence[mx.array]], tails: Sequence[int | None] | None = None
    ) -> list[KV]:
        """Features of each auxiliary layer, `[B, L, width]`, to raw base KV of each layer, `[B, L, width]`.

        Args:
            tails: for each base layer, how many of the last values are asked for, `[B, tail, width]` (None: all).
        """
        predicted: dict[int, KV] = {}
        for layer, to_keys, to_values in zip(
            self.auxiliary_layers, self.key_maps, self.value_maps, strict=True
        ):
            readers, features = self.readers(layer), auxiliary[layer]
            keys = _split(to_keys(features[0]), [self.base_widths[i][0] for i in readers])
            values = self._values(
                to_values, features[-1], [(i, tails[i] if tails else None) for i in readers]
            )
            predicted |= {i: KV(k, v) for i, k, v in zip(readers, keys, values, strict=True)}
        return [predicted[i] for i in range(len(self.layer_map))]

    def _values(self, maps: nn.Module, x: mx.array, readers: list[tuple[int, int | None]]) -> list[mx.array]:
        """The readers' values; a product of its own for neighbours with the same number of rows.

        MLX would compute all rows of a product and then drop them.
        """
        values, start = list[mx.array](), 0
        runs = [(tail, [i for i, _ in run]) for tail, run in groupby(readers, key=lambda reader: reader[1])]
        for tail, run in runs:
            widths = [self.base_widths[i][1] for i in run]
            rows = x if tail is None else x[:, -tail:]
            part = maps if len(runs) == 1 else _columns(maps, start, start + sum(widths))
            values += _split(part(rows), widths)
            start += sum(widths)
        return values

    @property
    def auxiliary_layers(self) -> list[int]:
        """The auxiliary layers that are read, ascending."""
        return sorted(set(self.layer_map))

    def readers(self, layer: int) -> list[int]:
        """The base layers that are predicted from auxiliary layer `layer`, ascending."""
        return [i for i, m in enumerate(self.layer_map) if m == layer]

    def load_maps(self, keys: Sequence[Map], values: Sequence[Map]) -> None:
        """Set the maps of all base layers; each is a weight [base width, auxiliary width] and a bias."""
        for stacks, maps in ((self.key_maps, keys), (self.value_maps, values)):
            for layer, stack in zip(self.auxiliary_layers, stacks, strict=True):
                if isinstance(stack, nn.Linear):
                    weights, biases = zip(*(maps[i] for i in self.readers(layer)), strict=True)
                    stack.weight, stack.bias = mx.concatenate(list(weights)), mx.concatenate(list(biases))

    def _stacked(self, layer: int, part: int) -> nn.Module:
        width = sum(self.base_widths[i][part] for i in self.readers(layer))
        return nn.Linear(self.auxiliary_widths[layer][part], width) if width else _NoColumns()

    def _extra_repr(self) -> str:
        return f"layer_map={list(self.layer_map)}, source={self.source}"


class FirstLayersPredictor(nn.Module):
    """Predicts the base's later layers from what one of its own earlier layers reads.

    For each depth k one `Predictor`, `first_k`: from what the projections of KV layer k read, `[B, L, D]`, to raw keys
    and values of the layers k + 1, k + 2, ...  Layers up to k need none: the base computes them itself.

    Args:
        depths: how many layers are run, ascending; the deepest is what a pair uses unless its dial says otherwise.
        input_widths, base_widths: of the base (`KVTaps.input_widths`, `KVTaps.widths`).

    Raises:
        ValueError: a depth leaves no layer to predict, or the depths do not ascend.
    """

    source = "first-layers"

    def __init__(self, depths: Sequence[int], input_widths: Sequence[int], base_widths: Widths):
        super().__init__()
        n = len(base_widths)
        bad = [k for k in depths if type(k) is not int or not 0 < k < n - 1]
        if bad or not depths or sorted(set(depths)) != list(depths):
            raise ValueError(f"first layers {list(depths)}, expected ascending numbers from 1 to {n - 2}")
        self.depths, self.base_widths = tuple(depths), tuple(map(tuple, base_widths))
        self.auxiliary_widths = tuple((width, width) for width in input_widths)
        for k in depths:
            self[f"first_{k}"] = Predictor(
                [0] * (n - k - 1), [(input_widths[k],) * 2], base_widths[k + 1 :], "hidden"
            )

    @property
    def layer_map(self) -> tuple[int, ...]:
        """For each base KV layer the one that it is predicted from at the greatest depth; itself, if it is exact."""
        return tuple(min(i, self.depths[-1]) for i in range(len(self.base_widths)))

    def at(self, depth: int) -> Predictor:
        """The maps of a depth; they take `[(x,)]` with x `[B, L, D]`."""
        return self[f"first_{depth}"]

    def behind(self, depth: int, tails: Sequence[int | None] | None = None) -> Callable[[mx.array], list[KV]]:
        """From what KV layer `depth` reads, `[B, L, D]`, to raw keys and values of the layers behind it.

        Args:
            tails: of all base layers (`Predictor`).
        """
        maps = self.at(depth)
        return lambda x: maps([(x,)], tails and tails[depth + 1 :])

    def check_depth(self, depth: int) -> None:
        """Raise ValueError if there are no maps for a depth."""
        if depth not in self.depths:
            known = ", ".join(map(str, self.depths))
            raise ValueError(f"depth {depth}, expected one of the pair's: {known}")


class _NoColumns(nn.Module):
    """The map to zero columns: latent-attention layers have keys only."""

    def __call__(self, x: mx.array) -> mx.array:
        return x[..., :0]


def _columns(maps: nn.Module, start: int, stop: int) -> nn.Module:
    """The maps to some of the columns; their weights are views."""
    if isinstance(maps, _NoColumns):
        return maps
    part = type(maps).__new__(type(maps))
    part.__dict__.update(maps.__dict__)
    dict.update(part, {name: array[start:stop] for name, array in maps.items()})
    return part


def _split(stacked: mx.array, widths: list[int]) -> Sequence[mx.array]:
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    parts: Any = mx.split(stacked, ends, axis=-1)
    return parts


def _check(layer_map: Sequence[int], auxiliary_widths: Widths, base_widths: Widths) -> None:
    n_base, n_auxiliary = len(base_widths), len(auxiliary_widths)
    if len(layer_map) != n_base:
        raise ValueError(
            f"layer map has {len(layer_map)} entries, expected {n_base}, one for each base layer"
        )
    bad = {i: m for i, m in enumerate(layer_map) if type(m) is not int or not 0 <= m < n_auxiliary}
    if bad:
        raise ValueError(
            f"layer map entries {bad} (base layer: entry) are not auxiliary layers 0 to {n_auxiliary - 1}"
        )
    empty = [
        i
        for i, m in enumerate(layer_map)
        if any(b and not a for a, b in zip(auxiliary_widths[m], base_widths[i], strict=True))
    ]
    if empty:
        raise ValueError(
            f"base layers {empty} are mapped to auxiliary layers that have no values of their own"
        )
