"""MLX's random state after a failure: it may hang on an array that can no longer be computed."""

from __future__ import annotations

import time

import mlx.core as mx


def mend_random_state() -> None:
    """Begin random numbers anew if the state cannot be computed: every later sample would fail with it."""
    try:
        mx.eval(mx.random.state)
    except Exception:  # noqa: BLE001 - whatever stopped the computation
        mx.random.seed(time.time_ns())
