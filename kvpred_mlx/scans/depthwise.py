"""Depthwise convolutions as shifted products: the sum over a kernel's few taps of the sequence moved by one.

MLX's CPU backend has no form of its own for a convolution of every channel by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.scans.when import applies, takes

MOST_TAPS = 8


def convolve(x: mx.array, weight: mx.array) -> mx.array:
    """What `mx.conv1d(x, weight, groups=channels)` gives, up to rounding; computed in float32.

    Args:
        x: `[B, T, channels]`.
        weight: `[channels, taps, 1]`.

    Returns:
        `[B, T - taps + 1, channels]`.
    """
    taps = weight.shape[1]
    tokens, dtype = x.shape[1] - taps + 1, mx.result_type(x, weight)
    x, by_tap = x.astype(mx.float32), weight[..., 0].astype(mx.float32)
    found = x[:, :tokens] * by_tap[:, 0]
    for i in range(1, taps):
        found = found + x[:, i : i + tokens] * by_tap[:, i]
    return found.astype(dtype)


def _is_for_us(conv: nn.Conv1d, x: mx.array) -> bool:
    channels, taps, each = conv.weight.shape
    plain = (conv.stride, conv.padding, conv.dilation) == (1, 0, 1)
    depthwise = each == 1 and conv.groups == channels == x.shape[-1]
    return plain and depthwise and taps <= MOST_TAPS and x.ndim == 3 and applies(x.shape[1] - taps + 1)


def _instead_of(theirs: Callable[[nn.Conv1d, mx.array], mx.array]) -> Callable[..., mx.array]:
    @functools.wraps(theirs)
    def __call__(self: nn.Conv1d, x: mx.array) -> mx.array:
        if not _is_for_us(self, x):
            return theirs(self, x)
        y = convolve(x, self.weight)
        return y + self.bias if "bias" in self else y

    return __call__


if takes(nn.Conv1d.__call__, "self x"):
    nn.Conv1d.__call__ = _instead_of(nn.Conv1d.__call__)  # type: ignore[method-assign]
