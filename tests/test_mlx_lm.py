"""mlx-lm's own tools on a pair: load, generate, prompt-cache files, speculative decoding, the server."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from pairs import difference, make_pair, tokens
from processes import python, serving

import kvpred_mlx
from kvpred_mlx.pair.locating import DEMO_PAIR

PROMPT = (
    '"""Helpers for files."""\n\nimport os\n\n\ndef read_lines(path):\n    """Return the lines of a file."""\n'
    "    with open(path) as file:\n        return file.readlines()\n\n\ndef write_lines(path, lines):\n"
)
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def texts(model, tokenizer, prompt, **options):
    return "".join(r.text for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=12, **options))


@pytest.mark.slow
def test_mlx_lm_load_gives_the_same_model(demo_pair):
    model, tokenizer = mlx_lm.load(str(DEMO_PAIR))
    assert isinstance(model, kvpred_mlx.KVPredictionModel)
    ids = mx.array([tokenizer.encode(PROMPT)])
    assert mx.array_equal(model(ids), demo_pair[0](ids))
    assert texts(model, tokenizer, PROMPT) == texts(*demo_pair, PROMPT) != ""


@pytest.mark.slow
def test_mlx_lm_may_be_imported_before_or_after():
    for first, second in (("mlx_lm", "kvpred_mlx"), ("kvpred_mlx", "mlx_lm")):
        code = f"import {first}, {second}; m, _ = mlx_lm.load({str(DEMO_PAIR)!r}); print(type(m).__name__)"
        done = subprocess.run(python(code), capture_output=True, text=True, check=True)
        assert done.stdout == "Model\n"
        assert done.stderr == ""


def test_responses_are_mlx_lm_s_with_ttft(demo_pair):
    ours = list(kvpred_mlx.stream_generate(*demo_pair, PROMPT, max_tokens=12))
    theirs = list(mlx_lm.stream_generate(*demo_pair, PROMPT, max_tokens=12))
    assert [r.token for r in ours] == [r.token for r in theirs]
    assert ours[-1].finish_reason == theirs[-1].finish_reason == "length"
    assert all(0 < r.prefill_time < r.ttft for r in ours)
    assert len({r.ttft for r in ours}) == 1
    assert kvpred_mlx.generate(*demo_pair, PROMPT, max_tokens=12) == "".join(r.text for r in ours)


def test_exact_is_mlx_lm_s_generate_of_the_base(demo_pair):
    model, tokenizer = demo_pair
    ids = mx.array(tokenizer.encode(PROMPT))
    expected = list(generate_step(ids, model.base, max_tokens=8))
    model.exact = True
    try:
        found = list(generate_step(ids, model, max_tokens=8))
    finally:
        model.exact = False
    assert [t for t, _ in found] == [t for t, _ in expected]
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))


@pytest.mark.variations
@pytest.mark.parametrize("step", [33, 64, 2048])
def test_prefill_step_size_does_not_change_mlx_lm_s_tokens(demo_pair, step):
    model, tokenizer = demo_pair
    ids = mx.array(tokenizer.encode(PROMPT))
    found = list(generate_step(ids, model, max_tokens=6, prefill_step_size=step))
    expected = list(generate_step(ids, model, max_tokens=6))
    assert [t for t, _ in found] == [t for t, _ in expected]
    assert all(mx.allclose(a, b, atol=1e-3) for (_, a), (_, b) in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("length", [34, 65, 66, 71])
@pytest.mark.parametrize("step", [1, 2, 7, 16, 64])
def test_any_step_size_gives_the_same_cache(demo_pair, length, step):
    """Also steps under `min_prompt_tokens`, and those that would leave a single token over."""
    model, tokenizer = demo_pair
    ids = tokenizer.encode(PROMPT)[:length]
    caches = []
    for size in (step, 2048):
        cache = model.make_cache()
        options = {"max_tokens": 1, "prompt_cache": cache, "prefill_step_size": size}
        list(kvpred_mlx.stream_generate(model, tokenizer, ids, **options))
        caches.append(cache)
    assert difference(*caches) < 1e-4


def test_prompt_cache_files(demo_pair, tmp_path):
    model, tokenizer = demo_pair
    cache = make_prompt_cache(model)
    first = texts(model, tokenizer, PROMPT, prompt_cache=cache)
    save_prompt_cache(str(tmp_path / "turn.safetensors"), cache, {"model": "demo"})
    second = tokenizer.encode("\n\ndef append_line(path, line):\n" * 4, add_special_tokens=False)
    went_on = texts(model, tokenizer, second, prompt_cache=cache)
    loaded, metadata = load_prompt_cache(str(tmp_path / "turn.safetensors"), return_metadata=True)
    assert metadata == {"model": "demo"}
    assert texts(model, tokenizer, second, prompt_cache=loaded) == went_on
    assert first and went_on


@pytest.mark.slow
def test_prompt_cache_file_loads_before_any_pair(demo_pair, tmp_path):
    model, tokenizer = demo_pair
    cache = make_prompt_cache(model)
    texts(model, tokenizer, PROMPT, prompt_cache=cache)
    save_prompt_cache(str(tmp_path / "turn.safetensors"), cache)
    code = (
        "import kvpred_mlx\nfrom mlx_lm.models.cache import load_prompt_cache\n"
        f"print(type(load_prompt_cache({str(tmp_path / 'turn.safetensors')!r})[-1]).__name__)"
    )
    done = subprocess.run(python(code), capture_output=True, text=True, check=True)
    assert done.stdout == "AuxiliaryCache\n"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_kv_size": 64}, {"kv_bits": 8, "quantized_kv_start": 0}])
def test_cache_options(demo_pair, options):
    model, tokenizer = demo_pair
    cache = model.make_cache(options.get("max_kv_size"))
    for _ in range(2):  # the second turn goes on in a rotated or quantized cache
        options["prompt_cache"] = cache
        assert kvpred_mlx.generate(model, tokenizer, PROMPT, max_tokens=8, prefill_step_size=50, **options)
    assert kvpred_mlx.generate(*demo_pair, PROMPT, max_tokens=8, **(options | {"prompt_cache": None}))


def test_max_kv_size_is_honoured():
    model = make_pair()
    cache = model.make_cache(max_kv_size=16)
    model(tokens(40), cache=cache)
    for i in range(3):
        model(tokens(1, i), cache=cache)
    assert all(c.max_size == 16 and c.keys.shape[2] <= 16 + 40 for c in cache[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("draft_tokens", [1, 3, 8])
@pytest.mark.parametrize("step", [64, 512])
def test_speculative_decoding_with_the_auxiliary(demo_pair, draft_tokens, step):
    """The tokens, and the base's cache behind them, are those of decoding without a draft."""
    model, tokenizer = demo_pair
    ids = mx.array(tokenizer.encode(PROMPT))
    plain_cache = make_prompt_cache(model)
    plain = list(generate_step(ids, model, max_tokens=24, prompt_cache=plain_cache))
    cache = [*make_prompt_cache(model), *make_prompt_cache(model.auxiliary)]
    options = {"num_draft_tokens": draft_tokens, "max_tokens": 24, "prefill_step_size": step}
    drafted = list(speculative_generate_step(ids, model, model.auxiliary, prompt_cache=cache, **options))
    assert [t for t, _, _ in drafted] == [t for t, _ in plain]
    assert any(from_draft for _, _, from_draft in drafted)
    # The last verification may have been wound back to a token less: compare what both have.
    base, common = cache[: len(model.layers)], min(cache[0].offset, plain_cache[0].offset)
    for entries in (base, plain_cache):
        for entry in entries:
            entry.trim(entry.size() - common)
    assert difference(base, plain_cache) < 1e-3


def test_stream_generate_takes_the_auxiliary_as_draft(demo_pair):
    model, tokenizer = demo_pair
    assert texts(model, tokenizer, PROMPT, draft_model=model.auxiliary) == texts(model, tokenizer, PROMPT)
    last = list(kvpred_mlx.stream_generate(*demo_pair, PROMPT, max_tokens=4, draft_model=model.auxiliary))[-1]
    assert last.ttft > 0


@pytest.fixture(scope="module")
def server():
    """The stock server on a free port of the loopback interface."""
    code = "import backend; from mlx_lm.server import main; main()"
    arguments = ("--model", DEMO_PAIR, "--host", "127.0.0.1", "--chat-template", CHAT_TEMPLATE)
    with serving(python(code, *arguments)) as (url, _, _):
        yield url


def complete(url, prompt, **options):
    body = {"model": "default_model", "prompt": prompt, "max_tokens": 8, "temperature": 0, **options}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def text_of(answer):
    return answer["choices"][0]["text"]


def test_server_answers_like_generate(demo_pair, server):
    assert text_of(complete(server, PROMPT)) == kvpred_mlx.generate(*demo_pair, PROMPT, max_tokens=8)


@pytest.mark.slow
def test_server_multi_turn_and_trimmed_caches(demo_pair, server):
    model, tokenizer = demo_pair
    turn = "# second conversation\n" + PROMPT  # nothing of it is in the server's cache yet
    cache = make_prompt_cache(model)
    first = kvpred_mlx.generate(model, tokenizer, turn, max_tokens=8, prompt_cache=cache)
    assert text_of(complete(server, turn)) == first
    longer = turn + first + "\n\n\ndef copy_lines(source, target):\n" * 6
    answer = complete(server, longer)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 30
    new = tokenizer.encode(longer)[cache[0].offset :]
    assert text_of(answer) == kvpred_mlx.generate(model, tokenizer, new, max_tokens=8, prompt_cache=cache)
    # A prompt that leaves the stored one half-way makes the server trim a copy of it.
    branch = complete(server, longer[: len(longer) // 2] + "\nclass Other:\n" * 20)
    assert branch["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert text_of(branch)


def test_server_concurrent_ragged_requests(demo_pair, server):
    prompts = [f"# file {i}\n" + PROMPT + f"    value_{i} = {i}\n" * (3 * i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda p: complete(server, p), prompts))
    expected = [kvpred_mlx.generate(*demo_pair, p, max_tokens=8) for p in prompts]
    assert [text_of(a) for a in answers] == expected


def test_server_sequential_requests_with_a_seed(demo_pair, server):
    # A seed makes the server answer one by one, without its batch generator.
    assert text_of(complete(server, PROMPT, seed=1)) == kvpred_mlx.generate(*demo_pair, PROMPT, max_tokens=8)


def test_server_chat_and_streaming(server):
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 6,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        events = [line for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert len(events) > 3
