"""`kvpred-mlx serve` over real HTTP with the official client; servers listen on 127.0.0.1 only."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx_lm.server
import openai
import pytest
from conftest import fails

import kvpred_mlx
from kvpred_mlx.bench.studies.soak import soak
from kvpred_mlx.pair.loading import context_length, read_base_config
from kvpred_mlx.pair.locating import DEMO_PAIR
from kvpred_mlx.pair.modes import Mode
from kvpred_mlx.serving.generator import PairGenerator, PairPromptCache, PairProvider
from kvpred_mlx.serving.served import ServedPair
from kvpred_mlx.serving.settings import ServerSettings

NAME = DEMO_PAIR.name
CONTEXT = context_length(read_base_config(DEMO_PAIR))
PROMPT = (
    '"""Helpers."""\n\nimport os\n\n\ndef read_lines(path):\n    """Return the lines of a file."""\n'
    "    with open(path) as file:\n        return file.readlines()\n\n\ndef write_lines(path, lines):\n"
)


@pytest.fixture
def expected(demo_pair):
    """What the library generates for a prompt."""

    def generate(prompt, exact=False, max_tokens=8, **options):
        with Mode(exact).applied(demo_pair[0]):
            return kvpred_mlx.generate(*demo_pair, prompt, max_tokens=max_tokens, **options)

    return generate


def complete(client, prompt, model=NAME, max_tokens=8, **options):
    return client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, **options)


def text_of(answer):
    return answer.choices[0].text


def fresh(label):
    """A prompt that no other test sends, so that no prompt cache of theirs is used."""
    return f"# {label}\n{PROMPT}"


def test_a_completion_and_its_ttft(client, expected):
    prompt = fresh("single")
    answer = complete(client, prompt)
    assert text_of(answer) == expected(prompt)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert 0 < answer.usage.ttft < 120 and answer.usage.mode == "predicted"


def test_a_streamed_completion(client, expected):
    prompt = fresh("streamed")
    chunks = list(complete(client, prompt, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected(prompt)
    assert chunks[-1].usage.ttft > 0 and chunks[-1].usage.completion_tokens == 8
    assert all(c.usage is None for c in complete(client, prompt, stream=True, stream_options={}))


def test_chat_in_turns_reuses_the_cache(client):
    messages = [{"role": "user", "content": fresh("chat")}]
    cached = []
    for turn in ("\n\n\ndef copy_lines(source, target):\n" * 3, "\n\n\ndef remove(path):\n" * 3):
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        messages.append({"role": "user", "content": turn})
    chunks = list(client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks)
    assert cached[1] > 30


def test_a_prompt_that_is_all_cached(client, demo_pair):
    """mlx-lm would have no token left to process."""
    prompt = fresh("known")
    first = complete(client, prompt, max_tokens=4)
    tokens = demo_pair[1].encode(prompt + text_of(first))
    answer = complete(client, prompt + text_of(first))
    assert answer.usage.prompt_tokens == len(tokens)
    again = complete(client, prompt + text_of(first) + text_of(answer))
    assert text_of(again) and again.usage.prompt_tokens_details.cached_tokens >= len(tokens)


@pytest.mark.variations
@pytest.mark.parametrize("asked", [{"extra_body": {"kvpred": {"exact": True}}}, {"model": f"{NAME}:base"}])
def test_the_base_alone(client, expected, asked):
    prompt = fresh("exact")
    predicted = complete(client, prompt)
    answer = complete(client, prompt, **asked)
    assert answer.usage.mode == "exact" and predicted.usage.mode == "predicted"
    assert text_of(answer) == expected(prompt, exact=True)
    assert text_of(predicted) == expected(prompt)
    assert answer.model == asked.get("model", NAME)


def test_eight_clients_with_ragged_prompts_in_two_modes(client, expected):
    prompts = [f"# file {i}\n" + PROMPT + f"    value_{i} = {i}\n" * (3 * i) for i in range(8)]
    modes = [i % 3 == 0 for i in range(8)]

    def one(i):
        return complete(client, prompts[i], extra_body={"kvpred": {"exact": modes[i]}})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(8)))
    assert [a.usage.mode for a in answers] == ["exact" if m else "predicted" for m in modes]
    assert [text_of(a) for a in answers] == [expected(p, m) for p, m in zip(prompts, modes, strict=True)]


def test_exact_and_predicted_caches_are_kept_apart(client, expected):
    """The same conversation in two modes: each finds its own prompt cache, never the other's."""
    first = fresh("two modes")
    answers, cached = [], []
    for prompt in (first, first + "\n    # and so on\n"):
        for exact in (False, True):
            answers.append(complete(client, prompt, extra_body={"kvpred": {"exact": exact}}))
            cached.append(answers[-1].usage.prompt_tokens_details.cached_tokens)
    assert max(cached[:2]) < 5 and min(cached[2:]) > 30
    assert text_of(answers[3]) == expected(first + "\n    # and so on\n", exact=True)


@pytest.mark.variations
@pytest.mark.parametrize("seed", [None, 1])
def test_the_auxiliary_drafts_when_asked(client, expected, seed):
    prompt = fresh(f"draft {seed}")
    options = {"seed": seed} if seed is not None else {}
    extra = {"draft_model": "auxiliary", "num_draft_tokens": 3}
    answer = complete(client, prompt, max_tokens=16, extra_body=extra, **options)
    assert text_of(answer) == expected(prompt, max_tokens=16)
    second = prompt + text_of(answer) + "\n\n\ndef copy_lines(source, target):\n" * 4
    followed = complete(client, second, max_tokens=16, extra_body=extra, **options)
    assert followed.usage.prompt_tokens_details.cached_tokens > 30
    assert text_of(followed)


def test_a_stream_that_is_cancelled(client, expected):
    stream = complete(client, fresh("cancelled"), max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    prompt = fresh("after a cancelled one")
    assert text_of(complete(client, prompt)) == expected(prompt)


def test_models(client):
    assert [m.id for m in client.models.list()] == [NAME, f"{NAME}:base"]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


WRONG = [
    ({"model": "gpt-4"}, 404, "model", "'gpt-4' does not exist"),
    ({"model": "nobody/nothing"}, 404, "model", "nobody/nothing"),
    ({"model": 7}, 400, None, "model"),
    ({"prompt": None}, 400, "prompt", "expected a string"),
    ({"prompt": ["a", "b"]}, 400, "prompt", "expected a string"),
    ({"prompt": "x = 1\n" * 4 * (CONTEXT or 512)}, 400, "prompt", f"context of {CONTEXT}"),
    ({"max_tokens": "many"}, 400, "max_tokens", "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens", "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens", "true, expected a whole number"),
    ({"temperature": "hot"}, 400, "temperature", "temperature"),
    ({"temperature": -1}, 400, "temperature", "temperature"),
    ({"temperature": float("nan")}, 400, "temperature", "finite"),
    ({"stream": "yes"}, 400, "stream", "stream"),
    ({"stream": True, "stream_options": 3}, 400, "stream_options", "expected an object"),
    ({"stop": [3]}, 400, "stop", "expected a string"),
    ({"stop": ""}, 400, "stop", "not empty"),
    ({"seed": "x"}, 400, "seed", "seed"),
    ({"seed": -5}, 400, "seed", "-5"),
    ({"n": 2}, 400, "n", "n is 2"),
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias", "outside"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", "'x'"),
    ({"logit_bias": {"1": None}}, 400, "logit_bias", "None"),
    ({"adapters": "a"}, 400, "adapters", "not supported"),
    ({"draft_model": "other/model"}, 400, "draft_model", "'auxiliary'"),
    ({"draft_model": "auxiliary", "num_draft_tokens": 99}, 400, "num_draft_tokens", "99"),
    ({"kvpred": 3}, 400, "kvpred", "expected an object"),
    ({"kvpred": {"exact": "no"}}, 400, "kvpred", "expected true or false"),
    ({"kvpred": {"exactly": True}}, 400, "kvpred", "exactly"),
    ({"kvpred": {"exact": True, "exact_last": 3}}, 400, "kvpred", "cannot apply"),
    ({"model": f"{NAME}:base", "kvpred": {"exact": False}}, 400, "kvpred", "the base alone"),
]
WRONG_CHATS = [
    ({"messages": None}, "messages is None"),
    ({"messages": []}, "not empty"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "a role"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}
            ]
        },
        "text",
    ),
    ({"messages": [{"role": "user", "content": "x"}], "tools": [3]}, "tools"),
    ({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tokenize": 1}}, "tokenize"),
]


def post(url, data, path="/v1/completions", headers=None):
    """(status, error object) of a raw request that is refused."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    request = urllib.request.Request(
        url + path, body, {"Content-Type": "application/json", **(headers or {})}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.headers["Content-Type"] == "application/json"
    error = json.loads(refused.value.read())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return refused.value.code, error


def test_wrong_requests_are_refused_and_the_next_is_right(served, client, expected):
    url = served[0]
    for given, status, param, message in WRONG:
        found, error = post(url, {"model": NAME, "prompt": "x = 1", "max_tokens": 4} | given)
        assert (found, error["param"]) == (status, param), (given, error)
        assert message in error["message"], (given, error)
    for given, message in WRONG_CHATS:
        found, error = post(url, {"model": NAME, "max_tokens": 4} | given, "/v1/chat/completions")
        assert found == 400 and message in error["message"], (given, error)
    prompt = fresh("after wrong ones")
    assert text_of(complete(client, prompt)) == expected(prompt)


@pytest.mark.parametrize("body", [b"", b'{"prompt": ', b"\xff\xfe", b"[1, 2]", b"3", b"[" * 100_000])
def test_malformed_json(served, body):
    status, error = post(served[0], body)
    assert status == 400 and "JSON" in error["message"]


def test_unknown_paths(served):
    assert post(served[0], {}, "/v1/embeddings")[0] == 404
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{served[0]}/v2", timeout=60)


def test_errors_are_the_client_s_own_exceptions(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        complete(client, "x", model="gpt-4")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        complete(client, "x = 1\n" * 4 * (CONTEXT or 512))
    assert long.value.code == "context_length_exceeded"


def test_the_answer_ends_with_the_context(client, demo_pair):
    prompt = demo_pair[1].decode(demo_pair[1].encode(PROMPT * (CONTEXT // 20))[1 : CONTEXT - 10])
    answer = complete(client, prompt, max_tokens=100)
    assert answer.usage.total_tokens <= CONTEXT
    assert answer.choices[0].finish_reason in ("length", "stop")


@pytest.mark.slow
def test_a_short_soak(served):
    import psutil

    found = soak(served[0], psutil.Process(served[1].pid), 60, clients=8, max_tokens=4, models=[NAME])
    assert found["lost"] == found["wrong"] == 0, found["examples"]
    assert {"malformed", "cancelled", "slow", "stream", "stop", "exact"} <= {*found["kinds"]}
    assert found["compared"] > 40 and found["resident_bytes_end"] > 0 and found["ttft_median"] > 0


def test_a_failure_of_generation_ends_its_requests_only(demo_pair, monkeypatch, expected):
    served = ServedPair("pair", *demo_pair)
    generator = PairGenerator(PairProvider([served], ServerSettings()), PairPromptCache(4))
    real, failures = mlx_lm.server.BatchGenerator.next, [RuntimeError("out of memory")]

    def fails_once(batch):
        if failures:
            raise failures.pop()
        return real(batch)

    monkeypatch.setattr(mlx_lm.server.BatchGenerator, "next", fails_once)

    def answer():
        request = mlx_lm.server.CompletionRequest("text", PROMPT, [], None, None)
        request.served, request.mode, request.draft = served, Mode(), None
        request.ttft, request.started, request.check_client = None, time.perf_counter(), lambda: None
        sampling = mlx_lm.server.SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.1)
        processors = mlx_lm.server.LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20)
        arguments = mlx_lm.server.GenerationArguments(
            None, sampling, processors, [], 8, 3, False, -1, None, None
        )
        return "".join(r.text for r in generator.generate(request, arguments)[1])

    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            answer()
        assert answer() == expected(PROMPT)
    finally:
        generator.stop_and_join()


def test_a_port_in_use_is_one_line(run, served):
    port = served[0].rpartition(":")[2]
    code, out, err = run("serve", "--port", port)
    assert code == 1 and out == ""
    assert "kvpred-mlx: error: " in err.splitlines()[-1] and "in use" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--draft", "gpt2"], ["--draft", "'gpt2', expected auxiliary"]),
        (["--log-level", "loud"], ["--log-level", "loud"]),
        (["--chat-template-args", "[1]"], ["--chat-template-args", "JSON object"]),
        (["--prompt-cache-bytes", "lots"], ["--prompt-cache-bytes", "lots"]),
        (["--kv-bits", "5"], ["--kv-bits", "5"]),
        (["--port", "99999"], ["--port"]),
    ],
)
def test_wrong_usage(run, arguments, parts):
    fails(run("serve", *arguments), 2, *parts)
