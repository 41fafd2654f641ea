"""Who reads a prompt in the base's place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from kvpred_mlx.dial.importance import Heard, Importance
from kvpred_mlx.dial.plan import Call, Span
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.taps.kv_taps import KVTaps


class Filling(Protocol):
    """A call under way."""

    heard: Heard  #: attention of the last queries; nothing unless the call has a `top`

    def __call__(self, span: Span, cache: list[Any]) -> mx.array:
        """Append entries of a span to the base's caches, its own or predicted ones.

        Returns the logits, lazy: the base's own, or teacher-forced ones.
        """
        ...


class Reader(Protocol):
    """Reads prompts and fills the base's cache with predictions."""

    importance: Importance

    def caches(self, max_kv_size: int | None) -> list[Any]:
        """The caches that the reader needs beside the base's."""
        ...

    def forced(self, tokens: mx.array) -> mx.array:
        """Teacher-forced logits [B, L, vocabulary]: predicted keys and values at every position of `tokens` [B, L]."""
        ...

    def begin(self, tokens: mx.array, call: Call, read: int, entry: AuxiliaryCache) -> Filling:
        """Begin a call with `tokens` [B, L], the first `read` of which are read; `heard` once all spans are filled."""
        ...

    def begin_in_order(
        self, tokens: mx.array, call: Call, entry: AuxiliaryCache, cache: list[Any]
    ) -> Filling:
        """Begin a call whose spans depend on what is heard: `heard` before they are filled.

        Args:
            cache: the base's, that the spans will come into; layers that need not read a span more than once have read
                the whole call.
        """
        ...


def with_logits(base: KVTaps, inject: Callable[..., mx.array], cache: list[Any]) -> mx.array:
    """Fill `cache` by `inject(cache, logits=...)`; the teacher-forced logits, lazy.

    Cached entries must not depend on a fused projection's queries, so there logits need a pass of their own.
    """
    if not base.fused:
        return inject(cache, logits=True)
    aside = copy.deepcopy(cache)
    inject(cache, logits=False)
    return inject(aside, logits=True)


def check_widths(parts: Sequence[tuple[str, Sequence[Any], Sequence[Any], KVTaps]]) -> None:
    """Make sure that a predictor fits: each part is a name, the widths it has, those expected, and of whom.

    Raises:
        ValueError: it does not.
    """
    wrong = [
        f"{name} key and value widths {list(have)}, expected {list(expected)} of {taps.family}"
        for name, have, expected, taps in parts
        if list(have) != list(expected)
    ]
    if wrong:
        raise ValueError("predictor does not fit the models: " + "; ".join(wrong))
