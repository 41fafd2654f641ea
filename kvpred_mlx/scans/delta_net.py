"""Gated delta nets in blocks (the WY form): matrix products within a block, one step of the state for each block.

With keys k, values v, decays g and rates b of a block, and the state S before it, the delta rule
`S <- g S + k (b (v - k g S))` is `S <- gS + sum of k d`, where the `d` of all its tokens solve one triangular system:
`(I + A) d = b v - b k g S`, A the decayed products of `b k` and k below the diagonal (Yang et al., 2024,
arXiv 2406.06484 and 2412.06464; decays for each channel as in Kimi Linear, arXiv 2510.26692).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import gated_delta

from kvpred_mlx.scans.blocks import cut, inverse, joined, size_for
from kvpred_mlx.scans.decayed_products import by_channel, by_token
from kvpred_mlx.scans.when import applies, takes

BLOCK_TOKENS = 32  # 64 takes a quarter longer at 16 heads of 128, 16 an eighth


def scan(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What mlx-lm's `gated_delta_ops` gives, up to rounding; computed in float32.

    Args:
        q, k: `[B, T, Hk, Dk]`.
        v: `[B, T, Hv, Dv]`.
        g: decays `[B, T, Hv]`, or `[B, T, Hv, Dk]` for each channel.
        beta: `[B, T, Hv]`.
        state: `[B, Hv, Dv, Dk]` (default: zeros).
        mask: `[B, T]`, true for the tokens that count.  The outputs of others are 0, as of mlx-lm's Metal kernel.

    Returns:
        Outputs `[B, T, Hv, Dv]` in q's type, and the state after the last token.
    """
    tokens, dtype, repeats = q.shape[1], q.dtype, v.shape[2] // q.shape[2]
    if mask is not None:
        seen = mask[..., None]
        q, k, v = (mx.where(seen[..., None], x, 0) for x in (q, k, v))
        beta, g = mx.where(seen, beta, 0), mx.where(seen if g.ndim == 3 else seen[..., None], g, 1)
    if repeats > 1:
        q, k = mx.repeat(q, repeats, 2), mx.repeat(k, repeats, 2)
    size = size_for(tokens, BLOCK_TOKENS)
    q, k, v, beta = (cut(x, size) for x in (q, k, v, beta[..., None]))
    products = by_channel if g.ndim == 4 else by_token
    g = cut(g if g.ndim == 4 else g[..., None], size, fill=1.0)

    # Two calls, for who asks for the state alone never evaluates the second.
    (mixed, since, until), (reach, _, _) = products(k * beta, k, g), products(q, k, g)
    solved = inverse(mx.tril(mixed, -1))
    own, of_state = solved @ (v * beta), solved @ (k * beta * since)
    asked, kept = q * since, (k * until).swapaxes(-1, -2)
    after = since[..., -1, :, None]
    now = mx.zeros((*after.shape[:2], k.shape[-1], v.shape[-1])) if state is None else state.swapaxes(-1, -2)
    outputs = []
    for i in range(q.shape[2]):
        change = own[:, :, i] - of_state[:, :, i] @ now
        outputs.append(asked[:, :, i] @ now + reach[:, :, i] @ change)
        now = now * after[:, :, i] + kept[:, :, i] @ change
    return joined(mx.stack(outputs, 2), tokens).astype(dtype), now.swapaxes(-1, -2)


def _instead_of(theirs: Callable[..., tuple[mx.array, mx.array]]) -> Callable[..., tuple[mx.array, mx.array]]:
    @functools.wraps(theirs)
    def gated_delta_ops(q: mx.array, *args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
        return (scan if applies(q.shape[1]) else theirs)(q, *args, **kwargs)

    return gated_delta_ops


# `gated_delta_update`, which the models import, looks this name up whenever it does not use its Metal kernels.
if takes(getattr(gated_delta, "gated_delta_ops", None), "q k v g beta state mask"):
    gated_delta.gated_delta_ops = _instead_of(gated_delta.gated_delta_ops)
