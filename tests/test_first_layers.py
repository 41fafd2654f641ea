"""Pairs that read with their base's own first layers."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from families import INJECTABLE, WINDOW, build
from mlx.utils import tree_map
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache
from pairs import (
    difference,
    first_layers_reference,
    make_first_layers_pair,
    prefill,
    states_difference,
    tapped,
    tokens,
)

from kvpred_mlx import ExactPositions, UnsupportedModelError, load_model, save
from kvpred_mlx.dial.positions import parse_depth
from kvpred_mlx.pair.modes import Mode
from kvpred_mlx.taps.kv_taps import KVTaps
from kvpred_mlx.taps.states import states

TOLERANCE = 1e-4


@pytest.mark.parametrize("family", INJECTABLE)
def test_every_family(family):
    """Up to the depth the entries are the exact ones, bit for bit; the others are what a plain computation gives."""
    taps = tapped(family)
    base, depth = taps.model, (len(taps) - 1) // 2
    if depth == 0:
        pytest.skip("too few layers of its own to cut")
    model = make_first_layers_pair(taps, [depth])
    model.first_layers_reader.check()
    prompt = tokens(2 * WINDOW + 20)
    cache, exact = prefill(model, prompt), make_prompt_cache(base)
    base(prompt, cache=exact)
    mine, own = states(cache[: depth + 1]), states(exact[: depth + 1])
    assert mine.keys() == own.keys() and all(mx.array_equal(mine[key], own[key]) for key in own)
    assert states_difference(cache, first_layers_reference(model, [(depth, prompt)])) < TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base(bits):
    base = build("llama")
    fits = lambda _, module: hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
    nn.quantize(base, group_size=32, bits=bits, class_predicate=fits)
    model, prompt = make_first_layers_pair(base, [1]), tokens(50)
    model.first_layers_reader.check()
    assert difference(prefill(model, prompt), first_layers_reference(model, [(1, prompt)])) < TOLERANCE


def test_laziness():
    """NaN in every weight above the depth that filling the cache must not touch changes nothing."""
    model, prompt = make_first_layers_pair("qwen3", [2]), tokens(50)
    expected = prefill(model, prompt)

    def poison(*modules):
        for module in modules:
            module.update(tree_map(lambda a: mx.full(a.shape, mx.nan, a.dtype), module.parameters()))

    base = model.base.model
    poison(base.norm, model.base.lm_head)
    for i, layer in enumerate(base.layers[2:], 2):
        attention = layer.self_attn
        poison(
            attention.q_proj, attention.q_norm, attention.o_proj, layer.mlp, layer.post_attention_layernorm
        )
        if i > 2:
            poison(attention.k_proj, attention.v_proj, layer.input_layernorm)
    assert difference(prefill(model, prompt), expected) == 0


def test_fused_projections_are_lazy_too():
    model, prompt = make_first_layers_pair("openelm", [1]), tokens(50)
    expected = prefill(model, prompt)
    for layer in model.base.layers[2:]:
        for module in (
            layer.attn.qkv_proj,
            layer.attn.q_norm,
            layer.attn.out_proj,
            layer.ffn,
            layer.attn_norm,
        ):
            module.update(tree_map(lambda a: mx.full(a.shape, mx.nan), module.parameters()))
    assert difference(prefill(model, prompt), expected) == 0


@pytest.mark.variations(2)
@pytest.mark.parametrize("base", ["qwen3", "openelm", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("cuts", [(40, 33), (73,), (40, 5, 28)])
def test_chunks(base, cuts):
    model, prompt = make_first_layers_pair(base, [1]), tokens(73)
    parts, start = [], 0
    for n in cuts:
        parts.append(prompt[:, start : start + n])
        start += n
    expected = first_layers_reference(model, [(1, part) for part in parts])
    assert difference(prefill(model, *parts), expected) < TOLERANCE


def test_turns_have_nothing_to_catch_up_with():
    model = make_first_layers_pair("qwen3", [1])
    first, answer, second = tokens(40), tokens(3, seed=1), tokens(50, seed=2)
    cache = prefill(model, first, *(answer[:, i : i + 1] for i in range(3)), second)
    expected = first_layers_reference(
        model, [(1, first), *[("exact", answer[:, i : i + 1]) for i in range(3)], (1, second)]
    )
    assert difference(cache, expected) < TOLERANCE
    assert not cache[-1].auxiliary and cache[-1].size() == 93
    trim_prompt_cache(cache, 60)
    assert cache[-1].logged() == first[0, :33].tolist()


def test_ragged_batch_is_each_row_alone(tmp_path):
    model = make_first_layers_pair("qwen3", [1])
    prompts = [tokens(n, seed=n)[0].tolist() for n in (60, 41, 52)]
    for dial in (None, ExactPositions(last=0.25), ExactPositions(first=3, top=0.2)):
        model.exact_positions = dial
        together = [row.tolist() for row in decode(model, prompts)]
        alone = [decode(model, [prompt])[0].tolist() for prompt in prompts]
        assert together == alone


def decode(model, prompts, steps=4):
    from mlx_lm.generate import BatchGenerator

    batch = BatchGenerator(model, max_tokens=steps)
    ids = batch.insert(prompts)
    found = {i: [] for i in ids}
    while responses := batch.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    batch.close()
    return [mx.array(found[i]) for i in ids]


@pytest.mark.parametrize("base", ["qwen3", "gemma3_text"])
def test_dial_spans(base):
    model, prompt = make_first_layers_pair(base, [1, 2]), tokens(100)
    model.exact_positions = ExactPositions(first=5, depth=((1, 0.6), (2, 0.9)))
    expected = first_layers_reference(
        model,
        [("exact", prompt[:, :5]), (1, prompt[:, 5:60]), (2, prompt[:, 60:90]), ("exact", prompt[:, 90:])],
    )
    assert difference(prefill(model, prompt), expected) < TOLERANCE


def test_spans_of_an_announced_prompt_do_not_depend_on_its_chunks():
    model, prompt = make_first_layers_pair("qwen3", [1, 2]), tokens(100)
    model.exact_positions = ExactPositions(depth=((1, 0.6), (2, 0.9)))
    caches = []
    for cuts in ((100,), (50, 50), (33, 40, 27)):
        cache, start = model.make_cache(), 0
        cache[-1].announce(100)
        for n in cuts:
            model(prompt[:, start : start + n], cache=cache)
            start += n
        caches.append(cache)
    assert difference(caches[0], caches[1]) < TOLERANCE and difference(caches[0], caches[2]) < TOLERANCE


def test_one_depth_of_several():
    model, prompt = make_first_layers_pair("qwen3", [1, 2]), tokens(60)
    assert difference(prefill(model, prompt), first_layers_reference(model, [(2, prompt)])) < TOLERANCE
    model.exact_positions = ExactPositions(depth=parse_depth("1"))
    assert difference(prefill(model, prompt), first_layers_reference(model, [(1, prompt)])) < TOLERANCE


@pytest.mark.parametrize("base", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("last", [0, 0.2])
def test_top_positions_are_exact_among_predicted_ones(base, last):
    """All chosen: nothing but exact entries is left."""
    model, prompt = make_first_layers_pair(base, [1]), tokens(60)
    model.exact_positions = ExactPositions(last=last, top=1.0)
    exact = make_prompt_cache(model.base)
    model.base(prompt, cache=exact)
    assert difference(prefill(model, prompt), [*exact, None]) < 1e-3
    model.exact_positions = ExactPositions(last=last, top=0.3)
    some = prefill(model, prompt)
    assert difference(some, [*exact, None]) > 1e-2
    model.exact_positions = ExactPositions(last=last)
    assert difference(some, prefill(model, prompt)) > 1e-2


def test_the_prompts_last_tokens_choose_also_from_the_exact_end():
    """The first layers' attention of the very last tokens, though they are not predicted."""
    model, prompt = make_first_layers_pair("qwen3", [2]), tokens(60)
    seen = []
    rows = model.rows._process
    model.rows._process = lambda *args: (seen.append(args[1].tolist()), rows(*args))
    for last in (0.0, 0.2):
        model.exact_positions = ExactPositions(last=last, top=0.2)
        prefill(model, prompt)
    model.exact_positions = ExactPositions(top=0.2)
    changed = mx.concatenate([prompt[:, :55], tokens(5, seed=9)], axis=1)
    prefill(model, changed)
    assert all(max(row) < 48 for row in seen[1]) and seen[0] != seen[2]


def test_logits_are_teacher_forced():
    model, prompt = make_first_layers_pair("qwen3", [1]), tokens(50)
    with_cache = model(prompt, cache=model.make_cache())
    assert mx.allclose(model(prompt), with_cache, atol=1e-4)
    taps = KVTaps(model.base)
    kv, inputs = taps.record(prompt)[0], taps.record_inputs(prompt)[0]
    forced = taps.inject([*kv[:2], *model.predictor.behind(1)(inputs[1])], prompt, logits=True)
    assert mx.allclose(with_cache, forced, atol=1e-4)
    assert mx.array_equal(model(prompt, exact=True), model.base(prompt))


def test_saved_and_loaded(tmp_path):
    model, prompt = (
        make_first_layers_pair("qwen3", [1, 2], exact_positions=ExactPositions(depth=((1, 0.5), (2, 1.0)))),
        tokens(60),
    )
    save(tmp_path / "pair", model)
    again = load_model(tmp_path / "pair")
    assert again.predictor.depths == (1, 2) and again.auxiliary is None
    assert again.exact_positions == model.exact_positions
    assert difference(prefill(again, prompt), prefill(model, prompt)) == 0
    plain = mlx_lm.utils.load_model(tmp_path / "pair")[0]
    assert mx.array_equal(plain(prompt), model(prompt))


def test_prompt_cache_file(tmp_path):
    model, prompt, following = make_first_layers_pair("qwen3", [1]), tokens(60), tokens(40, seed=1)
    cache = prefill(model, prompt)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    for c in (cache, loaded):
        model(following, cache=c)
    assert difference(cache, loaded) == 0 and loaded[-1].logged() == cache[-1].logged()


def test_quantized_predictor_and_parameters():
    model = make_first_layers_pair("llama", [1])
    fits = lambda _, module: hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
    nn.quantize(model, group_size=32, bits=8, class_predicate=fits)
    assert "scales" in model.predictor.at(1).key_maps[0]
    prompt = tokens(50)
    assert difference(prefill(model, prompt), first_layers_reference(model, [(1, prompt)])) < TOLERANCE
    assert {name.split(".")[0] for name in dict(nn.utils.tree_flatten(model.parameters()))} == {
        "base",
        "predictor",
    }


def test_a_draft_is_not_part_of_the_prompt():
    """A short call that is wound back was a draft: its entries become exact, as with an auxiliary."""
    model, prompt, draft = make_first_layers_pair("qwen3", [1]), tokens(40), tokens(4, seed=1)
    cache = prefill(model, prompt, draft)
    trim_prompt_cache(cache, 2)
    following = tokens(1, seed=3)
    model(following, cache=cache)
    expected = first_layers_reference(
        model, [(1, prompt), ("exact", mx.concatenate([draft[:, :2], following], axis=1))]
    )
    assert difference(cache, expected) < TOLERANCE


def test_depths_that_cannot_be():
    with pytest.raises(ValueError, match=r"first layers \[3\], expected ascending numbers from 1 to 2"):
        make_first_layers_pair("qwen3", [3])
    with pytest.raises(ValueError, match="ascending"):
        make_first_layers_pair("qwen3", [2, 1])
    model = make_first_layers_pair("qwen3", [1])
    with pytest.raises(ValueError, match="depth 2, expected one of the pair's: 1"):
        Mode.parse("depth=2").check(model)
    with pytest.raises(UnsupportedModelError, match="no auxiliary model"):
        model.predict(tokens(40))
    for text in ("", "a", "8:2", "8:0.5,4:0.4", "0:0.5", "8:"):
        with pytest.raises(ValueError, match="expected layers and shares"):
            parse_depth(text)


def test_modes_have_names():
    for name in ("depth=1:0.6/2:0.9", "exact-first=4+depth=2:1"):
        assert str(Mode.parse(name)) == name
    asked = Mode().override({"depth": "1:0.5,2:0.9", "exact_top": 0.1})
    assert asked.positions == ExactPositions(top=0.1, depth=((1, 0.5), (2, 0.9)))


def test_a_row_beside_a_longer_one_is_read_at_the_greatest_depth():
    model = make_first_layers_pair("qwen3", [1, 2])
    model.exact_positions = ExactPositions(depth=((1, 0.6), (2, 0.9)))
    prompts = [tokens(n, seed=n)[0].tolist() for n in (60, 41)]
    assert len(decode(model, prompts)) == 2


def test_copies_of_a_cache_are_independent():
    model, prompt = make_first_layers_pair("qwen3", [1]), tokens(40)
    cache = prefill(model, prompt)
    copied = copy.deepcopy(cache)
    model(tokens(40, seed=1), cache=copied)
    assert cache[-1].size() == 40 and copied[-1].size() == 80


@pytest.mark.slow
def test_flops():
    """The first layers and the maps are charged, and nothing above the depth but keys' and values' own products."""
    from kvpred_mlx.bench.common.flops import full_prefill_flops, step_flops, ttft_flops

    model, n = make_first_layers_pair("llama", [1, 2]), 80
    base = model.base
    width, kv = base.args.hidden_size, sum(KVTaps(base).widths[0])
    flops = ttft_flops(model, n)
    assert flops.exact == full_prefill_flops(base, n) and flops.auxiliary is None
    layers = len(base.layers)
    own = 2 * (n - 1) * width * kv  # keys and values of one layer: all that a prefill computes of the last
    whole = (full_prefill_flops(base, n) - step_flops(base, n - 1) - own) / (layers - 1)
    maps = own * (layers - 3)  # from what a layer reads to the keys and values of each behind it
    expected = 2 * whole + own + maps + step_flops(base, n - 1)
    assert flops.predicted == pytest.approx(expected, rel=0.03)
    model.exact_positions = ExactPositions(depth=((1, 0.5), (2, 1.0)))
    shallower = ttft_flops(model, n).predicted
    model.exact_positions = ExactPositions(depth=((1, 1.0),))
    assert ttft_flops(model, n).predicted < shallower < flops.predicted < flops.exact
    model.exact_positions = ExactPositions(top=0.2)
    assert flops.predicted < ttft_flops(model, n).predicted


def test_bench_and_quality_of_a_first_layers_pair():
    import numpy as np

    from kvpred_mlx.bench.front.baselines import METHODS, usable
    from kvpred_mlx.bench.ttft.run import BenchSettings, bench
    from kvpred_mlx.making.quality import measure
    from kvpred_mlx.making.windows import Windows

    model = make_first_layers_pair("qwen3", [1])
    results = bench(model, "pair", BenchSettings([64], trials=1, max_tokens=2))
    shape = results["shapes"][0]
    assert {run["mode"] for run in shape["runs"]} == {"exact", "predicted"}
    assert shape["flops_ratio"] > 1 and min(shape["parts"][0].values()) > 0
    assert "auxiliary" not in results["pair"]["weight_bytes"]
    rows = np.array(tokens(60, batch=4))
    cut = Windows(rows[:, :50], rows[:, 50:], np.arange(4), np.full(4, np.nan))
    found = measure(model, cut)
    assert set(found.modes) == {"exact", "predicted", "no prompt"}
    explained = found.explained_variance["keys"]
    assert explained[:2] == [1.0, 1.0] and max(explained[2:]) < 1
    reasons = usable(model, list(METHODS))
    assert list(reasons) == ["auxiliary"] and "no auxiliary model" in reasons["auxiliary"]
    prompts = tokens(60, batch=2)
    for name, method in METHODS.items():
        if name not in reasons:
            prefilled, cache = method.prefill(model, 0.2)(prompts)
            assert mx.isfinite(prefilled(prompts[:, -1:], cache=cache)).all(), name
            assert method.flops(model, 60, 0.2) > 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_joint_loss_of_a_first_layers_pair(checkpointed):
    """The paper's loss with the maps behind the depth; only they have a gradient, as in finite differences."""
    from kvpred_mlx.making.loss import KVPredictionLoss, LossWeights

    model = make_first_layers_pair("llama", [1])
    model.freeze()
    model.predictor.unfreeze()
    model.base_taps.checkpointed = checkpointed
    loss, batch = KVPredictionLoss(model, LossWeights(z=1e-2)), tokens(33, batch=2)
    value, gradient = nn.value_and_grad(model, lambda m: loss(m, batch)[0])(model)
    flat = dict(nn.utils.tree_flatten(gradient))
    assert set(flat) and all(name.startswith("predictor.first_1.") for name in flat)
    name = "predictor.first_1.value_maps.0.bias"
    maps, step = model.predictor.at(1).value_maps[0], 1e-2
    direction = mx.random.normal(maps.bias.shape, key=mx.random.key(0))
    before = maps.bias
    ends = []
    for sign in (1, -1):
        maps.bias = before + sign * step * direction
        ends.append(loss(model, batch)[0].item())
    numeric = (ends[0] - ends[1]) / (2 * step)
    assert numeric == pytest.approx((flat[name] * direction).sum().item(), rel=0.05)
    terms = loss(model, batch)[1]
    assert "auxiliary" not in terms and value.item() > 0
