"""Pairs on disk: saved, quantized, loaded again."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from pairs import make_pair, tokens

from kvpred_mlx import load, load_model, save
from kvpred_mlx.pair.loading import context_length
from kvpred_mlx.pair.locating import DEMO_PAIR, find_pair


def fits(path, module):
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def same(a, b):
    prompt = tokens(40)
    return mx.array_equal(a(prompt), b(prompt)) and mx.array_equal(
        a(prompt, exact=True), b(prompt, exact=True)
    )


@pytest.mark.parametrize(
    ("base", "auxiliary"), [("qwen3", "qwen2"), ("gemma3_text", "openelm"), ("gemma3", "phi3")]
)
def test_a_pair_made_in_python_comes_back(base, auxiliary, tmp_path):
    model = make_pair(base, auxiliary, min_prompt_tokens=17)
    save(tmp_path / "pair", model)
    again = load_model(tmp_path / "pair")
    assert again.min_prompt_tokens == 17
    assert same(model, again)
    assert same(model, mlx_lm.utils.load_model(tmp_path / "pair")[0])


@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_quantized_pairs_come_back(mode, tmp_path):
    model = make_pair("qwen3", "openelm")
    nn.quantize(model, 32, 8, mode=mode, class_predicate=fits)
    save(tmp_path / "pair", model)
    again = load_model(tmp_path / "pair")
    assert isinstance(again.base.layers[0].self_attn.k_proj, nn.QuantizedLinear)
    assert same(model, again)


def test_base_and_auxiliary_quantized_differently(tmp_path):
    model = make_pair("qwen3", "openelm")
    nn.quantize(model.base, 32, 4, class_predicate=fits)
    nn.quantize(model.auxiliary, 32, 8, class_predicate=fits)
    save(tmp_path / "pair", model)
    again = load_model(tmp_path / "pair")
    assert again.base.layers[0].self_attn.k_proj.bits == 4
    assert again.auxiliary.layers[0].attn.qkv_proj.bits == 8
    assert isinstance(again.predictor.key_maps[0], nn.Linear)
    assert same(model, again)


def test_mlx_lm_quantizes_a_pair(tmp_path):
    model, tokenizer, config = mlx_lm.load(str(DEMO_PAIR), return_config=True)
    model = mlx_lm.utils.dequantize_model(model)
    config.pop("quantization")
    model, config = mlx_lm.utils.quantize_model(model, config, 64, 4)
    mlx_lm.utils.save(tmp_path / "pair", DEMO_PAIR, model, tokenizer, config, donate_model=False)
    again, tokenizer = load(tmp_path / "pair")
    assert again.base.layers[0].self_attn.q_proj.bits == 4
    ids = mx.array([tokenizer.encode("x = 1\n" * 20)])
    assert mx.array_equal(model(ids), again(ids))


def test_tokenizer_is_saved_too(demo_pair, tmp_path):
    model, tokenizer = demo_pair
    save(tmp_path / "pair", model, tokenizer)
    text = "def f(x):\n\treturn x  # é 漢 <s>\n"
    assert load(tmp_path / "pair")[1].encode(text) == tokenizer.encode(text)


def test_save_refuses_and_replaces(demo_pair, golden_pair, tmp_path):
    save(tmp_path / "pair", demo_pair[0])
    with pytest.raises(FileExistsError, match="exists already"):
        save(tmp_path / "pair", demo_pair[0])
    save(tmp_path / "pair", load_model(golden_pair), overwrite=True)
    assert json.loads((tmp_path / "pair/config.json").read_text())["layer_map"] == [0, 0, 1, 1]


def test_lazy_loading_reads_no_weights(golden_pair, tmp_path):
    lazy, eager = load_model(golden_pair, lazy=True), load_model(golden_pair)
    ids = mx.random.randint(0, 250, (1, 40), key=mx.random.key(0))
    assert mx.array_equal(lazy(ids), eager(ids))


def test_hub_repositories_are_fetched(monkeypatch):
    asked = {}

    def snapshot(name, revision, allow_patterns, local_files_only):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        assert not local_files_only
        return str(DEMO_PAIR)

    monkeypatch.setattr("kvpred_mlx.pair.locating.snapshot_download", snapshot)
    _, tokenizer = load("someone/pair", revision="v2")
    assert (asked["name"], asked["revision"]) == ("someone/pair", "v2")
    assert "model*.safetensors" in asked["patterns"]
    assert tokenizer is not None


def test_paths_are_not_taken_for_repositories(monkeypatch):
    monkeypatch.setattr(
        "kvpred_mlx.pair.locating.snapshot_download", lambda *a, **k: pytest.fail("asked the hub")
    )
    for name in ("./a", "/a/b", "~/a", "a", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such directory"):
            find_pair(name)


def test_context_length():
    assert context_length({"max_position_embeddings": 4096}) == 4096
    assert context_length({"text_config": {"max_position_embeddings": 8}}) == 8
    assert context_length({}) is None
