"""What is found out about a model by trying: which columns reach its cache, and that nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.checkpointing import Call, Flow, OnCall
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.shaken import shaken
from kvpred_mlx.taps.sites import project
from kvpred_mlx.taps.states import states

Run = Callable[[mx.array, list[Any] | None, OnCall, Flow], mx.array]
PROOF_TOKENS = 16


def reached_columns(
    model: nn.Module, run: Run, calls: Sequence[Call], widths: Sequence[int]
) -> Iterator[tuple[list[bool], list[bool]]]:
    """Which columns of fused projections reach the cached keys, and which the values, by a gradient's nonzeros.

    Args:
        run: `KVTaps.run` of the model.
        calls, widths: of the projections.
    """
    *keys, key = mx.random.split(mx.random.key(0), len(calls) + 1)
    outputs = [mx.random.normal((1, 2, w), key=k) for w, k in zip(widths, keys, strict=True)]

    def cached(outputs: list[mx.array], part: int) -> mx.array:
        given = dict(zip(calls, outputs, strict=True))

        def give(flow: Flow, call: Call, projection: nn.Module, x: mx.array) -> mx.array:
            array = given.get(call)
            return project(projection, x) if array is None else array.astype(x.dtype)

        cache = make_prompt_cache(model)
        run(mx.array([[0, 0]]), cache, give, Flow())
        states = [c.keys_and_values()[part].astype(mx.float32) for c in cache]
        return sum(((s * mx.random.normal(s.shape, key=key)).sum() for s in states), mx.array(0.0))

    reach = [mx.grad(partial(cached, part=part))(outputs) for part in (0, 1)]
    for columns in zip(*reach, strict=True):
        reached: list[Any] = [mx.any(g != 0, axis=(0, 1)).tolist() for g in columns]
        yield reached[0], reached[1]


class Injectable(Protocol):
    """What is asked of a model's `KVTaps`."""

    family: str
    model: nn.Module
    widths: list[tuple[int, int]]
    tails: list[int | None]

    def inject(
        self, kv: Sequence[KV], tokens: mx.array, cache: list[Any], *, logits: bool, noise: mx.array
    ) -> mx.array: ...


def check_injection(taps: Injectable, vocabulary: int, entries: set[int] | None = None) -> None:
    """Prove that the cache depends on nothing but the injected arrays: other tokens, other fill, same cache.

    Args:
        taps: of the model.
        vocabulary: how many tokens there are.
        entries: of the cache, to be looked at (None: all).

    Raises:
        UnsupportedModelError: it does depend on more.
    """
    keys = mx.random.split(mx.random.key(0), len(taps.widths))
    rows = [PROOF_TOKENS if tail is None else min(tail, PROOF_TOKENS) for tail in taps.tails]
    kv = [
        KV(mx.random.normal((1, PROOF_TOKENS, w), key=k), mx.random.normal((1, n, v), key=k))
        for (w, v), n, k in zip(taps.widths, rows, keys, strict=True)
    ]
    kept = []
    with shaken(taps.model):
        for seed in (0, 1):  # tokens from all over the vocabulary: some may be untrained and alike
            tokens = mx.random.randint(0, vocabulary, (1, PROOF_TOKENS), key=mx.random.key(seed))
            cache = make_prompt_cache(taps.model)
            taps.inject(kv, tokens, cache, logits=False, noise=mx.random.key(seed))
            kept.append([s for (i, _), s in states(cache).items() if entries is None or i in entries])
        same = [mx.array_equal(a, b, equal_nan=True) for a, b in zip(*kept, strict=True)]
        proved = mx.all(mx.stack(same)).item()
    if not proved:
        raise UnsupportedModelError(
            f"{taps.family}: its cache holds more than the outputs of its key and value projections"
        )
