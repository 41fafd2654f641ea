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
from kvpred_mlx.pair.sources import Features
from kvpred_mlx.scans.when import on_cpu

PIECE_TOKENS = 128
MIN_PIECE_TOKENS = 48
MAX_STREAMS = 4  # a wavefront of more would wait for itself: each piece needs the one before

_streams = [mx.new_thread_local_stream(mx.cpu) for _ in range(MAX_STREAMS)]


def default_streams() -> list[mx.ThreadLocalStream]:
    """The streams to read a prompt on; none where one does it."""
    threads = _blas.threads() or 1
    return _streams[:threads] if on_cpu() and 1 < threads <= MAX_STREAMS else []


def read(
    record: Callable[[mx.array], Sequence[Features]],
    tokens: mx.array,
    streams: Sequence[mx.ThreadLocalStream] | None = None,
) -> list[Features]:
    """What `record` gives of `tokens` [B, L], read piece by piece where that is faster.

    Args:
        record: features of a piece's layers, `[B, l, width]` each; its cache is that of the piece before.
        streams: what to read on, in turn (default: `default_streams`; none: the current one, lazily).
    """
    spread = default_streams() if streams is None else streams
    ends = cuts(tokens.shape[1], len(spread) or 1)
    if len(ends) < 2:
        return list(record(tokens))
    pieces = []
    for i, (start, end) in enumerate(pairwise([0, *ends])):
        with mx.stream(spread[i % len(spread)] if spread else mx.default_stream(mx.cpu)):
            pieces.append(record(tokens[:, start:end]))
    whole = [
        tuple(mx.concatenate(list(parts), axis=1) for parts in zip(*layer, strict=True))
        for layer in zip(*pieces, strict=True)
    ]
    if spread:
        _evaluate(whole)
    return whole


def _evaluate(arrays: list[Features]) -> None:
    """Now, because the number of BLAS threads cannot be part of a lazy graph."""
    with _blas.one_thread():
        try:
            mx.eval(arrays)
        except ValueError as error:  # inside mx.compile or a gradient there are no values yet
            if "transformations" not in str(error):
                raise


def cuts(tokens: int, n_streams: int) -> list[int]:
    """Where the pieces of a prompt end: of about equal length, as many for one stream as for another."""
    if not on_cpu() or tokens < 2 * MIN_PIECE_TOKENS:
        return [tokens]
    count = n_streams * ceil(tokens / (PIECE_TOKENS * n_streams))
    return [tokens * (i + 1) // count for i in range(count)]
