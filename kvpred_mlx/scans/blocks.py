"""What the scans have in common: sequences cut in blocks, and how much of a token is left later in its block.

In shapes `n` is the number of blocks, `C` of tokens in each, a power of two.
"""

from __future__ import annotations

import mlx.core as mx

TINY = 1e-37  # not zero: the gradient of a product of decays divides by each of them


def size_for(tokens: int, most: int) -> int:
    """Tokens of a block: `most`, or for fewer tokens the smallest power of two that holds them."""
    return min(most, 1 << (tokens - 1).bit_length())


def cut(x: mx.array, size: int, fill: float = 0.0) -> mx.array:
    """`x` [B, T, H, ...] as float32 blocks [B, H, n, C, ...]; the last one is filled up with `fill`."""
    batch, tokens, heads, *rest = x.shape
    x = x.astype(mx.float32)
    if missing := -tokens % size:
        x = mx.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return x.reshape(batch, -1, size, heads, *rest).transpose(0, 3, 1, 2, *range(4, x.ndim + 1))


def joined(x: mx.array, tokens: int) -> mx.array:
    """The first `tokens` of blocks [B, H, n, C, ...] as [B, T, H, ...]."""
    batch, heads, count, size, *rest = x.shape
    x = x.transpose(0, 2, 3, 1, *range(4, x.ndim)).reshape(batch, count * size, heads, *rest)
    return x[:, :tokens]


def decays(g: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """What decays `g` [..., C] leave: at t of what came at s (lower triangle, [..., C, C]), at t of what was there
    before the block [..., C], and at the block's end of what came at s [..., C].
    """
    later = mx.tri(g.shape[-1], k=-1, dtype=mx.bool_)
    left = mx.tril(mx.cumprod(mx.where(later, mx.maximum(g, TINY)[..., None], 1.0), axis=-2))
    return left, left[..., 0] * g[..., :1], left[..., -1, :]


def inverse(a: mx.array) -> mx.array:
    """The inverse of I + a, for strictly lower triangular `a` [..., C, C].

    Blocks on the diagonal are inverted two by two into blocks of twice the size.  (A series of powers of `a` would take
    as many products, but cancels: powers grow like binomials where keys repeat.)
    """
    at = mx.arange(a.shape[-1])
    found, width = mx.eye(a.shape[-1]), 1
    while width < a.shape[-1]:
        block = at // width
        corners = mx.where((block[:, None] == block + 1) & (block % 2 == 0), a, 0.0)
        found = found - (corners if width == 1 else found @ corners @ found)
        width *= 2
    return found
