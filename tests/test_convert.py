"""Conversion of CoreNet checkpoints: what comes out, and what is said of bad input."""

from __future__ import annotations

import pickle
import shutil

import checkpoints
import mlx.core as mx
import mlx_lm
import pytest
import torch

from kvpred_mlx import load_model
from kvpred_mlx.convert import checkpoint as conversion
from kvpred_mlx.convert.checkpoint import Quantization, convert_checkpoint
from kvpred_mlx.convert.openelm import compare_with_name, read_config
from kvpred_mlx.convert.published import facts, openelm_shape
from kvpred_mlx.files import new_directory


@pytest.fixture
def pair(tmp_path):
    """(checkpoint, YAML, output directory that is not there yet)"""
    torch.manual_seed(0)
    path = checkpoints.save(checkpoints.pair_state(), tmp_path / "model.pt")
    return path, checkpoints.pair_yaml(tmp_path / "model.yaml"), tmp_path / "out"


def to_mlx(tensor):
    return mx.array(tensor.numpy())


def test_predicted_keys_by_hand(pair):
    """Predicted keys and values from the original tensors, by the paper's formula."""
    convert_checkpoint(*pair)
    model, state = load_model(pair[2]), checkpoints.torch.load(pair[0])
    ids = mx.random.randint(0, 128, (2, 40), key=mx.random.key(0))
    auxiliary, _ = model.auxiliary_taps.record(ids)
    cache = model.make_cache()
    model(ids, cache=cache)
    for i, m in enumerate(checkpoints.LAYER_MAP):
        maps = [
            [
                to_mlx(state[f"predicter.auxkv_to_basekv.{kind}_transforms.{i}.{part}"])
                for part in ("weight", "bias")
            ]
            for kind in ("key", "value")
        ]
        keys, values = (raw @ w.T + b for raw, (w, b) in zip(auxiliary[m], maps, strict=True))
        attention = model.base.layers[i].attn
        heads = keys.reshape(2, 40, -1, 16).transpose(0, 2, 1, 3)
        assert mx.allclose(cache[i].keys_and_values()[0], attention.rope(attention.k_norm(heads)), atol=1e-5)
        heads = values.reshape(2, 40, -1, 16).transpose(0, 2, 1, 3)
        assert mx.allclose(cache[i].keys_and_values()[1], heads, atol=1e-5)


def test_dimensions_come_from_the_tensors(pair):
    convert_checkpoint(*pair)
    model = load_model(pair[2])
    assert [layer.attn.n_heads for layer in model.base.layers] == [4, 4, 6, 8]
    assert [layer.attn.n_kv_heads for layer in model.auxiliary.layers] == [1, 1, 4]
    assert [layer.ffn.proj_2.weight.shape for layer in model.base.layers] == [
        (64, 96),
        (64, 100),
        (64, 128),
        (64, 72),
    ]
    assert model.predictor.layer_map == (2, 0, 1, 1)


@pytest.mark.variations
@pytest.mark.parametrize("wrap", ["model_state_dict", "ema", "module"])
def test_nested_and_prefixed_state_dicts(pair, wrap, tmp_path):
    state = checkpoints.torch.load(pair[0])
    if wrap == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    elif wrap == "ema":
        state = {"epoch": 3, "inner": {"ema": state}, "optim": {"lr": [0.1]}}
    else:
        state = {wrap: state, "iterations": 7}
    convert_checkpoint(checkpoints.save(state, tmp_path / "wrapped.pt"), pair[1], pair[2])
    convert_checkpoint(pair[0], pair[1], tmp_path / "plain")
    ids = mx.arange(40)[None]
    assert mx.array_equal(load_model(pair[2])(ids), load_model(tmp_path / "plain")(ids))


def test_the_format_before_zip_files(pair, tmp_path):
    state = checkpoints.torch.load(pair[0])
    old = checkpoints.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    convert_checkpoint(old, pair[1], pair[2])
    convert_checkpoint(pair[0], pair[1], tmp_path / "new")
    ids = mx.arange(40)[None]
    assert mx.array_equal(load_model(pair[2])(ids), load_model(tmp_path / "new")(ids))


def test_plain_openelm(tmp_path):
    state = checkpoints.openelm_state(checkpoints.BASE_LAYERS)
    convert_checkpoint(checkpoints.save(state, tmp_path / "plain.pt"), None, tmp_path / "out")
    model, config = mlx_lm.utils.load_model(tmp_path / "out")
    assert config["model_type"] == "openelm"
    assert mx.array_equal(model.transformer.norm.weight, to_mlx(state["norm.weight"]))
    assert model(mx.arange(5)[None]).shape == (1, 5, 128)


def test_output_matrix_of_its_own(tmp_path):
    state = checkpoints.openelm_state(checkpoints.BASE_LAYERS) | {"classifier.weight": torch.randn(128, 64)}
    convert_checkpoint(checkpoints.save(state, tmp_path / "plain.pt"), None, tmp_path / "out")
    model, _ = mlx_lm.utils.load_model(tmp_path / "out")
    assert mx.array_equal(model.lm_head.weight, to_mlx(state["classifier.weight"]))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_dtype(pair, dtype):
    convert_checkpoint(*pair, dtype=dtype)
    model = load_model(pair[2])
    assert model.base.transformer.norm.weight.dtype == model.predictor.key_maps[0].bias.dtype == dtype


@pytest.mark.variations
@pytest.mark.parametrize(("bits", "group", "mode"), [(8, 32, "affine"), (4, 16, "nvfp4"), (8, 32, "mxfp8")])
def test_quantized(pair, bits, group, mode):
    convert_checkpoint(*pair, quantization=Quantization(group, bits, mode))
    model = load_model(pair[2])
    assert "scales" in model.base.layers[0].attn.qkv_proj
    convert_checkpoint(*pair, overwrite=True)
    ids = mx.arange(40)[None]
    exact, quantized = load_model(pair[2]), model
    relative = (
        mx.abs(exact(ids, exact=True) - quantized(ids, exact=True)).mean()
        / mx.abs(exact(ids, exact=True)).mean()
    )
    assert float(relative) < (0.2 if bits == 8 else 0.5)


def test_every_bad_tensor_is_in_one_error(pair, tmp_path):
    state = checkpoints.torch.load(pair[0])
    del state["base.layers.1.attn.k_norm.weight"], state["predicter.auxkv_to_basekv.key_transforms.3.bias"]
    state["base.surprise"] = torch.zeros(3)
    state["auxiliary.layers.0.ffn.proj_1.weight"] = torch.zeros(7, 48)
    path = checkpoints.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as error:
        convert_checkpoint(path, pair[1], pair[2])
    message = str(error.value)
    assert "base: missing layers.1.attn.k_norm.weight" in message
    assert "base: unexpected surprise (3,)" in message
    assert "auxiliary: layers.0.ffn.proj_1.weight has shape (7, 48), expected (96, 48)" in message
    assert "\n" not in message
    assert not pair[2].exists()


def test_bad_predictor_tensors(pair, tmp_path):
    state = checkpoints.torch.load(pair[0])
    del state["predicter.auxkv_to_basekv.key_transforms.3.bias"]
    state["predicter.auxkv_to_basekv.value_transforms.0.weight"] = torch.zeros(5, 5)
    state["predicter.auxkv_to_basekv.key_transforms.4.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as error:
        convert_checkpoint(checkpoints.save(state, tmp_path / "bad.pt"), pair[1], pair[2])
    for part in ("missing", "unexpected", "value_transforms.0.weight has shape (5, 5), expected (32, 96)"):
        assert part in str(error.value)


@pytest.mark.parametrize("layer_map", [[0, 1], [0, 1, 2, 3], "0,0,1,1", [0, 0, 1, True]])
def test_bad_layer_map(pair, layer_map, tmp_path):
    with pytest.raises(ValueError, match=r"layer map|auxkv_num_layers"):
        convert_checkpoint(pair[0], checkpoints.pair_yaml(tmp_path / "bad.yaml", layer_map), pair[2])


def test_known_architecture_is_compared(pair, tmp_path):
    with pytest.raises(ValueError, match=r"model_dim 64, but OpenELM-270M has 1280.*query heads"):
        convert_checkpoint(pair[0], checkpoints.pair_yaml(tmp_path / "x.yaml", base="OpenELM-270M"), pair[2])
    with pytest.raises(ValueError, match=r"128 rows, but the YAML's vocab_size is 32000"):
        convert_checkpoint(pair[0], checkpoints.pair_yaml(tmp_path / "y.yaml", vocab_size=32000), pair[2])


def test_published_shapes():
    # apple/OpenELM-270M's config on the hub.
    shape = openelm_shape("OpenELM-270M")
    assert shape.query_heads == (12,) * 5 + (16,) * 7 + (20,) * 4
    assert shape.ffn_dims[:4] == (768, 1024, 1280, 1536)
    pruned = openelm_shape("OpenELM-1_1B-0.25l")
    assert pruned.query_heads == openelm_shape("OpenELM-1_1B").query_heads[::4]
    assert openelm_shape("somebody's model") is None
    for name, pair in facts()["pairs"].items():
        assert name == f"{pair['base']}<-{pair['auxiliary']}"
        assert len(pair["layer_map"]) == len(openelm_shape(pair["base"]).kv_heads)
        assert max(pair["layer_map"]) == len(openelm_shape(pair["auxiliary"]).kv_heads) - 1


@pytest.mark.variations
@pytest.mark.parametrize("name", ["OpenELM-270M", "OpenELM-1_1B-0.50l", "OpenELM-3B-0.75l"])
def test_published_shapes_are_read_off_their_tensors(name):
    shape = openelm_shape(name)
    layers = list(zip(shape.query_heads, shape.kv_heads, shape.ffn_dims, strict=True))
    with torch.device("meta"):
        state = checkpoints.openelm_state(layers, shape.model_dim, shape.head_dim, 32128)
    config, problems = read_config({k: tuple(v.shape) for k, v in state.items()})
    assert problems == []
    assert compare_with_name(config, name) == []
    assert compare_with_name(config, "OpenELM-450M") != []


@pytest.mark.parametrize("name", ["layers.0.attn.qkv_proj.weight", "token_embeddings.weight", "norm.weight"])
def test_read_config_survives_any_shape(name):
    shapes = {k: tuple(v.shape) for k, v in checkpoints.openelm_state(checkpoints.BASE_LAYERS).items()}
    for shape in [(), (3,), (0, 0), (5, 7), (2, 2, 2)]:
        _, problems = read_config(shapes | {name: shape})
        assert problems


def test_code_is_not_unpickled(pair, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code from the checkpoint ran",))

    path = tmp_path / "evil.pt"
    checkpoints.save({"model": Evil()}, path)
    with pytest.raises(ValueError, match="refused, unpickling it could run code"):
        convert_checkpoint(path, pair[1], pair[2])
    path.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(ValueError):
        convert_checkpoint(path, pair[1], pair[2])


@pytest.mark.parametrize("kept", [0, 10, 1000, 100_000])
def test_truncated_checkpoint(pair, kept):
    data = pair[0].read_bytes()
    pair[0].write_bytes(data[:kept])
    with pytest.raises(ValueError, match="damaged, or not a PyTorch checkpoint"):
        convert_checkpoint(*pair)
    assert not pair[2].exists()


def test_missing_and_odd_files(pair, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert_checkpoint(tmp_path / "none.pt", pair[1], pair[2])
    with pytest.raises(ValueError, match="needs its YAML's layer map, and no YAML was given"):
        convert_checkpoint(pair[0], None, pair[2])
    (tmp_path / "bad.yaml").write_text("a: [unclosed")
    with pytest.raises(ValueError, match="not YAML"):
        convert_checkpoint(pair[0], tmp_path / "bad.yaml", pair[2])
    (tmp_path / "bad.yaml").write_text("just text")
    with pytest.raises(ValueError, match=r"no model.language_modeling section"):
        convert_checkpoint(pair[0], tmp_path / "bad.yaml", pair[2])
    with pytest.raises(ValueError, match="holds no state_dict"):
        convert_checkpoint(checkpoints.save({"a": 1}, tmp_path / "c.pt"), pair[1], pair[2])


def test_existing_output_is_kept(pair):
    pair[2].mkdir()
    (pair[2] / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        convert_checkpoint(*pair)
    with pytest.raises(FileExistsError, match="not a model directory"):
        convert_checkpoint(*pair, overwrite=True)
    assert (pair[2] / "precious.txt").read_text() == "mine"
    shutil.rmtree(pair[2])
    convert_checkpoint(*pair)
    convert_checkpoint(*pair, overwrite=True, dtype=mx.float16)
    assert load_model(pair[2]).base.transformer.norm.weight.dtype == mx.float16
    assert [p.name for p in pair[2].parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_conversion_leaves_nothing(pair, error, monkeypatch):
    def stop(*args):
        raise error

    with pytest.raises(error):
        convert_checkpoint(*pair, progress=stop)
    monkeypatch.setattr(conversion.mlx_lm.utils, "save_config", stop)
    with pytest.raises(error):
        convert_checkpoint(*pair)
    assert sorted(p.name for p in pair[2].parent.iterdir()) == ["model.pt", "model.yaml"]


def test_overwrite_keeps_the_old_until_the_new_is_whole(tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(RuntimeError), new_directory(out, overwrite=True) as directory:
        (directory / "config.json").write_text("half")
        raise RuntimeError
    assert (out / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_tokenizer_comes_along(tmp_path):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=1,
    )
    torch.manual_seed(0)
    tokenizer_model = tmp_path / "tokenizer.model"
    state = checkpoints.openelm_state(checkpoints.BASE_LAYERS, vocab_size=300)
    path = checkpoints.save(state, tmp_path / "large.pt")
    convert_checkpoint(path, None, tmp_path / "out", tokenizer=tokenizer_model)
    _, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert tokenizer.decode(tokenizer.encode("return a", add_special_tokens=False)) == "return a"
    state = checkpoints.openelm_state(checkpoints.BASE_LAYERS, vocab_size=20)
    with pytest.raises(ValueError, match="tokens, but the model's embedding has 20 rows"):
        convert_checkpoint(
            checkpoints.save(state, tmp_path / "small.pt"),
            None,
            tmp_path / "small",
            tokenizer=tokenizer_model,
        )
    assert not (tmp_path / "small").exists()
