"""Products of tokens of a block with the ones before them, decayed by what lies between: two forms of one function.

Decays are multiplied up between the two tokens, never divided: whatever is left of a token, nothing overflows.
"""

from __future__ import annotations

import mlx.core as mx

from kvpred_mlx.scans.blocks import decays

Found = tuple[mx.array, mx.array, mx.array]


def by_token(x: mx.array, k: mx.array, g: mx.array) -> Found:
    """Sums over channels of `x` at t, `k` at s and the decays from s to t.

    Args:
        x: `[..., C, D]`.
        k: `[..., C, D]`, broadcast against `x`.
        g: decays `[..., C, 1]`, one for all channels.

    Returns:
        The sums, lower triangles `[..., C, C]`; what is left at t of what was there before the block, and at its end
        of what came at s, both like `g`.
    """
    left, since, until = decays(g[..., 0])
    return (x @ k.swapaxes(-1, -2)) * left, since[..., None], until[..., None]


def by_channel(x: mx.array, k: mx.array, g: mx.array) -> Found:
    """The same with decays `g` `[..., C, D]`, one for each channel.

    Two halves of a span meet in its middle: `x` of the second half decays from there, `k` of the first half to there,
    and one product gives all sums of the two.  Spans of one token grow two by two into the block.
    """
    sums = (x * k).sum(axis=-1)[..., None, None]
    x, k, since = (mx.expand_dims(a, -2) for a in (x, k, g))
    until = mx.ones_like(since)
    while since.shape[-3] > 1:
        (_, x2), (k1, _), (s1, s2), (u1, u2), (low, high) = map(_halves, (x, k, since, until, sums))
        corner = (x2 * s2) @ (k1 * u1).swapaxes(-1, -2)
        sums = mx.concatenate(
            [mx.concatenate([low, mx.zeros_like(corner)], -1), mx.concatenate([corner, high], -1)], -2
        )
        since = mx.concatenate([s1, s2 * s1[..., -1:, :]], -2)
        until = mx.concatenate([u1 * s2[..., -1:, :], u2], -2)
        x, k = _doubled(x), _doubled(k)
    return sums[..., 0, :, :], since[..., 0, :, :], until[..., 0, :, :]


def _halves(spans: mx.array) -> tuple[mx.array, mx.array]:
    """First and second of every two spans `[..., m, w, D]`."""
    return spans[..., ::2, :, :], spans[..., 1::2, :, :]


def _doubled(spans: mx.array) -> mx.array:
    return spans.reshape(*spans.shape[:-3], spans.shape[-3] // 2, spans.shape[-2] * 2, spans.shape[-1])
