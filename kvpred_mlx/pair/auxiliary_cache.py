"""A pair's own entry in its prompt cache: a log of the token ids, and the auxiliary's caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_caches
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

from kvpred_mlx.pair.catch_up import CatchUp


class AuxiliaryCache(CacheList):
    """What has been read of a conversation: a log of its tokens, and the auxiliary's own caches, if there is one.

    The base decodes alone, so after each answer the auxiliary lags behind.  Every token that the base has in its cache
    is logged here; before the next prompt is predicted the auxiliary catches up on the log.  Trimming counts in tokens
    of the log: mlx-lm trims all entries of a prompt cache by the same count.

    The entry also knows where in a prompt it is, because a call does not say what it is for.  Its methods alone change
    that:

    .. code-block:: text

                        announce                 read_on
              +--------------------> announced ----------+
              |                                          v
           closed --------------- read_on ------------> open --+ read_on: the next chunk
              ^                                          | ^---+
              +--- decoded, repaired, end_prompt, trim --+

    *closed*: a short call is a prompt of its own, or an answer's token; *announced*: the prompt's length is known, so
    that shares of it can be told; *open*: short calls continue the prompt.  A short call that is read while open is
    *provisional*: it may be a prompt's end, or a speculative decoder's draft.  Decoding after it settles that it was an
    end; winding back (`trim`) that it was a draft, and what is left of it is `to_redo`.

    The log is an mlx-lm `KVCache` whose "keys" are token ids, `[B, 1, tokens, 1]`: batching, padding, rolling and
    saving are then mlx-lm's own.

    Args:
        caches: the auxiliary's caches, as `make_prompt_cache` gives them, and a counter behind them if they do not
            count tokens themselves; none without an auxiliary.
    """

    # Class attributes, because mlx-lm restores saved caches without calling `__init__`.
    _open = False
    _caught_up = False  # the last call was predicted: the auxiliary has read all there is
    _announced: tuple[int, int] | None = None
    _exact_tokens = 0
    _provisional = 0
    _lengths: list[int] | None = None  # tokens still to come in each row of a right-padded batch

    def __init__(self, *caches: Any):
        super().__init__(*caches, KVCache())

    @property
    def auxiliary(self) -> Sequence[Any]:
        """The auxiliary's own caches."""
        return self.caches[:-1]

    @property
    def log(self) -> Any:
        """The token log."""
        return self.caches[-1]

    @property
    def prompt_open(self) -> bool:
        """A predicted prompt is under way: short calls continue it."""
        return self._open

    @property
    def announced(self) -> tuple[int, int] | None:
        """Tokens done and in all, of a prompt of known length."""
        return self._announced

    @property
    def exact_tokens(self) -> int:
        """So many tokens at the beginning are known to have exact base entries."""
        return self._exact_tokens

    @property
    def to_redo(self) -> int:
        """Tokens at the end whose entries were predicted for a call that was a draft's."""
        return 0 if self._caught_up else self._provisional

    def announce(self, tokens: int) -> None:
        """A prompt of `tokens` tokens begins, whatever pieces it comes in."""
        self._open, self._announced = True, (0, tokens)

    def read_on(self, tokens: mx.array, *, all_read: bool = True, provisional: bool = False) -> None:
        """Log a call with `tokens` [B, L] of a prompt.

        Args:
            all_read: the auxiliary has read all of them.
            provisional: the call was too short to tell a prompt's end from a draft.
        """
        n = tokens.shape[1]
        self._append(tokens)
        if self._lengths is not None:
            self._lengths = [max(0, left - n) for left in self._lengths]
        self._open, self._caught_up = True, all_read
        self._provisional = n if provisional else 0
        done, total = self._announced or (0, 0)
        self._announced = (done + n, total) if done + n < total else None

    def decoded(self, tokens: mx.array) -> mx.array:
        """Log `tokens` [B, L] that the base computed itself; returns the log's ids.

        With nothing predicted before them their entries are exact.  The ids are to be evaluated with the step that they
        belong to, else the log becomes one long graph.
        """
        all_exact = self._exact_tokens == self.size()
        self.end_prompt()
        logged = self._append(tokens)
        if all_exact:
            self._exact_tokens = self.size()
        return logged

    def repaired(self) -> None:
        """All logged tokens have exact entries now."""
        self._exact_tokens = self.size()

    def end_prompt(self) -> None:
        """What follows is decoding for certain: a short last chunk was a prompt's, and stays predicted."""
        self._close()
        self._provisional = 0

    def read_again(self, caches: Sequence[Any]) -> None:
        """Give the auxiliary other caches, empty ones: it will read the whole log again."""
        self.caches = [*caches, self.log]
        self._caught_up = False

    def lengths(self, n: int) -> list[int] | None:
        """How many of the next `n` columns are tokens in each row of a right-padded batch (None: not padded)."""
        return None if self._lengths is None else [min(n, left) for left in self._lengths]

    def unread(self) -> mx.array:
        """The logged tokens that the auxiliary has not read, [1, lag], of a cache of one row."""
        return self.tail(max(0, self.lags()[0]))

    def _close(self) -> None:
        self._open = self._caught_up = False
        self._announced = None

    def _append(self, tokens: mx.array) -> mx.array:
        ids = tokens.astype(mx.int32)[:, None, :, None]
        return self.log.update_and_fetch(ids, ids)[0]

    def tail(self, n: int) -> mx.array:
        """The last `n` logged tokens, [B, n]."""
        return self.log.keys_and_values()[0][:, 0, self.log.size() - n :, 0]

    def logged(self) -> list[int]:
        """All logged tokens of a cache of one row."""
        return [] if self.empty() else self.tail(self.size())[0].tolist()  # type: ignore[return-value]

    def lags(self) -> list[int]:
        """How many logged tokens the auxiliary has not read, for each row of the batch."""
        if self._caught_up or not self.auxiliary:  # a padded prompt's offsets are only put right at its end
            return [0]
        log, read = self.log.offset, _clock(self.auxiliary).offset
        return [log - read] if isinstance(log, int) else (log - read).tolist()

    def catch_up(self, tokens: mx.array) -> CatchUp:
        """What the auxiliary has to read for `tokens` [B, L], the unread log first."""
        lags, lengths = self.lags(), self.lengths(tokens.shape[1])
        if lengths is not None and min(lengths) == tokens.shape[1]:
            lengths = None
        if len(set(lags)) == 1:
            lag = lags[0]
            unread = mx.concatenate([self.tail(lag).astype(tokens.dtype), tokens], axis=1) if lag else tokens
            ends = None if lengths is None else [lag + n for n in lengths]
            return CatchUp(unread, ends, lag)
        logged: Any = self.tail(self.log.size()).tolist()
        given: Any = tokens.tolist()
        lengths = lengths or [tokens.shape[1]] * len(lags)
        rows = [
            row[len(row) - lag :] + new[:n]
            for row, new, lag, n in zip(logged, given, lags, lengths, strict=True)
        ]
        ends = [len(row) for row in rows]
        padded = [row + [0] * (max(ends) - len(row)) for row in rows]
        return CatchUp(mx.array(padded), ends, lags)

    # mlx-lm's cache protocol

    def prepare(  # type: ignore[override]
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        if left_padding is not None:
            super().prepare(left_padding=left_padding)
        if right_padding is not None and max(right_padding) > 0:
            self.log.prepare(lengths=lengths, right_padding=right_padding)
            self._lengths = list(lengths or [])

    def finalize(self) -> None:
        self.log.finalize()  # the auxiliary's own caches are finalized call by call (see CatchUp)
        self._lengths = None

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        n = self.log.trim(n)
        self._close()
        self._provisional = max(0, self._provisional - n)
        self._exact_tokens = min(self._exact_tokens, self.log.size())
        ahead = -min(self.lags())
        if ahead > 0:
            fits = all(c.is_trimmable() and c.size() >= ahead for c in self.auxiliary)
            if fits and isinstance(_clock(self.auxiliary).offset, int):
                for c in self.auxiliary:
                    c.trim(ahead)
            else:  # a full window cannot be wound back: read the log again
                self.read_again([*map(_emptied, self.auxiliary)])
        return n

    def extend(self, other: AuxiliaryCache) -> None:
        super().extend(other)
        self._open &= other._open
        self._caught_up &= other._caught_up

    def extract(self, idx: int) -> AuxiliaryCache:
        # mlx-lm cannot extract a row of a cache that is still empty.
        return _of([_emptied(c, batched=False) if c.empty() else c.extract(idx) for c in self.caches])

    @classmethod
    def merge(cls, caches: list[AuxiliaryCache]) -> AuxiliaryCache:
        rows = zip(*(c.caches for c in caches), strict=True)
        return _of([row[0].merge(list(row)) for row in rows])

    def size(self) -> int:
        return self.log.size()

    def empty(self) -> bool:
        return self.log.empty()


def _of(caches: Sequence[Any]) -> AuxiliaryCache:
    made = AuxiliaryCache()
    made.caches = list(caches)
    return made


def counts_tokens(caches: Sequence[Any]) -> bool:
    """Whether any of a model's caches knows how many tokens it has; recurrent and convolutional states do not."""
    return any(hasattr(part, "offset") for part in _parts(caches))


def count(counter: Any, tokens: mx.array) -> None:
    """Count `tokens` [B, L]: to a cache of keys, so that batching, padding and rolling are mlx-lm's own."""
    nothing = mx.zeros((tokens.shape[0], 1, tokens.shape[1], 1), mx.uint8)
    counter.update_and_fetch(nothing, nothing)


def _clock(caches: Sequence[Any]) -> Any:
    """The first cache that counts its tokens."""
    return next(part for part in _parts(caches) if hasattr(part, "offset"))


def _parts(caches: Sequence[Any]) -> Iterator[Any]:
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from _parts(cache.caches)
        else:
            yield cache


def _emptied(cache: Any, batched: bool = True) -> Any:
    """An empty cache of the same kind; `batched=False` gives the one-row kind of a batch cache."""
    if isinstance(cache, CacheList):
        return CacheList(*(_emptied(part, batched) for part in cache.caches))
    if isinstance(cache, ArraysCache):
        rows = cache.batch_size
        return ArraysCache(len(cache.cache), [0] * rows if batched and rows > 1 else None)
    if isinstance(cache, BatchRotatingKVCache):
        return (
            BatchRotatingKVCache(cache.max_size, [0] * cache.offset.size)
            if batched
            else RotatingKVCache(cache.max_size)
        )
    if isinstance(cache, BatchKVCache):
        return BatchKVCache([0] * cache.offset.size) if batched else KVCache()
    if isinstance(cache, RotatingKVCache):
        return RotatingKVCache(cache.max_size, cache.keep)
    return ChunkedKVCache(cache.chunk_size) if isinstance(cache, ChunkedKVCache) else KVCache()


mlx_lm_caches.AuxiliaryCache = AuxiliaryCache  # type: ignore[attr-defined]  # mlx-lm restores saved entries by name
