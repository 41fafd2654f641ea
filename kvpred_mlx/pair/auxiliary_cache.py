"""The auxiliary model's entry in a pair's prompt cache: its own caches and a log of the token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_caches
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)


class AuxiliaryCache(CacheList):
    """What the auxiliary has read of a conversation, and the tokens that it has not read yet.

    The base decodes alone, so after each answer the auxiliary lags behind.  Every token that the base has
    in its cache is logged here; before the next prompt is predicted the auxiliary catches up on the log.
    Trimming counts in tokens of the log: mlx-lm trims all entries of a prompt cache by the same count.

    The log is an mlx-lm `KVCache` whose "keys" are token ids, `[B, 1, tokens, 1]`: batching, padding,
    rolling and saving are then mlx-lm's own.

    Args:
        caches: the auxiliary's caches, as `make_prompt_cache` gives them.
    """

    # Class attributes, because mlx-lm restores saved caches without calling `__init__`.
    prompt_open = False  #: a predicted prompt is under way: short calls may continue it
    caught_up = False  #: the last call was predicted: the auxiliary has read all there is
    announced: tuple[int, int] | None = None  #: tokens done and in all, of a prompt of known length
    exact_tokens = 0  #: so many tokens at the beginning are known to have exact base entries
    provisional = 0  #: tokens of the last call, if it was too short to tell a prompt's end from a draft
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

    def close_prompt(self) -> None:
        """What follows is not a continuation of the last prompt."""
        self.prompt_open = self.caught_up = False
        self.announced = None

    def read_on(self, tokens: int, *, all_read: bool, provisional: bool) -> None:
        """A call with `tokens` tokens of a prompt is done; the auxiliary has read all of them, or not yet."""
        self.prompt_open, self.caught_up = True, all_read
        self.provisional = tokens if provisional else 0
        done, total = self.announced or (0, 0)
        self.announced = (done + tokens, total) if done + tokens < total else None

    def lengths(self, n: int) -> list[int] | None:
        """How many of the next `n` columns are tokens in each row of a right-padded batch (None: not padded)."""
        return None if self._lengths is None else [min(n, left) for left in self._lengths]

    def end_prompt(self) -> None:
        """What follows is decoding for certain: a short last chunk was a prompt's, and stays predicted."""
        self.close_prompt()
        self.provisional = 0

    def unread(self) -> mx.array:
        """The logged tokens that the auxiliary has not read, [1, lag], of a cache of one row."""
        return self.tail(max(0, self.lags()[0]))

    def read_again(self, caches: Sequence[Any]) -> None:
        """Give the auxiliary other caches, empty ones: it will read the whole log again."""
        self.caches = [*caches, self.log]
        self.caught_up = False

    def append(self, tokens: mx.array, *, exact: bool = False) -> mx.array:
        """Log `tokens` [B, L]; returns the log's ids, to be evaluated with the step that they belong to.

        Args:
            exact: the base computes them itself: with nothing predicted before them their entries are exact.
        """
        all_exact = exact and self.exact_tokens == self.size()
        ids = tokens.astype(mx.int32)[:, None, :, None]
        logged = self.log.update_and_fetch(ids, ids)[0]
        if all_exact:
            self.exact_tokens = self.size()
        return logged

    def tail(self, n: int) -> mx.array:
        """The last `n` logged tokens, [B, n]."""
        return self.log.keys_and_values()[0][:, 0, self.log.size() - n :, 0]

    def logged(self) -> list[int]:
        """All logged tokens of a cache of one row."""
        return [] if self.empty() else self.tail(self.size())[0].tolist()  # type: ignore[return-value]

    def lags(self) -> list[int]:
        """How many logged tokens the auxiliary has not read, for each row of the batch."""
        if self.caught_up:  # a padded prompt's offsets are only put right at its end
            return [0]
        log, read = self.log.offset, self.auxiliary[0].offset
        return [log - read] if isinstance(log, int) else (log - read).tolist()

    def catch_up(self, tokens: mx.array) -> Reading:
        """What the auxiliary has to read for `tokens` [B, L], the unread log first."""
        lags, lengths = self.lags(), self._advance(tokens.shape[1])
        if len(set(lags)) == 1:
            lag = lags[0]
            unread = mx.concatenate([self.tail(lag).astype(tokens.dtype), tokens], axis=1) if lag else tokens
            ends = None if lengths is None else [lag + n for n in lengths]
            return Reading(unread, ends, lag)
        logged: Any = self.tail(self.log.size()).tolist()
        given: Any = tokens.tolist()
        lengths = lengths or [tokens.shape[1]] * len(lags)
        rows = [
            row[len(row) - lag :] + new[:n]
            for row, new, lag, n in zip(logged, given, lags, lengths, strict=True)
        ]
        ends = [len(row) for row in rows]
        padded = [row + [0] * (max(ends) - len(row)) for row in rows]
        return Reading(mx.array(padded), ends, lags)

    def _advance(self, n: int) -> list[int] | None:
        """How many of the next `n` columns are tokens, not padding, in each row (None: all)."""
        lengths = self.lengths(n)
        if self._lengths is None or lengths is None:
            return None
        self._lengths = [left - taken for left, taken in zip(self._lengths, lengths, strict=True)]
        return lengths if min(lengths) < n else None

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
        self.log.finalize()  # the auxiliary's own caches are finalized call by call (see Reading)
        self._lengths = None

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        n = self.log.trim(n)
        self.close_prompt()
        self.provisional = max(0, self.provisional - n)
        self.exact_tokens = min(self.exact_tokens, self.log.size())
        ahead = -min(self.lags())
        if ahead > 0:
            fits = all(c.is_trimmable() and c.size() >= ahead for c in self.auxiliary)
            if fits and isinstance(self.auxiliary[0].offset, int):
                for c in self.auxiliary:
                    c.trim(ahead)
            else:  # a full window cannot be wound back: read the log again
                self.read_again([*map(_emptied, self.auxiliary)])
        return n

    def extend(self, other: AuxiliaryCache) -> None:
        super().extend(other)
        self.prompt_open &= other.prompt_open
        self.caught_up &= other.caught_up

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


class Reading:
    """Tokens for the auxiliary to read, and where the predicted positions lie among them.

    Args:
        tokens: `[B, T]`, right-padded.
        ends: tokens of each row that are not padding (None: all).
        lags: catch-up tokens that stand before the predicted ones: one number for all rows, or one each.
    """

    def __init__(self, tokens: mx.array, ends: list[int] | None, lags: int | list[int]):
        self.tokens, self.ends, self.lags = tokens, ends, lags

    def prepare(self, caches: Sequence[Any]) -> None:
        """Tell the auxiliary's caches about the padding, before the auxiliary reads."""
        for c in caches if self.ends is not None else ():
            padding = [self.tokens.shape[1] - end for end in self.ends or []]
            c.prepare(lengths=self.ends, right_padding=padding)

    def finalize(self, caches: Sequence[Any]) -> None:
        """Roll the padding out of the auxiliary's caches, after the auxiliary has read."""
        for c in caches if self.ends is not None else ():
            c.finalize()

    def predicted(self, recorded: mx.array, n: int) -> mx.array:
        """The `n` columns of `recorded` [B, T, width] that belong to the predicted positions."""
        if isinstance(self.lags, int):
            return recorded[:, self.lags : self.lags + n]
        columns = mx.minimum(mx.array(self.lags)[:, None] + mx.arange(n), recorded.shape[1] - 1)
        return mx.take_along_axis(recorded, columns[..., None], axis=1)


def _of(caches: Sequence[Any]) -> AuxiliaryCache:
    made = AuxiliaryCache()
    made.caches = list(caches)
    return made


def _emptied(cache: Any, batched: bool = True) -> Any:
    """An empty cache of the same kind; `batched=False` gives the one-row kind of a batch cache."""
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
