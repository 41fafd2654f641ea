"""What the predictor reads of the auxiliary model: its keys and values, both together, or its hidden states.

The paper predicts keys from keys and values from values (`kv`).  `kv-joint` predicts each from both.  `hidden`
predicts both from what the key projection of the *next* attention layer reads, its normalized input: it is wider,
and has seen one more layer.  The last layer has no next one: its own input is read.  `hidden-joined` joins to that what
some layers before it read (`BEFORE`): two models that were not trained together tell things at different depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from kvpred_mlx.taps.kv_taps import KVTaps

SOURCES = ("kv", "kv-joint", "hidden", "hidden-joined")
DEFAULT = "hidden"  # docs/making-pairs.md has the comparison

BEFORE = (4, 12)  # by how many layers, for hidden-joined (docs/making-pairs.md)

# Of one layer, `[B, L, width]`: what keys are predicted from, and values if that is another array.
Features = tuple[mx.array, ...]


def check_source(source: str) -> None:
    """Raise ValueError if `source` is none of `SOURCES`."""
    if source not in SOURCES:
        raise ValueError(f"source {source!r}, expected one of {', '.join(SOURCES)}")


def feature_widths(source: str, auxiliary: KVTaps) -> list[tuple[int, int]]:
    """For each auxiliary KV layer, the widths of what keys and values are predicted from."""
    if source in _READS:
        widths = auxiliary.input_widths
        return [(sum(widths[r] for r in _READS[source](i, len(widths))),) * 2 for i in range(len(widths))]
    return [(sum(w),) * 2 if source == "kv-joint" else w for w in auxiliary.widths]


def layers_read(source: str, layer_map: Sequence[int], auxiliary: KVTaps) -> int:
    """How many of the auxiliary's first KV layers must be there for the layers of `layer_map`."""
    last = max(layer_map)
    return 1 + (_READS[source](last, len(auxiliary))[-1] if source in _READS else last)


def record(
    source: str, auxiliary: KVTaps, tokens: mx.array, cache: list[Any] | None = None
) -> tuple[list[Features], mx.array]:
    """Run the auxiliary over `tokens` [B, L]: the features of its KV layers, as far as it runs, and its logits."""
    if source in _READS:
        inputs, logits = auxiliary.record_inputs(tokens, cache)
        reads = (_READS[source](i, len(auxiliary)) for i in range(len(auxiliary)))
        return [
            (_side_by_side([inputs[r] for r in layers]),) for layers in reads if layers[-1] < len(inputs)
        ], logits
    kv, logits = auxiliary.record(tokens, cache)
    if source == "kv-joint":
        return [(_side_by_side(layer),) for layer in kv], logits
    return [tuple(layer) for layer in kv], logits


def _next(layer: int, n_layers: int) -> list[int]:
    """Whose input is read for a layer."""
    return [min(layer + 1, n_layers - 1)]


def _next_and_before(layer: int, n_layers: int) -> list[int]:
    [read] = _next(layer, n_layers)
    return sorted({read, *(max(read - k, 0) for k in BEFORE)})


_READS = {"hidden": _next, "hidden-joined": _next_and_before}


def _side_by_side(arrays: Sequence[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(list(arrays), axis=-1)
