"""What a model's caches hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList

from kvpred_mlx.taps.sites import ATTENTION_CACHES


class Kind(NamedTuple):
    """One of the things that caches of a kind hold."""

    cache: str  #: the cache's class
    path: str  #: where it stands in the entry's state
    attention: str  #: "keys", "values", or nothing


def states(cache: Sequence[Any]) -> dict[tuple[int, Kind], mx.array]:
    """The arrays of numbers in a prompt cache, by entry and kind; token ids and counts are left out."""
    found = {}
    for i, entry in enumerate(cache):
        for place, one in _leaves(entry):
            attention = type(one) in ATTENTION_CACHES
            held: Any = [] if attention and one.empty() else tree_flatten(one.state)
            for path, array in held:
                if isinstance(array, mx.array) and mx.issubdtype(array.dtype, mx.floating):
                    what = {"0": "keys", "1": "values"}.get(path, "") if attention else ""
                    found[i, Kind(type(one).__name__, place + path, what)] = array
    return found


def padded(entry: Any) -> bool:
    """Whether a cache entry is told that the rows of a batch end at different tokens."""
    return any(getattr(one, "lengths", None) is not None for _, one in _leaves(entry))


def holds_keys(entry: Any) -> bool:
    """Whether a cache entry holds attention keys and values, maybe beside other things."""
    return any(hasattr(one, "offset") for _, one in _leaves(entry))


def holds_states(cache: Sequence[Any]) -> bool:
    """Whether a prompt cache holds more than attention keys and values: states without positions, second caches."""
    return any(not hasattr(entry, "offset") for entry in cache)


def _leaves(entry: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(entry, CacheList):
        for i, part in enumerate(entry.caches):
            yield from _leaves(part, f"{place}{i}.")
    else:
        yield place, entry
