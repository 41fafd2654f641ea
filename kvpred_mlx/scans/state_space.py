"""State spaces of Mamba 2's kind in blocks: short ones, and the state through one matrix product for all heads.

mlx-lm's `ssm_attn` has blocks too, of 256 tokens, whose squares cost most of its time, and multiplies the state by each
token's C by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models import ssm

from kvpred_mlx.scans.blocks import cut, decays, joined, size_for
from kvpred_mlx.scans.when import applies, takes

BLOCK_TOKENS = 64


def scan(
    x: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What mlx-lm's `ssm_attn` gives, up to rounding; computed in float32.

    Args:
        x: `[B, T, H, Dh]`.
        A_log, D, dt_bias: `[H]`.
        B, C: `[B, T, G, Ds]`, of groups of H / G heads.
        dt: `[B, T, H]`.
        state: `[B, H, Dh, Ds]` (default: zeros).
        time_step_limit: of the time steps that `dt` gives.
        mask: `[B, T]`, true for the tokens that count; the others leave the state as it is.

    Returns:
        Outputs `[B, T, H, Dh]` in x's type, and the state after the last token.
    """
    batch, tokens, heads, width = x.shape
    groups, per_group = B.shape[2], heads // B.shape[2]
    steps = ssm.compute_dt(dt, dt_bias, time_step_limit)
    g, fed = mx.exp(-mx.exp(A_log.astype(steps.dtype)) * steps), steps[..., None] * x
    if mask is not None:
        seen = mask.astype(mx.bool_)[..., None]
        g, fed = mx.where(seen, g, 1), mx.where(seen[..., None], fed, 0)
        B = mx.where(seen[..., None], B, 0)
    size = size_for(tokens, BLOCK_TOKENS)
    g, fed, keys, asked = cut(g, size, fill=1.0), cut(fed, size), cut(B, size), cut(C, size)

    def by_group(a: mx.array) -> mx.array:  # [B, H, ...] as [B, G, heads of a group, ...]
        return a.reshape(batch, groups, per_group, *a.shape[2:])

    left, since, until = decays(g)
    within = (asked @ keys.swapaxes(-1, -2))[:, :, None] * by_group(left)
    added = keys.swapaxes(-1, -2) @ _side_by_side(by_group(fed * until[..., None]))
    after = mx.repeat(by_group(since[..., -1]), width, 2).swapaxes(2, 3)[..., None, :]
    now = mx.zeros((batch, groups, B.shape[-1], per_group * width))
    if state is not None:
        now = state.astype(mx.float32).reshape(batch, groups, per_group * width, -1).swapaxes(-1, -2)
    before = []
    for i in range(after.shape[2]):
        before.append(now)
        now = now * after[:, :, i] + added[:, :, i]
    of_state = (asked @ mx.stack(before, 2)).reshape(*asked.shape[:-1], per_group, width)
    y = (within @ by_group(fed)).reshape(fed.shape)
    y = y + of_state.transpose(0, 1, 4, 2, 3, 5).reshape(fed.shape) * since[..., None]
    y = joined(y, tokens).astype(x.dtype) + x * D.reshape(1, 1, heads, 1)
    return y, now.swapaxes(-1, -2).reshape(batch, heads, width, -1)


def _side_by_side(x: mx.array) -> mx.array:
    """`[B, G, heads, n, C, D]` as `[B, G, n, C, heads * D]`."""
    return x.transpose(0, 1, 3, 4, 2, 5).flatten(-2)


def _instead_of(theirs: Callable[..., tuple[mx.array, mx.array]]) -> Callable[..., tuple[mx.array, mx.array]]:
    @functools.wraps(theirs)
    def ssm_attn(
        x: mx.array,
        A_log: mx.array,
        B: mx.array,
        C: mx.array,
        D: mx.array,
        dt: mx.array,
        dt_bias: mx.array,
        state: mx.array | None = None,
        time_step_limit: tuple[float, float] = (0.001, 100.0),
        mask: mx.array | None = None,
        lengths: mx.array | None = None,
        step: int = 256,
    ) -> tuple[mx.array, mx.array]:
        # mlx-lm's lengths come with the mask that they give, which says it all.
        if applies(x.shape[1]) and (lengths is None or mask is not None):
            return scan(x, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask)
        return theirs(x, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask, lengths, step)

    return ssm_attn


# `ssm_update`, which the models import, looks this name up whenever it does not use its Metal kernel.
if takes(getattr(ssm, "ssm_attn", None), "x A_log B C D dt dt_bias state time_step_limit mask lengths step"):
    ssm.ssm_attn = _instead_of(ssm.ssm_attn)
