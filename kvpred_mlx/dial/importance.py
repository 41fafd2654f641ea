"""Which tokens of a prompt matter: the attention of the auxiliary's last queries.

The auxiliary's queries and cached keys are there once it has read the prompt; nothing is run a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.attention import AttentionCalls

QUERIES = 8  # the last ones, averaged
POOL = 9  # neighbours that are averaged, the token among them
CHUNK = 8  # tokens that are chosen together


class _Attention(NamedTuple):
    queries: mx.array
    keys: mx.array
    scale: float
    mask: Any
    windowed: bool


class Importance:
    """Listens to a model's attention while it reads.

    Args:
        model: any mlx-lm model.
    """

    def __init__(self, model: nn.Module):
        self._family = getattr(model, "model_type", type(model).__module__)
        self._model, self._calls = model, AttentionCalls(model)
        self._audible: bool | None = None

    def check(self) -> None:
        """Raise UnsupportedModelError if the family does not call mlx-lm's attention: tried once, nothing evaluated."""
        if self._audible is None:
            with self._calls.seen_by((heard := Heard()).note):
                self._model(mx.zeros((1, 2), mx.int32), cache=make_prompt_cache(self._model))
            self._audible = bool(heard)
        if not self._audible:
            raise UnsupportedModelError(
                f"{self._family}: its attention cannot be seen, so it cannot choose the top positions"
            )

    @contextmanager
    def listen(self, most: int | None = None) -> Iterator[Heard]:
        """What the model's attention is asked on this thread, lazily.

        Args:
            most: listen to so many attention layers only, the first ones.

        Raises:
            UnsupportedModelError: as `check`.
        """
        self.check()
        heard = Heard(most)
        with self._calls.seen_by(heard.note):
            yield heard


class Heard:
    """Queries and keys of every attention layer, piece by piece of what was read.

    Args:
        most: how many layers are heard, the first ones (None: all).
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._layers: dict[int, list[_Attention]] = {}

    def __bool__(self) -> bool:
        return bool(self._layers)

    def note(
        self, attention: Any, queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any,
        sinks: Any,
    ) -> mx.array:  # fmt: skip
        known = self._most is None or len(self._layers) < self._most or id(cache) in self._layers
        if known and cache is not None and isinstance(keys, mx.array):
            self._layers.setdefault(id(cache), []).append(
                _Attention(queries, keys, scale, mask, hasattr(cache, "max_size"))
            )
        return attention(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)

    def scores(self, seen: int, tokens: int, lags: list[int], lengths: list[int] | None = None) -> mx.array:
        """How much the last queries attend to each of the last `seen` tokens, [B, seen].

        Mean over the queries, then the largest of all heads and layers; layers that see a sliding window only do
        not vote, unless all layers do.

        Args:
            tokens: of the call, the last of those that were read.
            lags: tokens that each row read before those of the call.
            lengths: tokens of each row that are not padding (None: all).
        """
        if lengths is None and len(set(lags)) == 1:
            return mx.stack([_to_width(_weights(calls[-1]), seen) for calls in self._voters()]).max(0)
        ends = [lag + n for lag, n in zip(lags, lengths or [tokens] * len(lags), strict=True)]
        read = mx.stack([_to_width(_row_weights(calls, ends), max(ends)) for calls in self._voters()]).max(0)
        columns = mx.minimum(mx.array(lags)[:, None] + mx.arange(tokens), max(ends) - 1)
        return mx.take_along_axis(read, columns, axis=1)

    def _voters(self) -> list[list[_Attention]]:
        layers = list(self._layers.values())
        return [calls for calls in layers if not calls[-1].windowed] or layers


def choose(scores: mx.array, counts: list[int], limits: list[int], chunk: int = CHUNK) -> mx.array:
    """The `counts[r]` best columns of each row of `scores` [B, N], chunk by chunk, ascending: [B, largest count].

    A row that wants fewer than the others gets its best column several times.

    Args:
        limits: how many columns of each row count at all.
        chunk: columns that are chosen together.
    """
    B, N = scores.shape
    limit = mx.array(limits)[:, None]
    chunks = -(-N // chunk)
    counted = mx.pad(mx.broadcast_to(mx.arange(N) < limit, (B, N)), [(0, 0), (0, chunks * chunk - N)])
    pooled = _pooled(mx.pad(scores, [(0, 0), (0, chunks * chunk - N)]), counted)
    sums, sizes = (a.reshape(B, chunks, chunk).sum(axis=-1) for a in (pooled, counted))
    order = mx.argsort(mx.where(sizes > 0, -sums / mx.maximum(sizes, 1), 1.0), axis=-1)
    columns = (order[..., None] * chunk + mx.arange(chunk)).reshape(B, -1)
    ranks = mx.arange(chunks * chunk)
    kept = mx.argsort(mx.where(columns < limit, ranks, ranks + ranks.size), axis=-1)[:, : max(counts)]
    best = mx.take_along_axis(columns, kept, axis=1)
    wanted = mx.arange(max(counts)) < mx.array(counts)[:, None]
    return mx.sort(mx.where(wanted, best, best[:, :1]), axis=1)


def _pooled(scores: mx.array, counted: mx.array) -> mx.array:
    """The mean of each counted column and its counted neighbours; 0 elsewhere."""
    N = scores.shape[1]
    begin = mx.maximum(mx.arange(N) - POOL // 2, 0)
    end = mx.minimum(mx.arange(N) + POOL // 2 + 1, N)

    def around(values: mx.array) -> mx.array:
        sums = mx.pad(mx.cumsum(values, axis=1), [(0, 0), (1, 0)])
        return mx.take(sums, end, axis=1) - mx.take(sums, begin, axis=1)

    means = around(mx.where(counted, scores, 0)) / mx.maximum(around(counted.astype(scores.dtype)), 1)
    return mx.where(counted, means, 0)


def _weights(call: _Attention) -> mx.array:
    """Attention weights [B, keys] of a call's last queries."""
    n = min(QUERIES, call.queries.shape[2])
    mask = call.mask
    if isinstance(mask, mx.array):
        mask = mask[..., -n:, :]
    elif mask is not None:  # "causal"
        own = mx.arange(call.keys.shape[2] - n, call.keys.shape[2])[:, None]
        mask = mx.arange(call.keys.shape[2]) <= own
    return _attend(call.queries[..., -n:, :], call.keys, call.scale, mask)


def _row_weights(calls: list[_Attention], ends: list[int]) -> mx.array:
    """The same where each row's last token stands elsewhere, at `ends[r]` - 1 of what was read."""
    queries, keys = mx.concatenate([c.queries for c in calls], axis=2), calls[-1].keys
    own = mx.maximum(mx.array(ends)[:, None] - QUERIES + mx.arange(QUERIES), 0)  # [B, queries]
    picked = mx.take_along_axis(queries, own[:, None, :, None], axis=2)
    columns = mx.arange(keys.shape[2]) - (keys.shape[2] - queries.shape[2])
    mask = columns <= own[..., None]
    if isinstance(calls[-1].mask, mx.array) and calls[-1].mask.dtype == mx.bool_:
        mask = mask & mx.any(calls[-1].mask, axis=-2).reshape(-1, 1, keys.shape[2])  # left padding
    return _attend(picked, keys, calls[-1].scale, mask[:, None])


def _attend(queries: mx.array, keys: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    B, heads, n, D = queries.shape
    grouped = queries.reshape(B, keys.shape[1], -1, n, D).astype(mx.float32) * scale
    scores = (grouped @ keys[:, :, None].astype(mx.float32).swapaxes(-1, -2)).reshape(B, heads, n, -1)
    if mask is not None:
        least = mx.finfo(mx.float32).min
        scores = mx.where(mask, scores, least) if mask.dtype == mx.bool_ else scores + mask
    return mx.softmax(scores, axis=-1, precise=True).mean(axis=2).max(axis=1)


def _to_width(weights: mx.array, width: int) -> mx.array:
    """The last `width` columns; what a window has lost weighs nothing."""
    missing = max(0, width - weights.shape[1])
    return mx.pad(weights, [(0, 0), (missing, 0)])[:, missing + weights.shape[1] - width :]
