"""A pair and a prompt-cache file from before the modules moved (tests/data/before) load, and say what they said."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import pytest
from conftest import DATA
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

import kvpred_mlx

BEFORE = DATA / "before"
TOLERANCE = 1e-3  # of logits and log-probabilities; the two best tokens are ten times as far apart


@pytest.fixture(scope="module")
def expected():
    return mx.load(str(BEFORE / "expected.safetensors"))


@pytest.fixture(scope="module", params=["mlx_lm", "kvpred_mlx"])
def pair(request):
    """The saved pair, as mlx-lm loads it and as this package does."""
    load = {"mlx_lm": mlx_lm.load, "kvpred_mlx": kvpred_mlx.load}[request.param]
    return load(str(BEFORE / "pair"))


def assert_answers(model, prompt, cache, tokens, logprobs):
    found = list(generate_step(prompt, model, max_tokens=len(tokens), prompt_cache=cache))
    assert [token for token, _ in found] == tokens.tolist()
    assert mx.allclose(mx.stack([p for _, p in found]), logprobs, atol=TOLERANCE)


def test_the_pair_says_what_it_said(pair, expected):
    model, tokenizer = pair
    assert isinstance(model, kvpred_mlx.KVPredictionModel)
    assert tokenizer.encode("w3 w94 w5") == [3, 94, 5]
    assert model.min_prompt_tokens == 8
    assert model.exact_positions == kvpred_mlx.ExactPositions(first=2, last=0.2)
    prompt = expected["prompt"]
    assert mx.allclose(model(prompt[None]), expected["teacher_forced"], atol=TOLERANCE)
    assert_answers(model, prompt, model.make_cache(), expected["answer"], expected["answer_logprobs"])


def test_a_conversation_goes_on_in_the_prompt_cache_file(pair, expected):
    cache, metadata = load_prompt_cache(str(BEFORE / "prompt_cache.safetensors"), return_metadata=True)
    assert metadata == {"model": "before"}
    said = expected["prompt"].tolist() + expected["answer"].tolist()
    assert cache[-1].logged() == said[: cache[0].offset] and cache[0].offset >= len(said) - 1
    assert_answers(
        pair[0], expected["second_prompt"], cache, expected["second_answer"], expected["second_logprobs"]
    )


def test_what_is_saved_now_is_what_was_saved_then(tmp_path):
    kvpred_mlx.save(tmp_path / "pair", *kvpred_mlx.load(BEFORE / "pair"))
    for name in ("config.json", "model.safetensors.index.json"):
        then, now = (
            json.loads((folder / name).read_text()) for folder in (BEFORE / "pair", tmp_path / "pair")
        )
        assert now == then
    cache, metadata = load_prompt_cache(str(BEFORE / "prompt_cache.safetensors"), return_metadata=True)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache, metadata)
    files = (
        ("pair/model.safetensors", "pair/model.safetensors"),
        ("prompt_cache.safetensors", "cache.safetensors"),
    )
    for old, new in files:
        then, now = (
            mx.load(str(BEFORE / old), return_metadata=True),
            mx.load(str(tmp_path / new), return_metadata=True),
        )
        assert now[1] == then[1] and now[0].keys() == then[0].keys()
        assert all(mx.array_equal(now[0][name], array) for name, array in then[0].items())
