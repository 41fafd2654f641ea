"""Jamba's state space (Mamba 1) on short pieces of a sequence: mlx-lm's own code, one piece after the other.

Its loop writes each token's state into the whole sequence of them, which the CPU backend copies for each such write: a
minute for 512 tokens of one layer of width 1024, a second or two in pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.jamba import JambaMambaMixer

from kvpred_mlx.scans.when import applies, takes

PIECE_TOKENS = 8


def _instead_of(theirs: Callable[..., tuple[mx.array, mx.array]]) -> Callable[..., tuple[mx.array, mx.array]]:
    @functools.wraps(theirs)
    def ssm_step(
        self: JambaMambaMixer, x: mx.array, A: mx.array, state: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        if not applies(x.shape[1]):
            return theirs(self, x, A, state)
        outputs = []
        for start in range(0, x.shape[1], PIECE_TOKENS):
            y, state = theirs(self, x[:, start : start + PIECE_TOKENS], A, state)
            outputs.append(y)
        assert state is not None
        return mx.concatenate(outputs, axis=1), state

    return ssm_step


if takes(getattr(JambaMambaMixer, "ssm_step", None), "self x A state"):
    JambaMambaMixer.ssm_step = _instead_of(JambaMambaMixer.ssm_step)  # type: ignore[method-assign]
