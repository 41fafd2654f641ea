"""Pairs of models that keep more than attention keys and values: recurrent and convolutional states, second caches."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from families import STATES, build
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from pairs import first_layers_reference, make_first_layers_pair, make_pair, prefill, tokens
from pairs import states_difference as difference

from kvpred_mlx import ExactPositions, KVPredictionModel, UnsupportedModelError
from kvpred_mlx.bench.common.flops import dial_flops
from kvpred_mlx.generation.repair import RepairingModel
from kvpred_mlx.pair.in_order import BLOCK_TOKENS
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps
from kvpred_mlx.taps.states import states

TOLERANCE = 1e-4

# (base, auxiliary): delta nets, short convolutions, Mamba, token shifts; states alone on either side; mixed in a layer.
PAIRS = [
    ("qwen3_5", "qwen3"),
    ("qwen3_5", "qwen3_5"),
    ("lfm2", "mamba"),
    ("granitemoehybrid", "rwkv7"),
    ("qwen3", "lfm2"),
    ("falcon_h1", "kimi_linear"),
]
BASES = ["qwen3_5", "lfm2", "granitemoehybrid", "mamba2", "falcon_h1", "deepseek_v32"]
EASY = ["qwen3_5", "lfm2"]


def pair_of(base: str, auxiliary: str, **options) -> KVPredictionModel:
    return make_pair(base, auxiliary, source="hidden", **options)


def reference(model: KVPredictionModel, parts):
    """A prompt cache made without the pair's bookkeeping; `parts` are ("predicted" | "exact", tokens) in order."""
    everything = mx.concatenate([t for _, t in parts], axis=1)
    taps, predicted = model.base_taps, model.predictor(model.auxiliary_features(everything))
    cache, start = make_prompt_cache(model.base), 0
    for kind, part in parts:
        stop = start + part.shape[1]
        if kind == "predicted":
            kv = [KV(k[:, start:stop], v[:, start:stop]) for k, v in predicted]
            taps.inject(kv, part, cache, logits=False)
        else:
            model.base(part, cache=cache)
        mx.eval([c.state for c in cache])
        start = stop
    return [*cache, None]


@pytest.mark.variations(4)
@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
@pytest.mark.parametrize("cuts", [(), (17,), (16, 33)])
def test_chunks_and_turns(base, auxiliary, cuts):
    model = pair_of(base, auxiliary, min_prompt_tokens=8)
    prompt, answer, turn = tokens(50, 1), tokens(3, 2), tokens(40, 3)
    pieces = [prompt[:, a:b] for a, b in zip((0, *cuts), (*cuts, 50), strict=True)]
    cache = prefill(model, *pieces)
    for i in range(3):
        model(answer[:, i : i + 1], cache=cache)
    prefill(model, turn, cache=cache)
    parts = [("predicted", prompt), *(("exact", answer[:, i : i + 1]) for i in range(3)), ("predicted", turn)]
    assert difference(cache, reference(model, parts)) < TOLERANCE


@pytest.mark.parametrize("base", BASES)
def test_first_layers_in_chunks(base):
    model = make_first_layers_pair(base, (1, 2), min_prompt_tokens=8)
    prompt = tokens(50, 1)
    cache = prefill(model, prompt[:, :21], prompt[:, 21:])
    assert difference(cache, first_layers_reference(model, [(2, prompt)])) < TOLERANCE
    exact = model.make_cache()
    model(prompt, cache=exact, exact=True)
    mine, own = (states(c[:3]) for c in (cache, exact))
    assert all(mx.allclose(mine[key], own[key], atol=TOLERANCE) for key in own)


@pytest.mark.variations(4)
@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
@pytest.mark.parametrize("lengths", [(50, 50), (50, 33), (64, 9)])
def test_rows_of_a_padded_batch_are_those_of_single_prompts(base, auxiliary, lengths):
    model = pair_of(base, auxiliary, min_prompt_tokens=8)
    rows = [tokens(n, 5 + i) for i, n in enumerate(lengths)]
    batch = batched(model, rows)
    following = tokens(1, 9, batch=2)
    logits = model(following, cache=batch)
    for i, row in enumerate(rows):
        alone = prefill(model, row)
        assert mx.allclose(logits[i], model(following[i : i + 1], cache=alone)[0], atol=1e-3)


def batched(model, rows):
    """A cache that has read a right-padded batch, as mlx-lm's batch generator does it."""
    singles = [model.make_cache() for _ in rows]
    cache = [kind[0].merge(list(kind)) for kind in zip(*singles, strict=True)]
    most, lengths = max(r.shape[1] for r in rows), [r.shape[1] for r in rows]
    padding = [most - n for n in lengths]
    padded = mx.concatenate([mx.pad(r, [(0, 0), (0, p)]) for r, p in zip(rows, padding, strict=True)])
    for c in cache:
        c.prepare(lengths=lengths, right_padding=padding)
    model(padded, cache=cache)
    mx.eval([c.state for c in cache])
    for c in cache:
        c.finalize()
    return cache


@pytest.mark.parametrize("dial", [ExactPositions(first=5), ExactPositions(last=0.2), ExactPositions(3, 7)])
@pytest.mark.parametrize(("base", "auxiliary"), PAIRS[:3])
def test_the_dial_s_ends(base, auxiliary, dial):
    model = pair_of(base, auxiliary, min_prompt_tokens=8, exact_positions=dial)
    prompt = tokens(50, 1)
    first, last = dial.first, 50 - dial.last_of(50)
    parts = [("exact", prompt[:, :first]), ("predicted", prompt[:, first:last]), ("exact", prompt[:, last:])]
    expected = reference(model, [(kind, t) for kind, t in parts if t.size])
    assert difference(prefill(model, prompt), expected) < TOLERANCE


@pytest.mark.parametrize("last", [0, 0.1])
@pytest.mark.parametrize(
    ("base", "auxiliary"), [("qwen3_5", "qwen3"), ("lfm2", "qwen3_5"), ("deepseek_v32", "qwen3")]
)
def test_top_means_blocks_in_order(base, auxiliary, last):
    model = pair_of(base, auxiliary, min_prompt_tokens=8)
    model.exact_positions = ExactPositions(first=4, last=last, top=0.3)
    prompt, spans, inner = tokens(200, 1), [], model.base_taps.model
    cache = prefill(model, prompt)
    model.base_taps.model = Noted(inner, spans)
    again = prefill(model, prompt)
    model.base_taps.model = inner
    assert difference(cache, again) == 0
    lengths = [n for n in spans if n > 1]
    assert sum(lengths) == 4 + model.exact_positions.last_of(200) + 60
    end = model.exact_positions.last_of(200)
    assert 2 <= len(lengths) <= 2 + 60 // BLOCK_TOKENS + 1 + bool(end)


class Noted:
    """A base that notes how many tokens it is given."""

    def __init__(self, base, spans):
        self._base, self._spans = base, spans

    def __getattr__(self, name):
        return getattr(self._base, name)

    def __call__(self, inputs, cache=None):
        self._spans.append(inputs.shape[1])
        return self._base(inputs, cache=cache)


@pytest.mark.parametrize("base", EASY)
def test_everything_on_top_is_the_exact_cache(base):
    for model in (
        pair_of(base, "qwen3", min_prompt_tokens=8),
        make_first_layers_pair(base, (2,), min_prompt_tokens=8),
    ):
        model.exact_positions = ExactPositions(top=1.0)
        prompt, exact = tokens(90, 1), model.make_cache()
        model(prompt, cache=exact, exact=True)
        assert difference(prefill(model, prompt), exact) < TOLERANCE


def test_the_tokens_that_are_listened_to_decide():
    model = make_first_layers_pair("qwen3_5", (2,), min_prompt_tokens=8)
    model.exact_positions = ExactPositions(top=0.25)
    prompt = tokens(128, 1)
    plain, dialled = copy.copy(model), prefill(model, prompt)
    plain.exact_positions = None
    exact = model.make_cache()
    model(prompt, cache=exact, exact=True)
    assert difference(dialled, exact) > 0 and difference(prefill(plain, prompt), dialled) > 0


@pytest.mark.variations(3)
@pytest.mark.parametrize("dial", [ExactPositions(top=0.3), ExactPositions(first=5, last=0.2, top=0.2)])
@pytest.mark.parametrize(("base", "cuts"), [("qwen3_5", ()), ("qwen3_5", (70,)), ("lfm2", (70,))])
def test_first_layers_that_are_listened_to_need_not_read_again(base, cuts, dial, monkeypatch):
    model = make_first_layers_pair(base, (2,), min_prompt_tokens=8, exact_positions=dial)
    prompt, read = tokens(128, 1), []
    pieces = [prompt[:, a:b] for a, b in zip((0, *cuts), (*cuts, 128), strict=True)]
    first, call = model.base.layers[0], type(model.base.layers[0]).__call__

    def noted(self, x, *args, **kwargs):
        if self is first:
            read.append(x.shape[1])
        return call(self, x, *args, **kwargs)

    assert model.reader.resumable(2)
    monkeypatch.setattr(type(first), "__call__", noted)
    once = prefill(model, *pieces)
    assert sum(n for n in read if n > 2) == 128  # families are tried on two tokens
    flops = dial_flops(model, dial, 129)
    monkeypatch.setattr(model.reader, "resumable", lambda depth: False)
    read.clear()
    twice = prefill(model, *pieces)
    assert sum(n for n in read if n > 2) >= 256 and dial_flops(model, dial, 129) > flops
    assert difference(once, twice) < TOLERANCE


def test_no_attention_that_could_choose():
    model = make_first_layers_pair(
        "mamba2", (1,), min_prompt_tokens=8, exact_positions=ExactPositions(top=0.5)
    )
    with pytest.raises(UnsupportedModelError, match="no attention among its first 1 layers"):
        prefill(model, tokens(50))


@pytest.mark.parametrize("dial", [ExactPositions(last=0.2), ExactPositions(first=3, top=0.5)])
@pytest.mark.parametrize(
    "make",
    [
        lambda **options: pair_of("qwen3_5", "qwen3", **options),
        lambda **options: make_first_layers_pair("qwen3_5", (2,), **options),
    ],
)
def test_a_padded_batch_with_a_dial(make, dial):
    model = make(min_prompt_tokens=8, exact_positions=dial)
    rows = [tokens(80, 1), tokens(60, 2)]
    cache = batched(model, rows)
    alone = prefill(model, rows[1])
    whole = model.make_cache()
    model(rows[1], cache=whole, exact=True)
    following = tokens(1, 9, batch=2)
    logits = model(following, cache=cache)[1]
    exact, single = (model(following[1:], cache=c)[0] for c in (whole, alone))
    # As much is exact as in the row alone, or more.
    assert mx.abs(logits - exact).max() < 2 * mx.abs(single - exact).max() + TOLERANCE


@pytest.mark.variations(2)
@pytest.mark.parametrize("source", ["auxiliary", "first layers"])
@pytest.mark.parametrize("base", EASY)
def test_repair(base, source):
    pair = pair_of(base, "qwen3") if source == "auxiliary" else make_first_layers_pair(base, (2,))
    prompt, answer, model = tokens(80, 1), tokens(40, 2), RepairingModel(pair, budget=1.0)
    cache = pair.make_cache()
    model(prompt, cache=cache)
    mx.eval([c.state for c in cache])
    for i in range(40):
        mx.eval(model(answer[:, i : i + 1], cache=cache))
    assert model.status.exact_from is not None
    plain = make_prompt_cache(pair.base)
    pair.base(prompt, cache=plain)
    for i in range(40):
        pair.base(answer[:, i : i + 1], cache=plain)
    assert difference(cache, [*plain, None]) < 1e-3


@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
def test_prompt_cache_files(base, auxiliary, tmp_path):
    model = pair_of(base, auxiliary, min_prompt_tokens=8)
    prompt, turn = tokens(50, 1), tokens(40, 3)
    cache = prefill(model, prompt)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    again = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    for c in (cache, again):
        model(tokens(1, 2), cache=c)
        prefill(model, turn, cache=c)
    assert difference(cache, again) < TOLERANCE


@pytest.mark.parametrize("base", BASES)
def test_laziness_nothing_but_the_needed_weights(base):
    """Every weight that is NaN must not be needed: all of the base but what stands behind the injected places."""
    model = make_first_layers_pair(base, (1,), min_prompt_tokens=8)
    prompt = tokens(50, 1)
    expected = prefill(model, prompt)
    depth = model.base_taps.layer_of(1)

    def spoil(path, array):
        name = next((p for p in path.split(".") if p.isdigit()), None)
        later = name is not None and int(name) > depth and "layers" in path
        large = path.endswith("weight") and array.ndim == 2
        return array * float("nan") if later and large else array

    model.base.update(tree_map_with_path(spoil, model.base.parameters()))
    assert any(bool(mx.any(mx.isnan(a))) for _, a in tree_flatten(model.base.parameters()) if a.ndim == 2)
    assert difference(prefill(model, prompt), expected) == 0


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "granitemoehybrid", "kimi_linear"])
def test_a_window_s_columns_are_predicted_on_its_rows_alone(family):
    model = pair_of(family, "qwen3", min_prompt_tokens=8)
    [tail] = {t for t in model.base_taps.tails if t}
    asked = []
    features = model.auxiliary_features(tokens(50))
    kv = model.predictor(features, model.base_taps.tails)
    whole = model.predictor(features)
    for few, every, rows in zip(kv, whole, model.base_taps.tails, strict=True):
        asked.append(few.values.shape[1])
        assert few.values.shape[1] == (rows or 50)
        assert mx.allclose(few.values, every.values[:, -(rows or 50) :], atol=1e-5)
        assert mx.allclose(few.keys, every.keys, atol=1e-5)
    assert tail in asked and 50 in asked


def test_quantized_maps_of_windows():
    model = pair_of("qwen3_5", "qwen3", min_prompt_tokens=8)
    nn.quantize(model.predictor, group_size=32, bits=8)
    features, tails = model.auxiliary_features(tokens(50)), model.base_taps.tails
    few, every = model.predictor(features, tails), model.predictor(features)
    for a, b, rows in zip(few, every, tails, strict=True):
        assert mx.allclose(a.values, b.values[:, -(rows or 50) :], atol=1e-5)


def test_every_place_has_a_name():
    taps = KVTaps(build("qwen3_next"))
    assert [[place.name for place in layer] for layer in taps.places[:2]] == [
        ["linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"],
        ["self_attn.k_proj", "self_attn.v_proj"],
    ]
    assert taps.tails == [3, None, 3, None]


def test_all_families_with_states_are_built():
    assert {base for base, _ in PAIRS if base != "qwen3"} | set(BASES) <= set(STATES)
