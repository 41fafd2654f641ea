"""Closed-form fits: against numpy, from a model to itself, for several families, from the command line."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from families import build
from mlx_lm.models.cache import make_prompt_cache
from pairs import tokens

from kvpred_mlx import KVPredictionModel, load, save
from kvpred_mlx.convert.published import facts
from kvpred_mlx.making import layer_maps
from kvpred_mlx.making.attention_weights import AttentionWeights
from kvpred_mlx.making.data import PackedSequences
from kvpred_mlx.making.fit import fit, fit_first_layers
from kvpred_mlx.making.moments import Moments, Ridge
from kvpred_mlx.making.quality import measure
from kvpred_mlx.making.regression import Sums, TwoModels, moments_of
from kvpred_mlx.making.settings import FitSettings
from kvpred_mlx.making.windows import cut_windows
from kvpred_mlx.pair import sources
from kvpred_mlx.taps.kv_taps import KVTaps

FAMILIES = [
    ("openelm", "openelm"),
    ("llama", "qwen2"),
    ("qwen3", "llama"),
    ("gemma3_text", "qwen3"),
    ("olmoe", "qwen2"),
]


def data(rows=24, length=32, seed=0) -> PackedSequences:
    return PackedSequences(np.array(tokens(length + 1, seed, rows)))


def test_even_reproduces_every_published_map():
    pairs = facts()["pairs"]
    assert len(pairs) == 11
    for name, pair in pairs.items():
        published = pair["layer_map"]
        assert layer_maps.even(len(published), max(published) + 1) == published, name


def test_even_for_an_auxiliary_as_deep_or_deeper():
    assert layer_maps.even(3, 3) == [0, 1, 2]
    assert layer_maps.even(2, 4) == [0, 2]
    assert layer_maps.even(4, 1) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "kept"), [("0.25", [0, 4]), ("0.5", [0, 2, 4, 6]), ("0.75", [0, 1, 2, 4, 5, 6]), ("1,7", [1, 7])]
)
def test_kept_layers(text, kept):
    assert layer_maps.kept_layers(text, 8) == kept


@pytest.mark.parametrize("text", ["0.3", "1", "a", "3,1", "0,8", "", "-1,2", "0,,1"])
def test_kept_layers_refused(text):
    if text == "1":
        assert layer_maps.kept_layers(text, 8) == [1]
        return
    with pytest.raises(ValueError, match=r"expected 0.25, 0.5, 0.75 or an ascending list"):
        layer_maps.kept_layers(text, 8)


def test_ridge_is_least_squares_and_ridge():
    rng = np.random.default_rng(0)
    x = rng.normal(3, [1, 5, 0.1, 2], (300, 4))
    x = np.hstack([x, x[:, :1], np.full((300, 1), 7.0)])  # a repeated and a constant feature
    y = rng.normal(size=(300, 3)) + x[:, :3] @ rng.normal(size=(3, 3))
    moments = Moments.zeros(6, 3)
    for part in range(3):
        moments.add(x[part * 100 : part * 100 + 100], y[part * 100 : part * 100 + 100])
    ridge = Ridge(moments)
    solved = ridge.solve(0.0)
    with_one = np.hstack([x, np.ones((300, 1))])
    expected = with_one @ np.linalg.lstsq(with_one, y, rcond=None)[0]
    assert np.allclose(x @ solved.weight.T + solved.bias, expected, atol=1e-8)
    assert np.allclose(ridge.squared_errors(moments, [0.0])[0], ((y - expected) ** 2).sum(0))
    z = (x[:, :4] - x[:, :4].mean(0)) / x[:, :4].std(0)
    four = Moments.zeros(4, 3)
    four.add(x[:, :4], y)
    shrunk = Ridge(four).solve(0.5)
    weight = np.linalg.solve(z.T @ z / 300 + 0.5 * np.eye(4), z.T @ (y - y.mean(0)) / 300)
    assert np.allclose(shrunk.weight.T * x[:, :4].std(0)[:, None], weight)
    each = Ridge(four).solve(np.array([0.5, 0.0, 2.0]))
    assert np.allclose(each.weight[0], shrunk.weight[0])
    assert np.allclose(each.bias[1], Ridge(four).solve(0.0).bias[1])
    other, x, y = Moments.zeros(4, 3), rng.normal(1, 2, (50, 4)), rng.normal(5, 3, (50, 3))
    other.add(x, y)
    found = Ridge(four).squared_errors(other, [0.5, 0.0])
    assert np.allclose(found[0], ((y - x @ shrunk.weight.T - shrunk.bias) ** 2).sum(0))
    assert np.allclose(other.deviations(), 50 * y.var(0))


@pytest.mark.parametrize("source", sources.SOURCES)
def test_fit_is_numpys_least_squares(source):
    base, auxiliary = build("qwen3"), build("qwen2")
    packed = data(16)
    fitted = fit(
        base, auxiliary, packed, FitSettings(layer_map="0,1,1,3", ridge=0.0, source=source, batch_size=4)
    )
    assert fitted.tokens == 16 * 32
    rows = mx.array(packed.rows[:, :-1])
    features, _ = sources.record(source, KVTaps(auxiliary), rows)
    true, _ = KVTaps(base).record(rows)
    predicted = fitted.predictor(features)
    for i, m in enumerate(fitted.predictor.layer_map):
        for part in range(2):
            x = np.array(features[m][0 if part == 0 else -1]).reshape(-1, features[m][0].shape[-1])
            x = np.hstack([x, np.ones((len(x), 1))]).astype(float)
            y = np.array(true[i][part]).reshape(len(x), -1)
            expected = x @ np.linalg.lstsq(x, y, rcond=None)[0]
            assert np.abs(np.array(predicted[i][part]).reshape(len(x), -1) - expected).max() < 1e-3


@pytest.mark.parametrize("first_layers", [False, True])
def test_tokens_count_by_the_attention_that_the_base_pays_them(first_layers):
    """Weighted least squares, and weights whose mean is 1; without them, or where attention is not seen, all alike."""
    base, auxiliary = build("qwen3"), build("qwen2")
    packed = data(16, 96)
    rows = packed.rows
    taps = KVTaps(base)

    def fitted(**settings):
        chosen = FitSettings(layer_map="0,1,1,3", ridge=0.0, batch_size=4, source="hidden", **settings)
        found = (
            fit_first_layers(taps, [1], packed, chosen)
            if first_layers
            else fit(taps, auxiliary, packed, chosen)
        )
        return found.predictor

    tokens, inputs = mx.array(rows[:, :-1]), []
    true, weights = AttentionWeights(taps).record(tokens, inputs=inputs)
    assert np.allclose(np.array(weights).mean(axis=1), 1) and mx.all(weights[:, -64:] == 1)
    assert float(mx.abs(weights[:, :-64] - 1).max()) > 0.05
    read = sources.record("hidden", KVTaps(auxiliary), tokens)[0]
    features = inputs[1] if first_layers else read[3][0]
    i = 3  # the base's last layer
    x = np.array(features).reshape(-1, features.shape[-1]).astype(float)
    x, w = np.hstack([x, np.ones((len(x), 1))]), np.sqrt(np.array(weights, float).reshape(-1, 1))
    for predictor, scale in ((fitted(), w), (fitted(weighted=False), np.ones_like(w))):
        made = predictor.behind(1)(features)[i - 2] if first_layers else predictor(read)[i]
        for part in range(2):
            y = np.array(true[i][part]).reshape(len(x), -1)
            expected = x @ np.linalg.lstsq(x * scale, y * scale, rcond=None)[0]
            assert np.abs(np.array(made[part]).reshape(len(x), -1) - expected).max() < 1e-3


@pytest.mark.variations
@pytest.mark.parametrize("family", ["llama", "openelm", "qwen3"])
def test_a_model_predicts_itself(family):
    model, twin = build(family), build(family)
    twin.update(model.parameters())
    n = len(KVTaps(model))
    fitted = fit(model, twin, data(64), FitSettings(layer_map=",".join(map(str, range(n))), source="kv"))
    pair = KVPredictionModel(model, twin, fitted.predictor, min_prompt_tokens=2)
    prompt = tokens(40, seed=5)
    cache, exact = pair.make_cache(), make_prompt_cache(model)
    pair(prompt[:, :-1], cache=cache)
    model(prompt[:, :-1], cache=exact)
    for ours, theirs in zip(cache, exact, strict=False):
        for a, b in zip(ours.keys_and_values(), theirs.keys_and_values(), strict=True):
            assert mx.abs(a - b).max() < 1e-3
    token = prompt[:, -1:]
    for _ in range(8):
        a, b = pair(token, cache=cache), model(token, cache=exact)
        token = mx.argmax(b[:, -1:], axis=-1)
        assert mx.array_equal(mx.argmax(a[:, -1:], axis=-1), token)


def test_auto_finds_the_layer_that_is_the_same():
    base, auxiliary = build("llama"), build("llama")
    order = [1, 0, 3, 2]
    for i, j in enumerate(order):  # the auxiliary's layers are the base's, out of order, on the same inputs
        for name in ("k_proj", "v_proj"):
            auxiliary.layers[j].self_attn[name].weight = base.layers[i].self_attn[name].weight
    for layer in (
        *base.layers,
        *auxiliary.layers,
    ):  # residual branches of zero: every layer reads the embedding
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
    auxiliary.model.embed_tokens.weight = base.model.embed_tokens.weight
    for i, j in enumerate(order):
        auxiliary.layers[j].input_layernorm.weight = base.layers[i].input_layernorm.weight
    # Narrow keys do not tell a layer from another unless they are its own.
    fitted = fit(base, auxiliary, data(64), FitSettings(source="kv", layer_map="auto"))
    assert list(fitted.predictor.layer_map) == order
    assert all(v > 0.999 for part in fitted.explained_variance.values() for v in part)


@pytest.mark.variations(2)
@pytest.mark.parametrize("source", sources.SOURCES)
@pytest.mark.parametrize(("base", "auxiliary"), FAMILIES)
def test_fitted_pairs_are_saved_loaded_and_generate(base, auxiliary, source, tmp_path):
    first, second = build(base), build(auxiliary)
    fitted = fit(first, second, data(), FitSettings(source=source, batch_size=4))
    pair = KVPredictionModel(first, second, fitted.predictor)
    save(tmp_path / "pair", pair)
    again, _ = load(tmp_path / "pair")
    assert again.predictor.source == source
    prompt = tokens(50, seed=3)
    caches = [m.make_cache() for m in (pair, again)]
    for model, cache in zip((pair, again), caches, strict=True):
        model(prompt[:, :-1], cache=cache)
    logits = [m(prompt[:, -1:], cache=c) for m, c in zip((pair, again), caches, strict=True)]
    assert mx.allclose(*logits, atol=1e-4)
    explained = fitted.explained_variance
    assert len(explained["keys"]) == len(KVTaps(first)) and max(explained["keys"]) <= 1


@pytest.mark.parametrize("base", ["lfm2", "deepseek_v2"])
def test_layers_that_keep_only_keys_or_only_values(base):
    """A convolution's window is values alone, latent attention keys alone."""
    first, second = build(base), build("qwen2")
    settings = FitSettings(source="hidden", layer_map="auto", batch_size=4)
    fitted = fit(first, second, data(), settings)
    widths = np.array(KVTaps(first).widths)
    assert not widths.all()
    for part, name in enumerate(("keys", "values")):
        explained = np.array(fitted.explained_variance[name])
        assert np.all((explained[widths[:, part] > 0] != 0) & (explained[widths[:, part] > 0] < 1))
    for pair in (
        KVPredictionModel(first, second, fitted.predictor, min_prompt_tokens=2),
        KVPredictionModel(first, None, fit_first_layers(first, [1], data(), settings).predictor, 2),
    ):
        documents = data(4, 40).rows.tolist()
        quality = measure(pair, cut_windows(documents, 20, 5))
        assert all(np.isfinite(list(layers.values())).all() for layers in quality.explained().values())


def test_settings_and_data_refused():
    for wrong, message in (
        ({"source": "keys"}, "source 'keys', expected one of kv, kv-joint, hidden"),
        ({"tokens": 0}, "tokens is 0"),
        ({"ridge": -1.0}, "ridge is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            FitSettings(**wrong)
    with pytest.raises(ValueError, match="layer map '0,9', expected auto, even, or 4"):
        fit(build("llama"), build("llama"), data(), FitSettings(layer_map="0,9"))
    with pytest.raises(ValueError, match="expected at least 2"):
        fit(build("llama"), build("llama"), data(1), FitSettings())
    with pytest.raises(ValueError, match="has 5 tokens, expected at least 33"):
        PackedSequences.of([[1, 2, 3], [4, 5]], 32, None)


def test_memory_does_not_grow_with_the_tokens():
    sizes = [sum(a.nbytes for a in vars(Moments.zeros(8, 4)).values() if isinstance(a, np.ndarray))]
    moments = Moments.zeros(8, 4)
    for _ in range(5):
        moments.add(np.ones((100, 8)), np.ones((100, 4)))
    sizes.append(sum(a.nbytes for a in vars(moments).values() if isinstance(a, np.ndarray)))
    assert sizes[0] == sizes[1] and moments.n == 500


@pytest.mark.parametrize("weighted", [False, True])
def test_products_on_the_device_are_those_on_the_host(weighted):
    recorder = TwoModels(KVTaps(build("qwen3")), KVTaps(build("qwen2")), "hidden", weighted)
    targets = {recorder.key(0, 0): [(0, 0), (2, 1)], recorder.key(1, 0): [(1, 0)]}
    host, device = (Sums(recorder, targets, 5, on_host=on_host) for on_host in (True, False))
    for i in range(3):
        batch = tokens(90, seed=i, batch=2)
        for sums in (host, device):
            sums.read(batch, held_out=i == 1)
    assert device.tokens == host.tokens == 540
    for (name, theirs), mine in zip(host.state().items(), device.state().values(), strict=True):
        assert np.allclose(mine, theirs, rtol=1e-5, atol=1e-3), name


@pytest.mark.parametrize("weighted", [False, True])
def test_products_in_float32_stand_large_means(weighted):
    """Keys of some models have biases a hundred times as large as what varies in them."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(400, 5)) + 100, draw.normal(size=(400, 3)) * 0.1 - 300
    x, y = x.astype(np.float32), y.astype(np.float32)
    w = draw.uniform(0.5, 1.5, 400).astype(np.float32) if weighted else None
    made = moments_of(mx.array(x), mx.array(y), None if w is None else mx.array(w))
    exact = Moments.zeros(5, 3)
    exact.add(x.astype(np.float64), y.astype(np.float64), None if w is None else w.astype(np.float64))
    assert np.allclose(made.deviations(), exact.deviations(), rtol=1e-4)
    mine, theirs = (Ridge(m).solve(0.0) for m in (made, exact))
    assert np.allclose(mine.weight, theirs.weight, atol=1e-5)
