"""The converted checkpoint computes what CoreNet, the reference, computed from the original."""

from __future__ import annotations

import mlx.core as mx
import pytest
from conftest import DATA

from kvpred_mlx import load, load_model, save
from kvpred_mlx.pair.loading import pair_config

LOGITS, KV = 2e-4, 1e-4


@pytest.fixture(scope="module")
def golden():
    return mx.load(str(DATA / "golden_tiny/golden.safetensors"))


@pytest.fixture
def model(golden_pair):
    model = load_model(golden_pair)
    model.min_prompt_tokens = 2
    return model


def far(a, b):
    assert a.shape == b.shape
    return float(mx.abs(a - b).max())


def test_prefill_and_decode(model, golden):
    ids = golden["input_ids"]
    cache = model.make_cache()
    model(ids[:, :-1], cache=cache)
    logits = model(ids[:, -1:], cache=cache)[:, -1]
    assert far(logits, golden["prefill_last_logits"]) < LOGITS
    for i, layer in enumerate(model.base.layers):
        keys, values = cache[i].keys_and_values()
        assert far(keys, layer.attn.rope(golden[f"keys.{i}"])) < KV
        assert far(values, golden[f"values.{i}"]) < KV
    token = mx.argmax(logits, axis=-1)
    for step in range(8):
        assert mx.array_equal(token, golden["decode_input_tokens"][:, step])
        logits = model(token[:, None], cache=cache)[:, -1]
        assert far(logits, golden["decode_logits"][:, step]) < LOGITS
        token = mx.argmax(logits, axis=-1)
        assert mx.array_equal(token, golden["decode_output_tokens"][:, step])


def test_teacher_forced(model, golden):
    assert far(model(golden["input_ids"]), golden["teacher_forced_logits"]) < LOGITS


def test_each_model_alone(model, golden):
    ids = golden["input_ids"]
    assert far(model(ids, exact=True)[:, -1], golden["base_only_last_logits"]) < LOGITS
    assert far(model.auxiliary(ids[:, :-1]), golden["aux_logits"]) < LOGITS


def test_saving_a_loaded_pair_changes_nothing(golden_pair, golden, tmp_path):
    model, tokenizer = load(golden_pair)
    assert tokenizer is None
    save(tmp_path / "again", model)
    again = load_model(tmp_path / "again")
    assert mx.array_equal(again(golden["input_ids"], exact=True), model(golden["input_ids"], exact=True))
    assert pair_config(again) == pair_config(model)
    model.min_prompt_tokens = again.min_prompt_tokens = 2
    assert mx.array_equal(again(golden["input_ids"]), model(golden["input_ids"]))
