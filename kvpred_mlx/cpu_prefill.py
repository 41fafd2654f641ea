"""How a prompt is read on MLX's CPU backend: in pieces, on several streams.

That backend computes attention over the full square of a causal mask and runs everything but matrix products
on one thread, exponentials slowly.  Cutting the prompt in pieces saves nearly half of the square; reading
the pieces as a wavefront, each on a stream of its own with one BLAS thread, keeps all cores busy.
docs/benchmarking.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil

import mlx.core as mx

from kvpred_mlx import _blas
from kvpred_mlx.sites import KV

PIECE_TOKENS = 128
MIN_PIECE_TOKENS = 48
MAX_STREAMS = 4  # a wavefront of more would wait for itself: each piece needs the one before

_streams = [mx.new_thread_local_stream(mx.cpu) for _ in range(MAX_STREAMS)]


def read(record: Callable[[mx.array], Sequence[KV]], tokens: mx.array) -> list[KV]:
    """Raw keys and values of `tokens` [B, L], read piece by piece where that is faster.

    Args:
        record: raw keys and values of a piece [B, l], whose cache is that of the piece before.
    """
    n_streams = _parallel()
    ends = cuts(tokens.shape[1], n_streams)
    if len(ends) < 2:
        return list(record(tokens))
    pieces = []
    for i, (start, end) in enumerate(pairwise([0, *ends])):
        with mx.stream(_streams[i % n_streams] if n_streams > 1 else mx.default_stream(mx.cpu)):
            pieces.append(record(tokens[:, start:end]))
    whole = [
        KV(*(mx.concatenate(list(parts), axis=1) for parts in zip(*layer, strict=True)))
        for layer in zip(*pieces, strict=True)
    ]
    if n_streams > 1:
        with _blas.one_thread():
            mx.eval(whole)
    return whole


def cuts(tokens: int, n_streams: int) -> list[int]:
    """Where the pieces of a prompt end: of about equal length, as many for one stream as for another."""
    if mx.default_device() != mx.Device(mx.cpu) or tokens < 2 * MIN_PIECE_TOKENS:
        return [tokens]
    count = n_streams * ceil(tokens / (PIECE_TOKENS * n_streams))
    return [tokens * (i + 1) // count for i in range(count)]


def _parallel() -> int:
    threads = _blas.threads() or 1
    return threads if threads <= MAX_STREAMS else 1
