"""The auxiliary as draft: the same text, no prefill of its own, a cache that can be gone on with."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from conftest import fails
from mlx_lm.models.cache import make_prompt_cache
from pairs import PAIRS, difference, make_pair, tokens

import kvpred_mlx
from kvpred_mlx.bench.studies.draft import measure
from kvpred_mlx.generation.stream import footer

PROMPT = (
    "import os\n\n\ndef read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n\n\n"
    "def write_lines(path, lines):\n    with open(path, 'w') as file:\n        file.writelines(lines)\n\n\n"
)


@pytest.fixture(scope="module")
def demo_pair(unquantized_pair):
    """A draft is accepted or not in the same way, whatever the weights."""
    return unquantized_pair


def run(model, tokenizer, prompt, max_tokens=24, draft=0, **options):
    if draft:
        options |= {"draft_model": model.auxiliary, "num_draft_tokens": draft}
    return list(kvpred_mlx.stream_generate(model, tokenizer, prompt, max_tokens, **options))


def token_ids(responses):
    return [r.token for r in responses]


@pytest.mark.variations
@pytest.mark.parametrize(
    ("draft", "exact", "prompt"),
    [(1, False, PROMPT), (3, False, PROMPT), (8, False, PROMPT), (3, True, PROMPT), (3, False, "x = 1")],
)
def test_greedy_text_is_that_without_a_draft(demo_pair, monkeypatch, draft, exact, prompt):
    model, tokenizer = demo_pair
    monkeypatch.setattr(model, "exact", exact)
    plain = run(model, tokenizer, prompt)
    drafted = run(model, tokenizer, prompt, draft=draft)
    assert token_ids(drafted) == token_ids(plain)
    assert "".join(r.text for r in drafted) == "".join(r.text for r in plain)
    last = drafted[-1]
    assert 0 < last.accepted <= last.drafted
    assert last.accepted == sum(r.from_draft for r in drafted)
    assert (last.prompt_tokens, last.generation_tokens) == (plain[-1].prompt_tokens, 24)
    assert "drafted tokens accepted" in footer(last) and "Draft" not in footer(plain[-1])


@pytest.mark.variations
@pytest.mark.parametrize("step", [7, 2048])
@pytest.mark.parametrize("length", [11, 9, 12])
def test_turns_in_one_cache(demo_pair, length, step):
    """The second turn finds the auxiliary where the first left it, whatever was accepted last."""
    model, tokenizer = demo_pair
    caches = [model.make_cache(), model.make_cache()]
    for turn in (PROMPT, "\n\ndef append_line(path, line):\n" * 4, "# and\n"):
        prompt = tokenizer.encode(turn, add_special_tokens=turn is PROMPT)
        options = {"max_tokens": length, "prefill_step_size": step}
        plain = run(model, tokenizer, prompt, **options, prompt_cache=caches[0])
        drafted = run(model, tokenizer, prompt, **options, prompt_cache=caches[1], draft=3)
        assert token_ids(drafted) == token_ids(plain)
        common = min(c[0].offset for c in caches)
        for cache in caches:
            for entry in cache:
                entry.trim(entry.size() - common)
        assert difference(*caches) < 1e-3
        # Both go on from the whole answer.
        rest = plain[-1].token
        for cache in caches:
            model(mx.array([[rest]]), cache=cache)


def test_the_draft_processes_no_prompt(demo_pair, monkeypatch):
    model, tokenizer = demo_pair
    calls = []
    plain_call = type(model.auxiliary).__call__

    def counted(self, inputs, *args, **kwargs):
        if self is model.auxiliary:
            calls.append(inputs.shape[1])
        return plain_call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(model.auxiliary), "__call__", counted)
    prompt = tokenizer.encode(PROMPT)
    run(model, tokenizer, prompt, draft=3)
    drafts = [n for n in calls if n <= 2]
    assert sum(n for n in calls if n > 2) == len(prompt) - 1, "the prompt is read once"
    assert len(drafts) >= 8


@pytest.mark.variations
@pytest.mark.parametrize("names", PAIRS)
def test_families(names, demo_pair):
    model = make_pair(*names)
    prompt = tokens(40).tolist()[0]
    windows = [c.max_size for c in model.make_cache()[:-1] if hasattr(c, "max_size")]
    windows += [c.max_size for c in model.make_cache()[-1].auxiliary if hasattr(c, "max_size")]
    if windows:  # 8 tokens, and the prompt has 40
        with pytest.raises(ValueError, match="8 tokens cannot be wound back"):
            run(model, demo_pair[1], prompt, draft=3)
    else:
        plain, drafted = (run(model, demo_pair[1], prompt, draft=n) for n in (0, 3))
        assert token_ids(drafted) == token_ids(plain)


@pytest.mark.slow
def test_an_auxiliary_that_is_not_read_to_its_end_runs_whole(demo_pair):
    """Prediction needs the first layers only; the draft's cache holds all of them, filled by the same prefill."""
    model = make_pair(layer_map=[0, 0, 1, 1])
    assert model.auxiliary_reader.depth is not None
    prompt = tokens(50).tolist()[0]
    plain, drafted = (run(model, demo_pair[1], prompt, draft=n) for n in (0, 3))
    assert token_ids(drafted) == token_ids(plain)
    # A cache of a turn without draft has the first layers' entries: the log is read again.
    cache = model.make_cache()
    run(model, demo_pair[1], prompt, prompt_cache=cache)
    assert len(cache[-1].auxiliary) < len(make_prompt_cache(model.auxiliary))
    second = tokens(40, 1).tolist()[0]
    expected = model.make_cache()
    run(model, demo_pair[1], prompt, prompt_cache=expected)
    plain = run(model, demo_pair[1], second, prompt_cache=expected)
    assert token_ids(run(model, demo_pair[1], second, prompt_cache=cache, draft=3)) == token_ids(plain)


def test_an_auxiliary_equal_to_the_base_is_always_accepted(demo_pair):
    """A draft from a stale or shifted cache would be refused now and then."""
    model = make_pair("qwen2", "qwen2", layer_map=[0, 1, 2, 3])
    model.auxiliary.update(model.base.parameters())
    model.exact = True  # predicted entries are not the base's own
    last = run(model, demo_pair[1], tokens(50).tolist()[0], 40, draft=3)[-1]
    assert last.accepted == 30 and last.drafted == 30


@pytest.mark.slow
def test_sampling_is_repeatable(demo_pair):
    from mlx_lm.sample_utils import make_sampler

    texts = []
    for _ in range(2):
        mx.random.seed(3)
        texts.append(token_ids(run(*demo_pair, PROMPT, draft=3, sampler=make_sampler(1.0))))
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"kv_bits": 8, "quantized_kv_start": 0, "prefill_step_size": 40}])
def test_cache_options(demo_pair, options):
    plain, drafted = (run(*demo_pair, PROMPT, draft=n, **options) for n in (0, 3))
    assert token_ids(drafted) == token_ids(plain)


def test_what_cannot_draft_is_refused(demo_pair):
    model, tokenizer = demo_pair
    with pytest.raises(ValueError, match="31 draft tokens, expected fewer than 31"):
        run(model, tokenizer, PROMPT, draft=31)
    with pytest.raises(ValueError, match="pair's make_cache"):
        run(model, tokenizer, PROMPT, draft=3, prompt_cache=make_prompt_cache(model.base))
    with pytest.raises(ValueError, match="64 tokens cannot be wound back"):
        run(model, tokenizer, PROMPT, draft=3, max_kv_size=64)


def test_the_command_line(run):
    plain, drafted = (
        json.loads(run("generate", "-p", PROMPT, "-m", 12, "--json", *options)[1])
        for options in ([], ["--draft", "auxiliary", "--num-draft-tokens", 2])
    )
    assert drafted["text"] == plain["text"]
    assert drafted["drafted"] >= drafted["accepted"] > 0 == plain["drafted"]
    out = run("generate", "-p", PROMPT, "-m", 12, "--draft", "auxiliary")[1]
    assert "drafted tokens accepted (" in out.splitlines()[-1]
    fails(run("generate", "-p", "x", "--draft", "gpt2"), 2, "--draft", "'gpt2', expected auxiliary")
    fails(run("generate", "-p", "x", "--num-draft-tokens", 0), 2, "--num-draft-tokens")


def test_the_bench(demo_pair):
    model, tokenizer = demo_pair
    plain, drafted = measure(model, tokenizer, tokenizer.encode(PROMPT), [2], max_tokens=8, trials=1)
    assert plain["drafted"] == 0 < drafted["drafted"] and drafted["same_text"]
    assert plain["times_faster"]["median"] == 1.0
    assert drafted["decode_tokens_per_second"] > 0 and drafted["ttft"] > 0
