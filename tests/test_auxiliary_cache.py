"""The states of a pair's cache entry, and who changes them."""

from __future__ import annotations

import ast
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache

ROOT = Path(__file__).parents[1]
STATE = {"_open", "_caught_up", "_announced", "_exact_tokens", "_provisional", "_lengths"}


def ids(n: int) -> mx.array:
    return mx.arange(n)[None]


def entry(*, auxiliary: bool = True) -> AuxiliaryCache:
    return AuxiliaryCache(KVCache()) if auxiliary else AuxiliaryCache()


def auxiliary_reads(cache: AuxiliaryCache, n: int) -> None:
    """As the auxiliary would: its own cache grows."""
    for c in cache.auxiliary:
        c.update_and_fetch(mx.zeros((1, 1, n, 2)), mx.zeros((1, 1, n, 2)))


def state(cache: AuxiliaryCache):
    return cache.prompt_open, cache.announced, cache.exact_tokens, cache.to_redo, cache.size()


def test_closed_at_first():
    assert state(entry()) == (False, None, 0, 0, 0)


def test_an_announced_prompt_is_counted_to_its_end():
    cache = entry()
    cache.announce(100)
    assert state(cache) == (True, (0, 100), 0, 0, 0)
    cache.read_on(ids(60))
    assert state(cache) == (True, (60, 100), 0, 0, 60)
    cache.read_on(ids(40))
    assert state(cache) == (True, None, 0, 0, 100)  # open still: mlx-lm may send a remainder
    cache.decoded(ids(1))
    assert state(cache) == (False, None, 0, 0, 101)


def test_a_prompt_that_nobody_announced():
    cache = entry()
    cache.read_on(ids(40))
    assert state(cache) == (True, None, 0, 0, 40)
    cache.read_on(ids(5), provisional=True)
    assert state(cache) == (True, None, 0, 0, 45)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_provisional_call_was_an_end_if_decoding_follows(auxiliary):
    cache = entry(auxiliary=auxiliary)
    cache.read_on(ids(40))
    cache.read_on(ids(5), provisional=True)
    assert cache.to_redo == 0
    cache.decoded(ids(1))
    assert (cache.to_redo, cache.prompt_open) == (0, False)


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize(("trimmed", "left"), [(1, 4), (3, 2), (5, 0), (8, 0)])
def test_a_provisional_call_was_a_draft_if_it_is_wound_back(auxiliary, trimmed, left):
    cache = entry(auxiliary=auxiliary)
    auxiliary_reads(cache, 45)
    cache.read_on(ids(40))
    cache.read_on(ids(5), provisional=True)
    assert cache.trim(trimmed) == trimmed
    assert state(cache) == (False, None, 0, left, 45 - trimmed)
    cache.decoded(ids(1))
    assert cache.to_redo == 0


def test_end_prompt_settles_that_it_was_an_end():
    cache = entry()
    cache.read_on(ids(40))
    cache.read_on(ids(5), provisional=True)
    cache.end_prompt()
    assert (cache.prompt_open, cache.to_redo, cache.trim(2), cache.to_redo) == (False, 0, 2, 0)


def test_exact_tokens_are_those_before_anything_predicted():
    cache = entry()
    cache.decoded(ids(10))
    assert cache.exact_tokens == 10
    cache.decoded(ids(1))
    assert cache.exact_tokens == 11
    cache.read_on(ids(40))
    cache.decoded(ids(1))
    assert cache.exact_tokens == 11
    cache.repaired()
    assert cache.exact_tokens == cache.size() == 52
    cache.decoded(ids(1))
    assert cache.exact_tokens == 53
    cache.trim(20)
    assert cache.exact_tokens == cache.size() == 33


def test_lag_and_catching_up():
    cache = entry()
    auxiliary_reads(cache, 40)
    cache.read_on(ids(40))
    assert cache.lags() == [0]
    cache.decoded(ids(1))
    cache.decoded(ids(1))
    assert cache.lags() == [2] and cache.unread().shape == (1, 2)
    reading = cache.catch_up(ids(30))
    assert reading.tokens.shape == (1, 32) and reading.lags == 2
    cache.read_again([KVCache()])
    assert cache.lags() == [42]


def test_without_an_auxiliary_there_is_nothing_to_catch_up_with():
    cache = entry(auxiliary=False)
    cache.read_on(ids(40))
    cache.decoded(ids(1))
    assert cache.lags() == [0] and cache.unread().size == 0


def test_rows_of_a_padded_batch_count_down():
    cache = AuxiliaryCache.merge([entry(), entry()])
    cache.prepare(lengths=[50, 30], right_padding=[0, 20])
    assert cache.lengths(40) == [40, 30]
    cache.read_on(mx.zeros((2, 40), mx.int32))
    assert cache.lengths(10) == [10, 0]
    cache.finalize()
    assert cache.lengths(10) is None


def test_joined_rows_are_in_a_prompt_only_together():
    first, second = (AuxiliaryCache.merge([entry(auxiliary=False)]) for _ in range(2))
    first.read_on(ids(4))
    second.decoded(ids(4))
    first.extend(second)
    assert not first.prompt_open


def test_nobody_else_writes_the_state():
    """Neither the private names nor a public property is assigned to outside of the class."""
    public = {"prompt_open", "announced", "exact_tokens", "to_redo", "provisional", "caught_up"}
    writers = []
    for folder in ("kvpred_mlx", "bench", "convert"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "auxiliary_cache.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                for target in targets:
                    if isinstance(target, ast.Attribute) and target.attr in (STATE - {"_lengths"}) | public:
                        writers.append(f"{path}:{target.lineno}")
    assert writers == []
