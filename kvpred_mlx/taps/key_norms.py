"""A model's keys after its own key norm and before RoPE, where CoreNet's loss compares them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kvpred_mlx.taps.checkpointing import Norms
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps


class KeyNorms:
    """Brings what the taps recorded of key norms into one shape; keys of layers without a norm stay raw.

    Args:
        taps: of the model.
    """

    def __init__(self, taps: KVTaps):
        self._places = taps.norm_places()
        self._axes = [1] * len(taps)
        self._axes = self._length_axes(taps)

    def normed(self, kv: Sequence[KV], norms: Norms) -> list[mx.array]:
        """Each KV layer's keys after its key norm, `[B, L, ...]`.

        Args:
            kv: raw keys and values of a forward call.
            norms: what `KVTaps.record` or `KVTaps.inject` put there.
        """
        found = zip(self._places, self._axes, kv, strict=True)
        return [mx.moveaxis(norms[p], axis, 1) if p in norms else layer.keys for p, axis, layer in found]

    def _length_axes(self, taps: KVTaps) -> list[int]:
        """Which axis of each layer's normed keys counts the tokens: the one that changes with their number."""
        shapes = []
        for n in (2, 3):
            norms: Norms = {}
            kv, _ = taps.record(mx.zeros((1, n), mx.int32), norms=norms)
            shapes.append([keys.shape for keys in self.normed(kv, norms)])
        layers = zip(*shapes, strict=True)
        return [next(i for i, (a, b) in enumerate(zip(*layer, strict=True)) if a != b) for layer in layers]
