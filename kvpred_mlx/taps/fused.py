"""Projections that make queries, keys and values at once: where keys and values lie among their columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from kvpred_mlx.taps.kv import KV

Index = slice | mx.array


@dataclass(frozen=True)
class FusedColumns:
    """Where keys and values lie among the output columns of a fused projection."""

    keys: list[int]
    values: list[int]
    rest: list[int]

    @classmethod
    def of(cls, is_key: list[bool], is_value: list[bool]) -> FusedColumns:
        # Columns that reach both (a latent that is expanded later) are counted as keys.
        columns = range(len(is_key))
        return cls(
            [c for c in columns if is_key[c]],
            [c for c in columns if is_value[c] and not is_key[c]],
            [c for c in columns if not is_key[c] and not is_value[c]],
        )

    def split(self, output: mx.array) -> KV:
        return KV(_take(output, self._key_index), _take(output, self._value_index))

    def take_rest(self, output: mx.array) -> mx.array:
        return _take(output, self._rest_index)

    def join(self, rest: mx.array, kv: KV) -> mx.array:
        return _take(mx.concatenate([rest, kv.keys, kv.values], axis=-1), self._order)

    def pad(self, kv: KV) -> mx.array:
        """The projection's output with arbitrary finite numbers where the rest stands.

        Nothing is written there if the rest comes first, as queries do: rows overlap, and each has keys and
        values of the rows before it in those columns.
        """
        rest, width, (b, n, key_width) = len(self.rest), len(self.keys) + len(self.values), kv.keys.shape
        if not rest or not isinstance(self._order, slice):
            zeros = mx.broadcast_to(mx.array(0, kv.keys.dtype), (b, n, rest))
            return self.join(zeros, kv)
        before = -(-rest // width)  # rows for the first one to overlap with
        rows = mx.zeros((before + b * n, width), kv.keys.dtype)
        rows[before:, :key_width] = kv.keys.reshape(b * n, key_width)
        rows[before:, key_width:] = kv.values.reshape(b * n, width - key_width)
        return mx.as_strided(rows, (b, n, rest + width), (n * width, width, 1), before * width - rest)

    # Computed once: comparing lists of columns takes as long as building the rest of the graph.

    @cached_property
    def _key_index(self) -> Index:
        return _index(self.keys)

    @cached_property
    def _value_index(self) -> Index:
        return _index(self.values)

    @cached_property
    def _rest_index(self) -> Index:
        return _index(self.rest)

    @cached_property
    def _order(self) -> Index:
        columns = [*self.rest, *self.keys, *self.values]
        return _index(sorted(range(len(columns)), key=columns.__getitem__))


def _index(columns: list[int]) -> Index:
    if not columns:
        return slice(0)
    run = slice(columns[0], columns[-1] + 1)  # a slice copies nothing
    return run if columns == list(range(run.start, run.stop)) else mx.array(columns)


def _take(array: mx.array, index: Index) -> mx.array:
    return array[..., index] if isinstance(index, slice) else mx.take(array, index, axis=-1)
