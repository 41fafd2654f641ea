"""Token dropping: a base's cache that holds some of a prompt's tokens only, at their own positions.

The tokens are processed as rows (`kvpred_mlx.dial.rows`), each at the position that it has in the whole
prompt, and attend to one another alone; whatever comes later stands at its own position too.  Where there are
states they are read run after run instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    ConcatenateKVCache,
    KVCache,
    create_attention_mask,
    make_prompt_cache,
)

from kvpred_mlx.bench.common.flops import (
    Cost,
    full_prefill_flops,
    read,
    reader_caches,
    scores_flops,
)
from kvpred_mlx.dial.plan import Call
from kvpred_mlx.dial.positions import ExactPositions
from kvpred_mlx.making.quality import Prefill
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.taps.kv import KV

Columns = Callable[[mx.array], mx.array]


class SparseKVCache(ConcatenateKVCache):
    """Keys and values of a part of the tokens before `offset`.

    Args:
        dropped: tokens that are not in it.
    """

    def __init__(self, dropped: int, keys: mx.array | None = None, values: mx.array | None = None):
        super().__init__()
        self.dropped, self.keys, self.values = dropped, keys, values
        self.offset = dropped + (0 if keys is None else keys.shape[-2])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        super().update_and_fetch(keys, values)
        self.offset += self.dropped
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return create_attention_mask(N, self.offset - self.dropped, return_array, window_size)

    @classmethod
    def merge(cls, caches: Sequence[SparseKVCache]) -> BatchKVCache:
        """Side by side as a batch of mlx-lm's, each row's next token at its own position."""
        whole = []
        for entry in caches:
            kept = KVCache()
            kept.keys, kept.values, kept.offset = entry.keys, entry.values, entry.offset - entry.dropped
            whole.append(kept)
        merged = BatchKVCache.merge(whole)
        merged.offset = merged.offset + mx.array([entry.dropped for entry in caches])
        return merged


def make_sparse_cache(model: nn.Module) -> list[Any]:
    """A model's prompt cache, empty, whose keys may be of a part of the tokens."""
    return [SparseKVCache(0) if type(entry) is KVCache else entry for entry in make_prompt_cache(model)]


def drop_all_but(pair: KVPredictionModel, columns: Columns) -> Prefill:
    """The base processes the given columns of the prompt, `[B, k]` ascending, and drops the rest.

    Raises:
        ValueError: the base has sliding windows, which count tokens that are dropped.
    """
    check_windows(pair.base)
    if pair.reads_in_order:
        return _drop_in_order(pair.base, columns)

    def prefill(prompt: mx.array) -> tuple[nn.Module, list[Any]]:
        kept, (B, n) = columns(prompt[:, :-1]), prompt[:, :-1].shape
        tokens, k = mx.take_along_axis(prompt, kept, axis=1), kept.shape[1]
        cache = make_prompt_cache(pair.base)
        nothing = [
            KV(*(mx.zeros((B, k, width)) for width in widths)) for widths in pair.predictor.base_widths
        ]
        pair.fill(nothing, tokens, cache)
        pair.rows(tokens, mx.broadcast_to(mx.arange(k), (B, k)), k, cache, kept)
        return pair.base, [SparseKVCache(n - k, *c.keys_and_values()) for c in cache]

    return prefill


def sparse_flops(pair: KVPredictionModel, n: int, dial: ExactPositions) -> int:
    """FLOPs until the first token behind `n` tokens of prompt, of which those that `attended` names are processed."""
    call = Call.of(dial, n - 1, announced=None, windowed=False)
    kept = call.first + call.top + n - 1 - call.last
    auxiliary = Cost(read(pair), reader_caches(pair)).until(n - 1)
    return auxiliary + scores_flops(pair, n - 1) + full_prefill_flops(pair.base, kept + 1)


def _drop_in_order(base: nn.Module, columns: Columns) -> Prefill:
    """The same on a base with states: the kept tokens one run after the other, keys at their own positions."""

    def prefill(prompt: mx.array) -> tuple[nn.Module, list[Any]]:
        kept: Any = columns(prompt[:, :-1]).tolist()
        rows = [one_row(prompt[r : r + 1], places) for r, places in enumerate(kept)]
        return base, [_side_by_side(list(entries)) for entries in zip(*rows, strict=True)]

    def one_row(prompt: mx.array, places: list[int]) -> list[Any]:
        cache = make_sparse_cache(base)
        starts = [i for i, place in enumerate(places) if not i or place != places[i - 1] + 1]
        for start, stop in pairwise([*starts, len(places)]):
            _move(cache, places[start] - start)
            base(prompt[:, places[start] : places[stop - 1] + 1], cache=cache)
        _move(cache, prompt.shape[1] - 1 - len(places))
        return cache

    return prefill


def _side_by_side(rows: list[Any]) -> Any:
    """The same entry of several rows, each with as many tokens, as one."""
    if isinstance(rows[0], SparseKVCache):
        keys, values = (
            mx.concatenate(list(part)) for part in zip(*((r.keys, r.values) for r in rows), strict=True)
        )
        return SparseKVCache(rows[0].dropped, keys, values)
    made = ArraysCache(len(rows[0].cache))
    made.state = (
        [mx.concatenate(list(part)) for part in zip(*(r.cache for r in rows), strict=True)],
        None,
        None,
    )
    return made


def _move(cache: list[Any], dropped: int) -> None:
    """Let the next token stand behind `dropped` tokens that were left out."""
    for entry in cache:
        if isinstance(entry, SparseKVCache):
            entry.offset += dropped - entry.dropped
            entry.dropped = dropped


def drop_all_but_last(base: nn.Module, count: Callable[[int], int]) -> Prefill:
    """The base processes the end of the prompt only, as one piece."""
    check_windows(base)

    def prefill(prompt: mx.array) -> tuple[nn.Module, list[Any]]:
        n = prompt.shape[1] - 1
        cache = make_sparse_cache(base)
        _move(cache, n - count(n))
        base(prompt[:, n - count(n) : -1], cache=cache)
        return base, cache

    return prefill


def attended(pair: KVPredictionModel, dial: ExactPositions) -> Columns:
    """The positions that the dial would make exact."""

    def columns(tokens: mx.array) -> mx.array:
        B, n = tokens.shape
        reader = pair.first_layers_reader
        with pair.importance.listen(pair.heard_layers) as heard:
            if reader is None:
                pair.predict(tokens, pair.make_cache()[-1])
            else:
                reader.fill(tokens, make_prompt_cache(pair.base))
        call = Call.of(dial, n, announced=None, windowed=False)
        last = mx.broadcast_to(mx.arange(call.last, n), (B, n - call.last))
        return mx.concatenate([call.chosen(heard.scores(n, n, [0])), last], axis=1)

    return columns


def at_random(count: Callable[[int], int], seed: int) -> Columns:
    """Any tokens."""

    def columns(tokens: mx.array) -> mx.array:
        order = mx.argsort(mx.random.uniform(shape=tokens.shape, key=mx.random.key(seed)), axis=1)
        return mx.sort(order[:, : count(tokens.shape[1])], axis=1)

    return columns


def check_windows(base: nn.Module) -> None:
    """Refuse a base with sliding windows, or with several caches in a layer."""
    entries = make_prompt_cache(base)
    names = sorted({type(c).__name__ for c in entries if type(c) not in (KVCache, ArraysCache)})
    if names:
        raise ValueError(
            f"tokens cannot be dropped from {', '.join(names)}: the base has sliding windows, or several caches in a "
            "layer"
        )
