"""Which columns of which projection's output make what a layer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from kvpred_mlx.taps.checkpointing import Call
from kvpred_mlx.taps.fused import FusedColumns
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.running import Runner


@dataclass(frozen=True)
class Place:
    """One call of a projection whose output reaches its layer's cache.

    Args:
        call: of which site.
        columns: which output columns are keys, values, or neither.
        name: the projection's, inside the layer.
    """

    call: Call
    columns: FusedColumns
    name: str

    @classmethod
    def keys(cls, call: Call, width: int, name: str) -> Place:
        """A projection that makes keys and nothing else."""
        return cls(call, FusedColumns(list(range(width)), [], []), name)

    @classmethod
    def values(cls, call: Call, width: int, name: str) -> Place:
        """A projection that makes values and nothing else."""
        return cls(call, FusedColumns([], list(range(width)), []), name)

    @property
    def widths(self) -> tuple[int, int]:
        """How many of its columns are keys, and how many values."""
        return len(self.columns.keys), len(self.columns.values)

    @property
    def plain(self) -> bool:
        """Whether all columns are keys, or all are values, in their order."""
        columns = self.columns
        return not columns.rest and not (columns.keys and columns.values)

    def take(self, output: mx.array) -> KV:
        """Its keys and values in a projection's output [B, L, width]."""
        return self.columns.split(output)

    def give(
        self, kv: KV, length: int, rest: mx.array | None = None, noise: mx.array | None = None
    ) -> mx.array:
        """An output [B, length, width] with these keys and values.

        Args:
            kv: values may be those of the last rows only, where no others matter (`KVTaps.tails`).
            rest: what the other columns are [B, length, rest width]; anything finite if None.
            noise: a random key; then it is random numbers.
        """
        keys, values = kv
        if missing := length - values.shape[1]:
            shape = (values.shape[0], missing, values.shape[2])
            before = mx.zeros(shape) if noise is None else mx.random.normal(shape, key=noise)
            values = mx.concatenate([before.astype(values.dtype), values], axis=1)
        if self.plain:
            return keys if self.columns.keys else values
        if rest is None and noise is not None:
            shape = (keys.shape[0], length, len(self.columns.rest))
            rest = mx.random.normal(shape, key=noise).astype(keys.dtype)
        kv = KV(keys, values)
        return self.columns.pad(kv) if rest is None else self.columns.join(rest, kv)


def join(parts: Sequence[KV]) -> KV:
    """A layer's keys and values, those of its places side by side."""
    keys, values = ([a for a in kind if a.shape[-1]] or [kind[0]] for kind in zip(*parts, strict=True))
    return KV(*(a[0] if len(a) == 1 else mx.concatenate(a, axis=-1) for a in (keys, values)))


def divide(kv: KV, places: Sequence[Place]) -> list[KV]:
    """Each place's part of its layer's keys and values."""
    parts, key, value = [], 0, 0
    for place in places:
        keys, values = place.widths
        parts.append(KV(kv.keys[..., key : key + keys], kv.values[..., value : value + values]))
        key, value = key + keys, value + values
    return parts


@dataclass(frozen=True)
class Structure:
    """All that a model keeps, and where it is made.

    Args:
        runner: taps the sites that `layers` tell of.
        layers: the places of every KV layer, in the order of their calls.
        input_widths: of what each layer's first place reads.
        tails: how many of the last rows of a layer's values matter (None: all).
        vocabulary: how many tokens there are.
        proved_by: the cache entries that a proof looks at (None: all); the others are built alike.
    """

    runner: Runner
    layers: list[list[Place]]
    input_widths: list[int]
    tails: list[int | None]
    vocabulary: int
    proved_by: set[int] | None = None
