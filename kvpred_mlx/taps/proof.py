"""What is found out about a model by trying: which columns reach its cache, and that nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.checkpointing import Call, Flow, OnCall
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.sites import project

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


def check_injection(
    family: str,
    model: nn.Module,
    inject: Callable[..., mx.array],
    widths: Sequence[tuple[int, int]],
    vocabulary: int,
) -> None:
    """Prove that the cache depends on nothing but the injected arrays: other tokens, same cache.

    Args:
        inject, widths: of the model's `KVTaps`.
        vocabulary: how many tokens there are.

    Raises:
        UnsupportedModelError: it does depend on more.
    """
    keys = [mx.random.key(i) for i in range(len(widths))]
    kv = [
        KV(*(mx.random.normal((1, PROOF_TOKENS, w), key=k) for w in ws))
        for ws, k in zip(widths, keys, strict=True)
    ]
    states = []
    for seed in (0, 1):  # tokens from all over the vocabulary: some may be untrained and alike
        tokens = mx.random.randint(0, vocabulary, (1, PROOF_TOKENS), key=mx.random.key(seed))
        cache = make_prompt_cache(model)
        inject(kv, tokens, cache, logits=False)
        leaves = dict(tree_flatten([c.state for c in cache])).values()
        states.append([a for a in leaves if isinstance(a, mx.array)])
    same = [mx.array_equal(a, b, equal_nan=True) for a, b in zip(*states, strict=True)]
    if not mx.all(mx.stack(same)).item():
        raise UnsupportedModelError(
            f"{family}: its cache holds more than the outputs of its key and value projections"
        )
