"""The dial: exact positions among predicted ones."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import fails
from families import ATTENTION, WINDOW, build
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from pairs import PAIRS, difference, kv_entries, make_pair, prefill, reference_cache, tapped, tokens

from kvpred_mlx import ExactPositions, UnsupportedModelError, load_model, save
from kvpred_mlx.dial.importance import choose
from kvpred_mlx.dial.rows import ExactRows
from kvpred_mlx.generation import stream as generation
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps

TOLERANCE = 1e-4
WITHOUT_ROWS = ["gemma2", "gpt_bigcode", "llama4"]
UNWINDOWED = [p for p in PAIRS if p[0] != "gemma3_text"]


def spans(length, exact, prompt):
    """Maximal runs of exact and of predicted tokens, for `reference_cache`."""
    kinds = ["exact" if p in exact else "predicted" for p in range(length)]
    starts = [p for p in range(length) if p == 0 or kinds[p] != kinds[p - 1]]
    return [(kinds[a], prompt[:, a:b]) for a, b in zip(starts, [*starts[1:], length], strict=True)]


def watched(model):
    """The positions that the rows of `model` are asked for, call by call."""
    seen, process = [], model.rows._process

    def spy(tokens, chosen, among, cache, positions=None):
        if chosen.shape[0] != 1 or tokens.shape[1] != 12 or among != 12:  # not the probe
            seen.append((chosen.tolist(), among))
        process(tokens, chosen, among, cache, positions)

    model.rows._process = spy
    return seen


# Rows


@pytest.mark.parametrize("family", ATTENTION)
def test_every_position_as_a_row_is_the_ordinary_prefill(family):
    taps = tapped(family)
    rows, model = ExactRows(taps), taps.model
    assert rows.supported == (family not in WITHOUT_ROWS)
    before, n = 6, 2 * WINDOW + 4
    prompt, following = tokens(before + n, batch=2), tokens(1, 5, batch=2)
    plain, made = make_prompt_cache(model), make_prompt_cache(model)
    model(prompt[:, :before], cache=made)
    for part in (prompt[:, :before], prompt[:, before:]):
        model(part, cache=plain)
    nothing = [KV(*(mx.ones((2, n, w)) for w in widths)) for widths in taps.widths]
    taps.inject(nothing, prompt[:, before:], made, logits=False)
    places = mx.broadcast_to(mx.arange(n), (2, n))
    if family in WITHOUT_ROWS:
        with pytest.raises(UnsupportedModelError, match=f"^{family}: positions in the middle"):
            rows(prompt[:, before:], places, n, made)
        return
    rows(prompt[:, before:], places, n, made)
    assert difference([*made, None], [*plain, None]) < TOLERANCE
    assert mx.allclose(model(following, cache=made), model(following, cache=plain), rtol=1e-4, atol=1e-4)


@pytest.mark.variations(2)
@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
@pytest.mark.parametrize(
    "dial", [ExactPositions(top=1.0), ExactPositions(last=1.0), ExactPositions(500), ExactPositions(3, 9, 1.0)], ids=str
)  # fmt: skip
def test_every_position_exact_is_the_exact_base(base, auxiliary, dial):
    model = make_pair(base, auxiliary, exact_positions=dial)
    prompt, last = tokens(50, batch=2), tokens(1, 3, batch=2)
    exact = model.make_cache()
    model(prompt, cache=exact, exact=True)
    cache = prefill(model, prompt)
    assert difference(cache, exact) < TOLERANCE
    assert mx.allclose(model(last, cache=cache), model(last, cache=exact), rtol=1e-4, atol=1e-4)


@pytest.mark.variations(3)
@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
@pytest.mark.parametrize(
    "dial",
    [
        ExactPositions(last=9),
        ExactPositions(last=0.25),
        ExactPositions(first=4),
        ExactPositions(top=0.3),
        ExactPositions(2, 7, 0.2),
    ],
    ids=str,
)
def test_a_subset_is_what_one_token_after_the_other_gives(base, auxiliary, dial):
    """The slow, plain reference fills the cache in order, each run of positions predicted or exact."""
    model = make_pair(base, auxiliary, exact_positions=dial)
    prompt, n = tokens(50), 50
    seen = watched(model)
    cache = prefill(model, prompt)
    rows, sinks, tail = (
        set(seen[0][0][0]) if seen else set(),
        {*range(dial.first)},
        {*range(n - dial.last_of(n), n)},
    )
    assert len(rows - sinks) == dial.top_of(n) and not rows & tail
    assert bool(dial.top) == bool(rows) and (not rows or sinks <= rows)  # one pass for both
    expected = reference_cache(model, spans(n, rows | sinks | tail, prompt))
    assert difference(cache, expected) < TOLERANCE
    assert difference(cache, reference_cache(model, [("predicted", prompt)])) > 0.01


def test_a_subset_is_what_masking_in_full_gives():
    """Written out for mlx-lm's qwen2: all positions at once, keys and values predicted or own by position."""
    model = make_pair("qwen2", "qwen2", exact_positions=ExactPositions(3, 0.1, 0.3))
    prompt, seen = tokens(50), watched(model)
    cache = prefill(model, prompt)
    positions = {0, 1, 2, *range(45, 50), *seen[0][0][0]}
    exact = mx.array([p in positions for p in range(50)])[:, None]
    predicted = kv_entries(reference_cache(model, [("predicted", prompt)]))
    h, causal, n = model.base.model.embed_tokens(prompt), mx.tri(50, dtype=mx.bool_), 0
    for layer, given, found in zip(model.base.layers, predicted, kv_entries(cache), strict=True):
        a, x = layer.self_attn, layer.input_layernorm(h)
        k = mx.where(exact, a.rope(heads(a.k_proj(x), a.n_kv_heads)), given.keys)
        v = mx.where(exact, heads(a.v_proj(x), a.n_kv_heads), given.values)
        assert mx.allclose(found.keys, k, atol=TOLERANCE) and mx.allclose(found.values, v, atol=TOLERANCE)
        q, share = a.rope(heads(a.q_proj(x), a.n_heads)), a.n_heads // a.n_kv_heads
        scores = (q * a.scale) @ mx.repeat(k, share, axis=1).swapaxes(-1, -2)
        weights = mx.softmax(mx.where(causal, scores, -1e9), axis=-1)
        h = h + a.o_proj((weights @ mx.repeat(v, share, axis=1)).swapaxes(1, 2).flatten(-2))
        h, n = h + layer.mlp(layer.post_attention_layernorm(h)), n + 1
    assert n == len(model.base.layers)


def test_quantized_bases_and_quantized_caches():
    model = make_pair("llama", "openelm", exact_positions=ExactPositions(2, 5, 0.3))
    fits = lambda _, module: hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
    nn.quantize(model, group_size=32, bits=8, class_predicate=fits)
    prompt, seen = tokens(50), watched(model)
    cache = prefill(model, prompt)
    exact = {0, 1, *range(45, 50), *seen[0][0][0]}
    assert difference(cache, reference_cache(model, spans(50, exact, prompt))) < TOLERANCE
    # A cache that mlx-lm has quantized between two chunks: every position exact, so near the exact base's.
    wide = build("qwen3", {"head_dim": 32})
    rows, taps = ExactRows(KVTaps(wide)), KVTaps(wide)
    plain, made = ([c.to_quantized(32, 8) for c in make_prompt_cache(wide)] for _ in range(2))
    wide(prompt, cache=plain)
    taps.inject([KV(*(mx.ones((1, 50, w)) for w in ws)) for ws in taps.widths], prompt, made, logits=False)
    rows(prompt, mx.arange(50)[None], 50, made)
    assert mx.allclose(wide(prompt[:, :1], cache=made), wide(prompt[:, :1], cache=plain), atol=0.05)


# Importance


def heads(x, n):
    return x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2)


def qwen2_weights(model, prompt, queries):
    """Attention of the last queries, written out for mlx-lm's qwen2, layer by layer: [tokens]."""
    h, found = model.model.embed_tokens(prompt), []
    for layer in model.layers:
        a, x = layer.self_attn, layer.input_layernorm(h)
        q = a.rope(heads(a.q_proj(x), a.n_heads))
        k = mx.repeat(a.rope(heads(a.k_proj(x), a.n_kv_heads)), a.n_heads // a.n_kv_heads, axis=1)
        causal = mx.tri(x.shape[1], dtype=mx.bool_)
        scores = mx.where(causal, (q * a.scale) @ k.swapaxes(-1, -2), -1e9)
        found.append(mx.softmax(scores, axis=-1)[:, :, -queries:].mean(axis=2).max(axis=1))
        h = layer(h, "causal")
    return mx.stack(found).max(axis=0)


@pytest.mark.variations
@pytest.mark.parametrize("chunks", [(60,), (130,), (60, 70)])
def test_scores_are_the_attention_of_the_last_queries(chunks):
    model = make_pair("qwen3", "qwen2", layer_map=[3, 3, 2, 3])
    prompt, cache = tokens(sum(chunks)), model.make_cache()
    for i, n in enumerate(chunks):
        done = sum(chunks[:i])
        with model.importance.listen() as heard:
            model.predict(prompt[:, done : done + n], cache[-1])
        cache[-1].read_on(prompt[:, done : done + n])
    scores = heard.scores(sum(chunks), chunks[-1], [0])
    assert mx.allclose(scores, qwen2_weights(model.auxiliary, prompt, 8), atol=1e-5)


def test_chunks_around_the_highest_scores_are_chosen():
    scores = mx.zeros((2, 50))
    scores[0, 21], scores[0, 40], scores[1, 3] = 2.0, 1.0, 1.0
    found = choose(scores, [20, 8], [50, 20]).tolist()
    assert len({*found[0]}) == 20 and {*range(16, 24), *range(40, 48)} <= {*found[0]}
    assert {*found[1]} == {*range(8)} and found[1] == sorted(found[1])
    assert choose(scores, [50, 1], [50, 50])[0].tolist() == [*range(50)]
    assert choose(scores[:, :3], [2, 2], [3, 3]).shape == (2, 2)
    scores = mx.zeros((1, 32))
    scores[0, 3], scores[0, 24:] = 0.1, 1.0
    alone, padded = choose(scores[:, :24], [8], [24]), choose(scores, [8], [24])
    assert alone.tolist() == padded.tolist() == [[*range(8)]]  # what does not count lifts no neighbour


@pytest.mark.parametrize("family", ["gemma2", "gear"])
def test_an_auxiliary_whose_attention_cannot_be_seen(family):
    model = make_pair("qwen3", family, exact_positions=ExactPositions(top=0.1))
    with pytest.raises(UnsupportedModelError, match=rf"^{family}: its attention cannot be seen"):
        prefill(model, tokens(40))
    model.exact_positions = ExactPositions(last=0.1)
    prefill(model, tokens(40))


# What the auxiliary reads, turns, chunks, batches


def test_the_auxiliary_leaves_the_end_to_the_base_and_catches_up_in_the_next_turn():
    model = make_pair(exact_positions=ExactPositions(last=10))
    first, answer, second = tokens(40, 1), tokens(5, 2), tokens(45, 3)
    cache = prefill(model, first)
    assert cache[-1].auxiliary[0].offset == 30
    prefill(model, *(answer[:, i : i + 1] for i in range(5)), second, cache=cache)
    parts = [("predicted", first[:, :30]), ("exact", first[:, 30:]), ("exact", answer)]
    parts += [("predicted", second[:, :35]), ("exact", second[:, 35:])]
    assert difference(cache, reference_cache(model, parts)) < TOLERANCE
    trim_prompt_cache(cache, 50)
    prefill(model, second, cache=cache)
    expected = reference_cache(model, [*parts[:2], ("predicted", second[:, :35]), ("exact", second[:, 35:])])
    assert difference(cache, expected) < TOLERANCE


def test_in_direct_calls_every_call_is_taken_for_a_whole_prompt():
    model = make_pair(exact_positions=ExactPositions(first=2, last=0.25))
    a, b = tokens(40, 1), tokens(36, 2)
    parts = [("exact", a[:, :2]), ("predicted", a[:, 2:30]), ("exact", a[:, 30:])]
    parts += [("exact", b[:, :2]), ("predicted", b[:, 2:27]), ("exact", b[:, 27:])]
    assert difference(prefill(model, a, b), reference_cache(model, parts)) < TOLERANCE


@pytest.mark.variations(2)
@pytest.mark.parametrize(("base", "auxiliary"), UNWINDOWED)
@pytest.mark.parametrize(
    "dial", [ExactPositions(5, 6), ExactPositions(last=0.5), ExactPositions(3, 4, 0.2)], ids=str
)
def test_a_prompt_of_known_length_is_the_same_in_any_chunks(base, auxiliary, dial, demo_pair):
    model = make_pair(base, auxiliary, exact_positions=dial)
    prompt, whole = tokens(91), None
    for step in (2048, 40, 26):
        options = {"prefill_step_size": step}
        generation.announce_prompt(model, 91, options)
        size, cache = options["prefill_step_size"], options["prompt_cache"]
        prefill(model, *(prompt[:, i : min(i + size, 90)] for i in range(0, 90, size)), cache=cache)
        assert cache[-1].announced is None
        whole = whole or cache
        assert difference(cache, whole) < TOLERANCE


def test_windowed_bases_choose_chunk_by_chunk():
    model = make_pair("gemma3_text", "qwen2", exact_positions=ExactPositions(top=0.25))
    options, prompt, seen = {"prefill_step_size": 40}, tokens(81), watched(model)
    generation.announce_prompt(model, 81, options)
    prefill(model, prompt[:, :40], prompt[:, 40:80], cache=options["prompt_cache"])
    assert [(len(c[0]), among) for c, among in seen] == [(10, 40), (10, 40)]
    exact = {*seen[0][0][0], *(40 + p for p in seen[1][0][0])}
    expected = reference_cache(model, spans(80, exact, prompt[:, :80]))
    assert difference(options["prompt_cache"], expected) < TOLERANCE


@pytest.mark.variations(2)
@pytest.mark.parametrize(("base", "auxiliary"), [p for p in PAIRS if p[0] != "deepseek_v3"])
@pytest.mark.parametrize("dial", [ExactPositions(2, 5), ExactPositions(1, 0.2, 0.25)], ids=str)
@pytest.mark.parametrize("lengths", [(40, 75, 52), (50, 50)])
def test_batches_equal_single_prompts(base, auxiliary, dial, lengths):
    model = make_pair(base, auxiliary, exact_positions=dial)
    prompts = [tokens(n + 1, seed=i)[0].tolist() for i, n in enumerate(lengths)]
    generator = BatchGenerator(model, max_tokens=1)
    uids, done = generator.insert(prompts), {}
    while responses := generator.next_generated():
        done |= {r.uid: r for r in responses if r.finish_reason}
    for uid, prompt, n in zip(uids, prompts, lengths, strict=True):
        alone = prefill(model, mx.array([prompt[:n]]), *(mx.array([[t]]) for t in done[uid].all_tokens[n:]))
        assert difference(done[uid].prompt_cache, alone) < TOLERANCE


def test_a_short_call_may_be_a_draft_and_its_logits_are_exact():
    model = make_pair(exact_positions=ExactPositions(last=2))
    prompt, draft = tokens(40, 1), tokens(4, 2)
    cache = prefill(model, prompt)
    plain = reference_cache(model, [("predicted", prompt[:, :38]), ("exact", prompt[:, 38:])])
    assert mx.allclose(model(draft, cache=cache), model.base(draft, cache=plain[:-1]), atol=TOLERANCE)
    trim_prompt_cache(cache, 2)
    model(draft[:, 2:3], cache=cache)
    parts = [("predicted", prompt[:, :38]), ("exact", prompt[:, 38:]), ("exact", draft[:, :3])]
    assert difference(cache, reference_cache(model, parts)) < TOLERANCE


def test_logits_of_a_prompt():
    model = make_pair(exact_positions=ExactPositions(3, 7))
    prompt = tokens(40)
    logits = model(prompt, cache=model.make_cache())
    plain = reference_cache(model, [("exact", prompt[:, :3]), ("predicted", prompt[:, 3:33])])
    assert logits.shape[:2] == (1, 40)
    assert mx.allclose(logits[:, :3], model.base(prompt[:, :3]), atol=TOLERANCE)
    assert mx.allclose(logits[:, 33:], model.base(prompt[:, 33:], cache=plain[:-1]), atol=TOLERANCE)


def test_nothing_else_changes():
    model, prompt = make_pair(), tokens(50)
    predicted = prefill(model, prompt)
    model.exact_positions = ExactPositions()
    assert difference(prefill(model, prompt), predicted) == 0
    model.exact_positions = ExactPositions(last=5)
    exact = make_prompt_cache(model.base)
    expected = model.base(prompt, cache=exact)
    cache = model.make_cache()
    assert mx.array_equal(model(prompt, cache=cache, exact=True), expected)
    assert all(
        mx.array_equal(a.keys, b.keys_and_values()[0]) for a, b in zip(kv_entries(cache), exact, strict=True)
    )


# Settings


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"first": -1}, "first is -1"),
        ({"first": 0.5}, "first is 0.5"),
        ({"last": -3}, "last is -3"),
        ({"last": 1.5}, "last is 1.5"),
        ({"last": True}, "last is True"),
        ({"last": float("nan")}, "last is nan"),
        ({"top": 2}, "top is 2"),
        ({"top": -0.1, "first": -1}, "first is -1, expected a number of tokens; top is -0.1"),
    ],
)
def test_wrong_settings_are_named(wrong, named):
    with pytest.raises(ValueError, match=f"^exact positions: .*{named}"):
        ExactPositions(**wrong)


def test_counts():
    assert ExactPositions(last=0.1).last_of(30) == 3 and ExactPositions(last=0.1).last_of(31) == 4
    assert ExactPositions(last=1).last_of(30) == 1 and ExactPositions(last=1.0).last_of(30) == 30
    assert ExactPositions(last=99).last_of(30) == 30 and ExactPositions(top=0.07).top_of(100) == 7
    assert not ExactPositions() and ExactPositions(first=1)


def test_the_pairs_own_default(golden_pair, tmp_path):
    model = load_model(golden_pair)
    assert model.exact_positions is None
    model.exact_positions = ExactPositions(4, 0.1, 0.2)
    save(tmp_path / "pair", model)
    assert load_model(tmp_path / "pair").exact_positions == model.exact_positions
    config = json.loads((tmp_path / "pair/config.json").read_text())
    assert config["exact_positions"] == {"first": 4, "last": 0.1, "top": 0.2}
    for wrong in ({"last": 2.5}, {"middle": 3}):
        (tmp_path / "pair/config.json").write_text(json.dumps(config | {"exact_positions": wrong}))
        with pytest.raises(ValueError, match="exact_positions is"):
            load_model(tmp_path / "pair")


PROMPT = "def add(a, b):\n    return a + b\n\n" * 12


def test_command_line(run):
    def output(*options):
        code, out, err = run("generate", "-p", PROMPT, "-m", 3, "--json", *options)
        assert code == 0, err
        return json.loads(out)

    assert output()["exact_positions"] is None
    assert output("--exact-last", 16)["exact_positions"] == {"first": 0, "last": 16, "top": 0.0}
    options = ("--exact-last", "0.25", "--exact-first", 2, "--exact-top", 0.1)
    assert output(*options)["exact_positions"] == {"first": 2, "last": 0.25, "top": 0.1}
    assert output("--exact-last", "1.0")["text"] == output("--exact")["text"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--exact-last", "1.5"), ("--exact-last", "'1.5'", "expected a number of tokens")),
        (("--exact-last", "ten"), ("--exact-last", "'ten'")),
        (("--exact-last", "nan"), ("--exact-last", "'nan'")),
        (("--exact-last=-2",), ("--exact-last", "'-2'")),
        (("--exact-first=-2",), ("--exact-first",)),
        (("--exact-top", "2"), ("--exact-top",)),
        (("--repair-budget", "0"), ("--repair-budget", "0", "expected a share")),
    ],
)
def test_bad_arguments(run, options, named):
    fails(run("generate", "-p", "x", *options), 2, *named)


def test_a_pair_that_cannot_is_refused_before_it_generates(run, tmp_path, demo_pair):
    pair = make_pair("gpt_bigcode", "qwen2")
    save(tmp_path / "pair", pair, demo_pair[1])
    result = run("generate", "--model", tmp_path / "pair", "-p", "x", "--exact-top", 0.1)
    fails(result, 1, "gpt_bigcode", "only its first and last ones")
