"""Products of many tokens with quantized weights, by the weights in full precision.

MLX's CPU backend takes quantized weights row by row; unpacking them once and calling BLAS takes no longer than nine
rows.  Only a model's linear layers go this way: embeddings, and weights stacked by expert, are MLX's own affair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.scans.when import applies, takes


def multiply(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
    """What the layer gives for `x` [..., D], up to rounding; the product is one of float32."""
    dtype = mx.result_type(x, layer.scales)
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    whole = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **how, dtype=mx.float32)
    y = (x.astype(mx.float32) @ whole.T).astype(dtype)
    return y + layer.bias if "bias" in layer else y


def _instead_of(theirs: Callable[[nn.QuantizedLinear, mx.array], mx.array]) -> Callable[..., mx.array]:
    @functools.wraps(theirs)
    def __call__(self: nn.QuantizedLinear, x: mx.array) -> mx.array:
        return multiply(self, x) if applies(x.size // x.shape[-1]) else theirs(self, x)

    return __call__


if takes(nn.QuantizedLinear.__call__, "self x"):
    nn.QuantizedLinear.__call__ = _instead_of(nn.QuantizedLinear.__call__)  # type: ignore[method-assign]
