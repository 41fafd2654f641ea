"""Reading a prompt in pieces on several streams gives what reading it whole gives."""

from __future__ import annotations

import mlx.core as mx
import pytest
from pairs import PAIRS, difference, make_pair, tokens

from kvpred_mlx import _blas
from kvpred_mlx.pair import cpu_prefill

ON_CPU = mx.default_device() == mx.Device(mx.cpu)
pytestmark = pytest.mark.skipif(not ON_CPU, reason="other devices read a prompt whole")


@pytest.fixture(autouse=True)
def two_blas_threads():
    """As outside the tests on two cores (see conftest.py)."""
    if _blas._openblas is None:
        yield
        return
    before = _blas.threads()
    _blas._openblas.openblas_set_num_threads(2)
    yield
    _blas._openblas.openblas_set_num_threads(before)


@pytest.fixture
def pieces(monkeypatch):
    monkeypatch.setattr(cpu_prefill, "MIN_PIECE_TOKENS", 4)
    monkeypatch.setattr(cpu_prefill, "PIECE_TOKENS", 8)


def filled(pair, prompt, **lengths):
    cache = pair.make_cache()
    pair(prompt, cache=cache)
    mx.eval([c.state for c in cache])
    return cache


@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
def test_pieces_give_the_same_cache(base, auxiliary, monkeypatch):
    pair, prompt = make_pair(base, auxiliary), tokens(75)
    whole = filled(pair, prompt)
    monkeypatch.setattr(cpu_prefill, "MIN_PIECE_TOKENS", 4)
    monkeypatch.setattr(cpu_prefill, "PIECE_TOKENS", 8)
    for threads in (None, 1, 2, 4, 64):
        monkeypatch.setattr(_blas, "threads", lambda threads=threads: threads)
        assert difference(whole, filled(pair, prompt)) < 1e-4


def test_batches(pieces):
    pair, prompt = make_pair(), tokens(75, batch=3)
    together = filled(pair, prompt)
    for row in range(3):
        alone = filled(pair, prompt[row : row + 1])
        for a, b in zip(together[:-1], alone[:-1], strict=True):
            assert mx.allclose(a.keys_and_values()[0][row], b.keys_and_values()[0][0], atol=1e-5)


@pytest.mark.slow
def test_inside_a_transformation(pieces, compiling):
    """Where nothing can be evaluated, the call stays lazy."""
    pair, prompt = make_pair(), tokens(75)

    def keys(tokens):
        cache = pair.make_cache()
        pair(tokens, cache=cache)
        return cache[0].keys_and_values()[0]

    expected, _ = filled(pair, prompt)[0].keys_and_values()
    assert mx.allclose(mx.compile(keys)(prompt), expected, atol=1e-4)


@pytest.mark.skipif(not _blas.threads(), reason="OpenBLAS is not in use")
def test_blas_threads_come_back(pieces, monkeypatch):
    before = _blas.threads()
    filled(make_pair(), tokens(75))
    assert _blas.threads() == before
    with pytest.raises(RuntimeError), _blas.one_thread():
        assert _blas.threads() == 1
        with _blas.one_thread():
            assert _blas.threads() == 1
        assert _blas.threads() == 1  # still inside the outer one
        raise RuntimeError
    assert _blas.threads() == before


def test_cuts():
    assert cpu_prefill.cuts(95, 2) == [95]
    assert cpu_prefill.cuts(255, 2) == [127, 255]
    assert cpu_prefill.cuts(255, 1) == [127, 255]
    ends = cpu_prefill.cuts(2047, 2)
    assert len(ends) % 2 == 0 and ends[-1] == 2047
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    assert max(sizes) <= cpu_prefill.PIECE_TOKENS and max(sizes) - min(sizes) <= 1
