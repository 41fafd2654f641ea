"""Requests with values of every type in every field, beside a client whose answers must not change."""

from __future__ import annotations

import json
import threading

import psutil
import pytest
from conftest import CHAT_TEMPLATE
from hypothesis import given
from hypothesis import strategies as st
from odd import TEXTS, VALUES, few
from processes import command, serving
from test_server import NAME, PROMPT
from test_server_faults import connect, send

pytestmark = pytest.mark.slow

FIELDS = [
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream",
    "stream_options", "logprobs", "top_logprobs", "logit_bias", "repetition_penalty", "repetition_context_size",
    "presence_penalty", "frequency_penalty", "xtc_probability", "xtc_threshold", "n", "echo", "suffix", "best_of",
    "response_format", "tools", "tool_choice", "role_mapping", "chat_template_kwargs", "adapters", "draft_model",
    "num_draft_tokens", "kvpred", "user", "requested_model",
]  # fmt: skip
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name"]), VALUES | TEXTS, max_size=3)
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": TEXTS})
    | VALUES,
    max_size=3,
)  # fmt: skip
MEMORY = 300e6  # bytes that the server may grow by


@pytest.fixture(scope="module")
def served():
    """The server's address, and a client beside whoever else asks: (what it got, what went wrong)."""
    with serving(command("serve", "--chat-template", CHAT_TEMPLATE)) as (url, process, _):
        got, wrong, stop = [], [], threading.Event()

        def steady():
            while not stop.is_set():
                try:
                    got.append(streamed(url))
                except Exception as error:  # noqa: BLE001 - whatever it is, it is this test's subject
                    wrong.append(error)

        thread = threading.Thread(target=steady)
        thread.start()
        before = psutil.Process(process.pid).memory_info().rss
        yield url
        stop.set()
        thread.join()
        assert not wrong and len(set(got)) == 1, (wrong, set(got))
        assert psutil.Process(process.pid).memory_info().rss < before + MEMORY
        connection = connect(url)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200


def streamed(url):
    """The text of a well-formed stream."""
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True}
    status, text = send(url, "/v1/completions", body)
    assert status == 200, text
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines if json.loads(line)["choices"])


def check(status, answer, kind):
    """Whether an answer, an object or a stream's text, has the form of its endpoint's, or of an error's."""
    if status == 200 and isinstance(answer, str):
        assert answer.startswith(("data: ", ": ")), answer
        for line in answer.splitlines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" in event or event["object"].startswith(kind), event
    elif status == 200:
        assert answer["object"].startswith(kind), answer
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    else:
        assert status in (400, 404), (status, answer)
        assert answer["error"]["message"] and answer["error"]["type"], answer


def bounded(body):
    """With an answer of a few tokens, where nothing else is asked for."""
    if all(body.get(n) is None for n in ("max_tokens", "max_completion_tokens")):
        body["max_tokens"] = 2
    return body


@few
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), TEXTS | VALUES)
def test_completions(served, fields, prompt):
    given_prompt = {"prompt": prompt} if prompt is not None else {}
    check(*send(served, "/v1/completions", bounded(fields | given_prompt)), "text_completion")


@few
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), MESSAGES | VALUES)
def test_chat(served, fields, messages):
    check(*send(served, "/v1/chat/completions", bounded(fields | {"messages": messages})), "chat.completion")


@few
@given(st.binary(max_size=40) | VALUES.map(lambda v: json.dumps(v).encode()), st.sampled_from(["", "chat/"]))
def test_bodies(served, body, chat):
    status, answer = send(served, f"/v1/{chat}completions", body)
    assert status in (400, 404), (status, answer)
    assert answer["error"]["message"]
