"""A pair as an mlx-lm model: prompts, chunks, conversations, batches."""

from __future__ import annotations

import copy
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest
from families import build
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import BatchGenerator, batch_generate
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache
from pairs import PAIRS, difference, kv_entries, make_pair, prefill, reference_cache, tokens
from test_families import leaky_llama

from kvpred_mlx import KVPredictionModel, Predictor, UnsupportedModelError
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache

TOLERANCE = 1e-4


def decode(model, cache, given):
    """Feed the tokens `given` [B, N] one by one; returns the logits of the last."""
    for i in range(given.shape[1]):
        logits = model(given[:, i : i + 1], cache=cache)
        mx.eval(logits)
    return logits


@pytest.mark.variations(2)
@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
def test_prompt_is_predicted(base, auxiliary):
    model = make_pair(base, auxiliary)
    prompt = tokens(50, batch=2)
    cache = prefill(model, prompt)
    assert difference(cache, reference_cache(model, [("predicted", prompt)])) < TOLERANCE
    exact = model.make_cache()
    model(prompt, cache=exact, exact=True)
    assert difference(cache, exact) > 0.01, "a prediction from random maps cannot be the exact cache"


@pytest.mark.variations(2)
@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
@pytest.mark.parametrize("steps", [(40, 33), (64, 9), (33, 33, 7), (48, 2, 3, 20)])
def test_chunks_give_the_cache_of_one_shot(base, auxiliary, steps):
    model = make_pair(base, auxiliary)
    prompt = tokens(sum(steps), seed=1)
    ends = [sum(steps[: i + 1]) for i in range(len(steps))]
    chunks = [prompt[:, end - n : end] for n, end in zip(steps, ends, strict=True)]
    one, many = prefill(model, prompt), prefill(model, *chunks)
    assert difference(one, many) < TOLERANCE
    last = tokens(1, seed=2)
    assert mx.allclose(model(last, cache=one), model(last, cache=many), atol=TOLERANCE)


@pytest.mark.variations(2)
@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
def test_second_turn_catches_up(base, auxiliary):
    model = make_pair(base, auxiliary)
    first, answer, second = tokens(40, 1), tokens(9, 2), tokens(45, 3)
    cache = prefill(model, first)
    decode(model, cache, answer)
    prefill(model, second, cache=cache)
    parts = [
        ("predicted", first),
        *(("exact", answer[:, i : i + 1]) for i in range(9)),
        ("predicted", second),
    ]
    assert difference(cache, reference_cache(model, parts)) < TOLERANCE


@pytest.mark.variations(2)
@pytest.mark.parametrize(("base", "auxiliary"), [p for p in PAIRS if "gemma3_text" not in p])
@pytest.mark.parametrize("trimmed", [3, 9, 20])
def test_trimmed_and_reloaded_cache_predicts_on(base, auxiliary, trimmed, tmp_path):
    model = make_pair(base, auxiliary)
    first, answer, second = tokens(40, 1), tokens(9, 2), tokens(45, 3)
    cache = prefill(model, first)
    decode(model, cache, answer)
    assert trim_prompt_cache(cache, trimmed) == trimmed
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    cache = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert isinstance(cache[-1], AuxiliaryCache)
    prefill(model, second, cache=cache)
    kept = 40 - max(0, trimmed - 9), max(0, 9 - trimmed)
    parts = [("predicted", first[:, : kept[0]])]
    parts += [("exact", answer[:, i : i + 1]) for i in range(kept[1])] + [("predicted", second)]
    assert difference(cache, reference_cache(model, parts)) < TOLERANCE


def test_auxiliary_window_that_cannot_be_trimmed_is_read_again():
    model = make_pair("qwen3", "gemma3_text")  # the auxiliary's window is 8
    prompt, second = tokens(60, 1), tokens(45, 3)
    cache = prefill(model, prompt)
    assert trim_prompt_cache(cache, 20) == 20
    prefill(model, second, cache=cache)
    parts = [("predicted", prompt[:, :40]), ("predicted", second)]
    assert difference(cache, reference_cache(model, parts)) < TOLERANCE


@pytest.mark.variations(2)
@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
def test_exact_is_the_base_bit_for_bit(base, auxiliary):
    model = make_pair(base, auxiliary)
    prompt, answer = tokens(50, 1), tokens(5, 2)
    plain = make_prompt_cache(model.base)
    expected = [
        model.base(prompt, cache=plain),
        *(model.base(answer[:, i : i + 1], cache=plain) for i in range(5)),
    ]
    model.exact = True
    cache = model.make_cache()
    found = [model(prompt, cache=cache), *(model(answer[:, i : i + 1], cache=cache) for i in range(5))]
    assert all(mx.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert mx.array_equal(model(prompt), model.base(prompt))
    model.exact = False
    assert mx.array_equal(model(prompt, exact=True), model.base(prompt))
    assert not mx.allclose(model(prompt), model.base(prompt), atol=1e-3)


def test_prompt_under_the_minimum_runs_the_base_alone():
    model = make_pair(min_prompt_tokens=16)
    model.auxiliary.update(tree_map(lambda a: mx.full(a.shape, mx.nan), model.auxiliary.parameters()))
    prompt = tokens(15)
    cache = model.make_cache()
    assert mx.array_equal(model(prompt, cache=cache), model.base(prompt, cache=make_prompt_cache(model.base)))
    assert mx.array_equal(model(prompt), model.base(prompt))
    assert mx.isnan(model(tokens(16), cache=model.make_cache())).any()


def test_short_first_prompt_is_caught_up_on():
    model = make_pair()
    first, second = tokens(10, 1), tokens(40, 2)
    cache = prefill(model, first, second)
    assert difference(cache, reference_cache(model, [("exact", first), ("predicted", second)])) < TOLERANCE


def test_layers_match_cache_entries():
    for base, auxiliary in PAIRS:
        model = make_pair(base, auxiliary)
        assert len(model.layers) == len(model.make_cache())


@pytest.mark.parametrize(("base", "auxiliary"), [("qwen3", "qwen2"), ("openelm", "openelm")])
def test_teacher_forced_matches_the_cached_call(base, auxiliary):
    model = make_pair(base, auxiliary)
    prompt = tokens(40, 1)
    assert mx.allclose(model(prompt), model(prompt, cache=model.make_cache()), atol=TOLERANCE)


@pytest.mark.variations
@pytest.mark.parametrize("lengths", [(40, 40), (33, 60, 45), (70, 5, 33)])
@pytest.mark.parametrize(("base", "auxiliary"), [p for p in PAIRS if p[0] != "deepseek_v3"])
def test_ragged_batches_equal_single_prompts(base, auxiliary, lengths):
    """mlx-lm pads a batch on the right and rolls it; rows must come out as if they were alone."""
    model = make_pair(base, auxiliary)
    prompts = [tokens(n + 1, seed=n)[0].tolist() for n in lengths]
    for step in (2048, 36):
        generator = BatchGenerator(model, max_tokens=4, prefill_step_size=step)
        uids = generator.insert(prompts)
        done = {}
        while responses := generator.next_generated():
            done |= {r.uid: r for r in responses if r.finish_reason}
        for uid, prompt, n in zip(uids, prompts, lengths, strict=True):
            alone = (
                prefill(model, mx.array([prompt[:n]]))
                if n >= 32
                else reference_like_a_long_one(model, prompt, n)
            )
            for token in done[uid].all_tokens[n:]:
                model(mx.array([[token]]), cache=alone)
            assert difference(done[uid].prompt_cache, alone) < TOLERANCE


def reference_like_a_long_one(model, prompt, n):
    """In a batch the longest row decides: a short row beside it is predicted too."""
    minimum, model.min_prompt_tokens = model.min_prompt_tokens, 2
    cache = prefill(model, mx.array([prompt[:n]]))
    model.min_prompt_tokens = minimum
    return cache


@pytest.mark.variations
@pytest.mark.parametrize(
    ("base", "auxiliary"), [("qwen3", "qwen2"), ("openelm", "openelm"), ("qwen3", "gemma3_text")]
)
def test_batch_of_conversations_that_lag_differently(base, auxiliary):
    model = make_pair(base, auxiliary)
    caches, expected, turns = [], [], []
    for row, (answer, second) in enumerate([(3, 40), (11, 52), (0, 33)]):
        cache = prefill(model, tokens(40 + row, seed=row))
        if answer:
            decode(model, cache, tokens(answer, seed=10 + row))
        turn = tokens(second + 1, seed=20 + row)
        alone = prefill(model, turn[:, :-1], cache=copy.deepcopy(cache))
        model(turn[:, -1:], cache=alone)
        caches.append(cache)
        expected.append(alone)
        turns.append(turn[0].tolist())
    generator = BatchGenerator(model, max_tokens=1)
    uids = generator.insert(turns, caches=caches)
    done = {}
    while responses := generator.next_generated():
        done |= {r.uid: r for r in responses if r.finish_reason}
    for uid, alone in zip(uids, expected, strict=True):
        found = done[uid].prompt_cache
        trim_prompt_cache(found[:-1], found[0].offset - alone[0].offset)
        assert difference(found, alone) < TOLERANCE


def test_mlx_lm_batch_generate_returns_usable_caches(demo_pair):
    model, tokenizer = demo_pair
    prompts = [
        tokenizer.encode(text) for text in ("def add(a, b):\n    " * 12, "import os\n", "x = 1\n" * 30)
    ]
    response = batch_generate(model, tokenizer, prompts, max_tokens=5, return_prompt_caches=True)
    assert len(response.texts) == 3
    again = batch_generate(model, tokenizer, prompts, prompt_caches=response.caches, max_tokens=5)
    assert len(again.texts) == 3


def test_laziness_nothing_but_the_needed_weights():
    """NaN in every weight that filling the cache must not touch changes nothing."""
    model = make_pair("qwen3", "qwen2", layer_map=[2, 0, 1, 1])  # the auxiliary's layer 3 is not needed
    prompt = tokens(40)
    expected = prefill(model, prompt)

    def poison(module):
        module.update(tree_map(lambda a: mx.full(a.shape, mx.nan, a.dtype), module.parameters()))

    auxiliary, base = model.auxiliary.model, model.base.model
    for module in (
        auxiliary.norm,
        auxiliary.layers[3],
        model.auxiliary.lm_head,
        base.norm,
        model.base.lm_head,
    ):
        poison(module)
    last = auxiliary.layers[2]
    for module in (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp, last.post_attention_layernorm):
        poison(module)
    for layer in base.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            poison(module)
        for module in (
            layer.self_attn.o_proj,
            layer.mlp,
            layer.input_layernorm,
            layer.post_attention_layernorm,
        ):
            poison(module)
    poison(base.embed_tokens)
    cache = prefill(model, prompt)
    for entry in kv_entries(cache):
        assert mx.isfinite(entry.keys).all() and mx.isfinite(entry.values).all()
    assert difference(cache, expected) == 0


def test_fused_projections_are_lazy_too():
    model = make_pair("openelm", "openelm")
    prompt = tokens(40)
    expected = prefill(model, prompt)
    for layer in model.base.layers:
        for module in (
            layer.attn.qkv_proj,
            layer.attn.q_norm,
            layer.attn.out_proj,
            layer.ffn,
            layer.attn_norm,
        ):
            module.update(tree_map(lambda a: mx.full(a.shape, mx.nan), module.parameters()))
    assert difference(prefill(model, prompt), expected) == 0


def test_quantized_pair_predicts():
    model = make_pair("llama", "openelm")
    fits = lambda _, module: hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
    nn.quantize(model, group_size=32, bits=8, class_predicate=fits)
    assert "scales" in model.predictor.key_maps[0]
    prompt = tokens(50)
    cache = prefill(model, prompt[:, :40], prompt[:, 40:])
    assert difference(cache, reference_cache(model, [("predicted", prompt)])) < TOLERANCE


def test_parameters_are_those_of_the_three_parts():
    model = make_pair()
    prefill(model, tokens(40))
    names = {name.split(".")[0] for name, _ in tree_flatten(model.parameters())}
    assert names == {"base", "auxiliary", "predictor"}


def test_two_threads_with_two_pairs():
    models = [make_pair("qwen3", "qwen2", seed=1), make_pair("openelm", "openelm", seed=2)]
    prompts = [tokens(40 + i, seed=i) for i in range(8)]
    expected = [[prefill(m, p) for p in prompts] for m in models]
    worst = [1.0, 1.0]

    def work(i):
        worst[i] = max(
            difference(prefill(models[i], p), e) for p, e in zip(prompts, expected[i], strict=True)
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [0, 0]


def test_wrong_parts_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"^llama: its cache holds more than"):
        KVPredictionModel(leaky_llama(), build("llama"), Predictor([0], [(1, 1)], [(1, 1)]))
    with pytest.raises(ValueError, match="predictor does not fit the models: base key and value widths"):
        KVPredictionModel(build("llama"), build("llama"), Predictor([0], [(32, 32)] * 4, [(32, 32)]))


def finished(generator):
    """Run a batch generator to its end: the final response of each prompt, by uid."""
    done = {}
    while responses := generator.next_generated():
        done |= {r.uid: r for r in responses if r.finish_reason}
    return done


@pytest.mark.variations
@pytest.mark.parametrize(
    ("base", "auxiliary"), [("qwen3", "qwen2"), ("openelm", "openelm"), ("qwen3", "gemma3_text")]
)
def test_three_turns_of_three_conversations_in_one_batch(base, auxiliary):
    model, caches, parts = make_pair(base, auxiliary), None, [[], [], []]
    for turn in range(3):
        prompts = [tokens(35 + 10 * row + turn, seed=100 * turn + row)[0].tolist() for row in range(3)]
        generator = BatchGenerator(model, max_tokens=4, prefill_step_size=40)
        uids = generator.insert(prompts, max_tokens=[2, 3, 4], caches=caches)
        done = finished(generator)
        caches = [done[uid].prompt_cache for uid in uids]
        for row, (uid, prompt) in enumerate(zip(uids, prompts, strict=True)):
            answer = done[uid].all_tokens[len(prompt) - 1 :]
            parts[row] += [
                ("predicted", mx.array([prompt[:-1]])),
                *(("exact", mx.array([[t]])) for t in answer),
            ]
    for cache, expected in zip(caches, parts, strict=True):
        assert difference(cache, reference_cache(model, expected)) < TOLERANCE


@pytest.mark.variations
@pytest.mark.parametrize(
    ("base", "auxiliary"), [("qwen3", "qwen2"), ("openelm", "openelm"), ("qwen3", "gemma3_text")]
)
def test_prompts_that_join_a_batch_in_mid_prompt(base, auxiliary):
    model = make_pair(base, auxiliary)
    generator = BatchGenerator(model, max_tokens=6, prefill_step_size=36, prefill_batch_size=4)
    prompts = [tokens(n + 1, seed=n)[0].tolist() for n in (150, 40, 100, 80)]
    uids, done = generator.insert(prompts[:1]), {}
    for prompt in prompts[1:]:
        _, responses = generator.next()
        done |= {r.uid: r for r in responses if r.finish_reason}
        uids += generator.insert([prompt])
    done |= finished(generator)
    for uid, prompt in zip(uids, prompts, strict=True):
        alone = prefill(model, mx.array([prompt[:-1]]))
        decode(model, alone, mx.array([done[uid].all_tokens[len(prompt) - 1 :]]))
        assert difference(done[uid].prompt_cache, alone) < TOLERANCE


def test_batch_in_which_some_auxiliaries_have_read_nothing():
    model = make_pair()
    short, long = prefill(model, tokens(10, 1)), prefill(model, tokens(40, 3))
    prompts = [tokens(n, n)[0].tolist() for n in (41, 36, 50)]
    generator = BatchGenerator(model, max_tokens=1)
    uids = generator.insert(prompts, caches=[short, long, model.make_cache()])
    done = finished(generator)
    before = [[("exact", tokens(10, 1))], [("predicted", tokens(40, 3))], []]
    for uid, prompt, parts in zip(uids, prompts, before, strict=True):
        answer = done[uid].all_tokens[len(prompt) - 1 :]
        parts += [("predicted", mx.array([prompt[:-1]])), *(("exact", mx.array([[t]])) for t in answer)]
        assert difference(done[uid].prompt_cache, reference_cache(model, parts)) < TOLERANCE


@pytest.mark.variations
@pytest.mark.parametrize(("base", "auxiliary"), [("qwen3", "qwen2"), ("openelm", "openelm")])
def test_continuations_are_scored_on_the_predicted_context(base, auxiliary):
    """As lm-eval scores: short continuations exactly, long ones in the teacher-forced form."""
    model, context = make_pair(base, auxiliary), tokens(60)
    cache = prefill(model, context)
    for n in (1, 2, 20, 31):
        expected = model.base(tokens(n, n), cache=reference_cache(model, [("predicted", context)])[:-1])
        assert mx.allclose(model(tokens(n, n), cache=copy.deepcopy(cache)), expected, atol=TOLERANCE)
    long = tokens(40, 5)
    expected = model(mx.concatenate([context, long], axis=1))[:, 60:]
    assert mx.allclose(model(long, cache=copy.deepcopy(cache)), expected, atol=TOLERANCE)


def test_exact_may_be_switched_in_a_conversation():
    model, (a, b, c) = make_pair(), (tokens(n, n) for n in (40, 50, 45))
    cache = prefill(model, a)
    model(b, cache=cache, exact=True)
    prefill(model, c, cache=cache)
    parts = [("predicted", a), ("exact", b), ("predicted", c)]
    assert difference(cache, reference_cache(model, parts)) < TOLERANCE


@pytest.mark.parametrize("trimmed", [43, 400])
def test_cache_trimmed_to_nothing_starts_anew(trimmed):
    model = make_pair("qwen3", "gemma3_text")
    cache = prefill(model, tokens(40))
    decode(model, cache, tokens(3, 9))
    trim_prompt_cache(cache, trimmed)
    prefill(model, tokens(50, 5), cache=cache)
    assert difference(cache, reference_cache(model, [("predicted", tokens(50, 5))])) < TOLERANCE
