"""Faults of kinds that people have reported of servers like this one: odd values, odd bodies, odd clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import threading
import time
from argparse import Namespace

import mlx.core as mx
import mlx_lm.server
import pytest
from processes import command, serving
from test_server import NAME, PROMPT

from kvpred_mlx.pair.modes import Mode
from kvpred_mlx.serving import generator as generator_module
from kvpred_mlx.serving.generator import PairGenerator, PairPromptCache, PairProvider
from kvpred_mlx.serving.handler import PairHandler
from kvpred_mlx.serving.random_state import mend_random_state
from kvpred_mlx.serving.served import ServedPair
from kvpred_mlx.serving.settings import ServerSettings


@pytest.fixture
def url(served):
    """The server's address."""
    return served[0]


@pytest.fixture(scope="module")
def plain():
    """The address of a server without a chat template."""
    with serving(command("serve")) as started:
        yield started[0]


def connect(url):
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)


def send(url, path, body, **headers):
    """(status, what is answered); `body` as an object, or as bytes."""
    connection = connect(url)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if text.startswith("{") else text


def complete(url, **fields):
    return send(url, "/v1/completions", {"prompt": PROMPT, "max_tokens": 3, **fields})


def chat(url, *messages, **fields):
    return send(url, "/v1/chat/completions", {"messages": list(messages), "max_tokens": 3, **fields})


def refused(answer, *parts):
    status, body = answer
    assert status == 400, body
    error = body["error"]
    assert error["type"] == "invalid_request_error" and all(p in error["message"] for p in parts), error


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"xtc_probability": 1.0, "xtc_threshold": 0.9}, ["xtc_threshold is 0.9", "0 to 0.5"]),
        ({"xtc_probability": 1.5}, ["xtc_probability is 1.5", "0 to 1"]),
        ({"repetition_context_size": 10**20}, ["repetition_context_size", "at most"]),
        ({"max_tokens": 10**20}, ["max_tokens", "at most"]),
        ({"stop": "\ud83d"}, ["stop", "surrogate"]),
        ({"stop": ["a", "\udc00"]}, ["stop[1]", "surrogate"]),
        ({"logit_bias": {"\ud83d": 1}}, ["logit_bias", "surrogate"]),
        ({"echo": True}, ["echo", "not supported"]),
        ({"response_format": {"type": "json_object"}}, ["response_format", "not supported"]),
        ({"tool_choice": "required"}, ["tool_choice", "not supported"]),
    ],
)
def test_odd_values_are_refused_and_the_next_request_is_answered(url, fields, parts):
    refused(complete(url, temperature=0.7, **fields), *parts)
    assert complete(url, temperature=0.7)[0] == 200


@pytest.mark.parametrize("top_k", [4095, 4096, 100_000])
def test_more_than_all_tokens_are_all(url, top_k):
    assert complete(url, temperature=0.7, top_k=top_k)[0] == 200
    assert complete(url, temperature=0.7)[0] == 200


def test_a_bad_request_ends_no_other_stream(url):
    found = []
    fields = {"stream": True, "max_tokens": 60}
    thread = threading.Thread(target=lambda: found.append(complete(url, **fields)))
    thread.start()
    for bad in ({"stop": "\ud83d"}, {"frequency_context_size": 10**20}, {"xtc_threshold": 2.0}):
        refused(complete(url, **bad))
    thread.join()
    status, text = found[0]
    assert status == 200 and text.rstrip().endswith("data: [DONE]") and "error" not in text


def test_null_stands_for_the_default(url):
    names = (
        "temperature top_p top_k min_p stop seed logprobs stream stream_options logit_bias presence_penalty n "
        "frequency_penalty max_completion_tokens xtc_probability top_logprobs echo response_format kvpred model"
    )
    found = complete(url, **dict.fromkeys(names.split()))
    assert found[0] == 200 and found[1]["choices"][0]["text"] == complete(url)[1]["choices"][0]["text"]


def test_a_template_that_refuses(url):
    refused(chat(url, {"role": "user", "content": "refuse this"}), "no such talk")


@pytest.mark.parametrize(
    "calls", [["f"], "f", [{}], [{"function": {}}], [{"function": {"name": "f", "arguments": "{"}}]]
)
def test_tool_calls_that_are_none(url, calls):
    history = {"role": "assistant", "content": None, "tool_calls": calls}
    refused(chat(url, {"role": "user", "content": "x"}, history), "messages[1].tool_calls")


def test_without_a_template_content_is_text(plain):
    """Given as parts or as nothing."""
    said = chat(plain, {"role": "user", "content": "def f"}, {"role": "assistant", "content": ""})
    parts = [{"type": "text", "text": "def "}, {"type": "text", "text": "f"}]
    as_parts = chat(plain, {"role": "user", "content": parts}, {"role": "assistant", "content": None})
    assert (
        said[0] == as_parts[0] == 200
        and said[1]["usage"]["prompt_tokens"] == as_parts[1]["usage"]["prompt_tokens"]
    )


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        ("/v1/completions", {"prompt": PROMPT}, "text_completion"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "chat.completion.chunk"),
    ],
)
def test_every_chunk_has_its_endpoint_s_object(url, path, fields, expected):
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
    _, text = send(url, path, {**fields, **options})
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert {chunk["object"] for chunk in chunks} == {expected} and "usage" in chunks[-1]


@pytest.mark.variations(2)
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"draft_model": "auxiliary"}, {"seed": 1}])
def test_stop_strings_inside_tokens(url, fields):
    """Text before the first one and nothing after it, wherever it begins and ends."""
    whole = complete(url, max_tokens=24)[1]["choices"][0]["text"]
    for begin, end in ((3, 5), (7, 15), (10, 11)):
        stop = whole[begin:end]
        status, answer = complete(url, max_tokens=24, stop=["never to be found", stop], **fields)
        assert status == 200
        if fields.get("stream"):
            chunks = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            text, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        assert (text, reason) == (whole[: whole.find(stop)], "stop")


def test_logprobs_in_openai_s_shapes(url):
    _, found = complete(url, logprobs=True, top_logprobs=3, max_tokens=4)
    choice = found["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    for word, value, tops in zip(
        *(choice["logprobs"][n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert list(tops.values()) == sorted(tops.values(), reverse=True) and tops[word] == value == max(
            tops.values()
        )
    _, found = chat(url, {"role": "user", "content": PROMPT}, logprobs=True, top_logprobs=2)
    for entry in found["choices"][0]["logprobs"]["content"]:
        tops = [t["logprob"] for t in entry["top_logprobs"]]
        assert (
            tops == sorted(tops, reverse=True)
            and len(tops) == 2
            and bytes(entry["bytes"]).decode() == entry["token"]
        )
    refused(complete(url, logprobs=True, stream=True), "logprobs are not supported in a stream")
    refused(complete(url, top_logprobs=2), "top_logprobs without logprobs")


def test_a_client_that_goes_away_ends_its_request(demo_pair):
    """Also one that did not ask for a stream: at the next token, or at the next piece of its prompt."""
    handler, (here, there) = object.__new__(PairHandler), socket.socketpair()
    handler.connection = here
    generator = PairGenerator(
        PairProvider([ServedPair("pair", *demo_pair)], ServerSettings()), PairPromptCache(4)
    )
    try:
        request = mlx_lm.server.CompletionRequest("text", PROMPT, [], None, None)
        request.served, request.mode, request.draft = generator.model_provider.default, Mode(), None
        request.ttft, request.started, request.check_client = None, time.perf_counter(), handler._check_client
        sampling = mlx_lm.server.SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.1)
        processors = mlx_lm.server.LogitsProcessorArguments({0: -100.0}, 0.0, 20, 0.0, 20, 0.0, 20)
        arguments = mlx_lm.server.GenerationArguments(
            None, sampling, processors, [], 400, 3, False, -1, None, None
        )
        ctx, answer = generator.generate(request, arguments)
        assert next(answer).text is not None
        there.close()
        with pytest.raises(ConnectionError):
            list(answer)
        ctx.stop()  # what mlx-lm's handler does then
    finally:
        generator.stop_and_join()
        here.close()


def test_health_tells_of_failures_that_go_on(demo_pair, monkeypatch):
    """One failure is a request's; three without an answer between them are the server's, until it answers again."""

    def broken(self):
        with contextlib.suppress(queue.Empty):
            self.requests.get(timeout=0.05)
            raise MemoryError("no memory")

    monkeypatch.setattr(PairGenerator, "_generate", broken)
    served = [ServedPair("pair", *demo_pair)]
    generator = PairGenerator(PairProvider(served, ServerSettings()), PairPromptCache(4))
    request = Namespace(check_client=lambda: None, ttft=None, started=0.0)
    try:
        for healthy in (True, True, False):
            answers = queue.Queue()
            generator.requests.put((answers,))
            assert isinstance(answers.get(timeout=30), MemoryError) and generator.is_healthy is healthy
        monkeypatch.setattr(generator_module, "PATIENCE_SECONDS", 0.0)
        assert generator.is_healthy
        monkeypatch.undo()
        assert not generator.is_healthy
        assert list(generator._timed(request, iter("x"))) == ["x"] and generator.is_healthy
    finally:
        generator.stop_and_join()
    assert not generator.is_healthy


@pytest.mark.usefixtures("compiling")
def test_random_numbers_are_whole_after_a_failure_in_a_sampler():
    """A function that fails while it is compiled leaves a state that no sample can be drawn with."""

    def fails(x):
        raise ValueError(mx.random.normal(x.shape))

    with pytest.raises(ValueError):
        mx.compile(fails, inputs=mx.random.state, outputs=mx.random.state)(mx.zeros(3))
    with pytest.raises(RuntimeError):
        mx.eval(mx.random.state)
    mend_random_state()
    mx.eval(mx.random.normal((3,)))


def test_bodies_in_chunks(url):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 3}).encode()
    pieces = (body[i : i + 7] for i in range(0, len(body), 7))
    connection = connect(url)
    connection.request(
        "POST", "/v1/completions", pieces, {"Content-Type": "application/json"}, encode_chunked=True
    )
    answer = connection.getresponse()
    assert answer.status == 200
    assert json.loads(answer.read())["choices"][0]["text"] == complete(url)[1]["choices"][0]["text"]
    refused(send(url, "/v1/completions", b"zz\r\n", **{"Transfer-Encoding": "chunked"}), "a chunk's size")


def test_head(url):
    for path, status in (("/v1/models", 200), ("/health", 200), ("/nothing", 404)):
        connection = connect(url)
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert answer.status == status and answer.read() == b""
        connection.close()
    assert NAME in json.dumps(send_get(url, "/v1/models"))


def send_get(url, path):
    connection = connect(url)
    connection.request("GET", path)
    return json.loads(connection.getresponse().read())
