"""OpenAI's own client: streams, stop strings, probabilities, tool calls and errors as it understands them."""

from __future__ import annotations

import openai
import pytest
from test_server import NAME, PROMPT

TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": PROMPT}


@pytest.fixture
def complete(client):
    return lambda **more: client.completions.create(
        **{"model": NAME, "prompt": PROMPT, "max_tokens": 16} | more
    )


@pytest.fixture
def chat(client):
    return lambda *messages, **more: client.chat.completions.create(
        **{"model": NAME, "messages": list(messages) or [USER], "max_tokens": 16} | more
    )


def test_streams_and_their_usage(complete, chat):
    whole = complete()
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert {c.object for c in chunks} == {"text_completion"}
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert (
        chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 16
    )
    whole = chat()
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert (
        text == whole.choices[0].message.content and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    )


@pytest.mark.variations
@pytest.mark.parametrize("streamed", [False, True])
def test_stop_strings(complete, chat, streamed):
    text = complete().choices[0].text
    stop, before = text[7:12], text[: text.find(text[7:12])]
    if streamed:
        chunks = list(complete(stop=["never there", stop], stream=True))
        found = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
        chunks = list(chat(stop=stop, stream=True))
        talk = "".join(c.choices[0].delta.content or "" for c in chunks)
    else:
        choice = complete(stop=["never there", stop]).choices[0]
        found = choice.text, choice.finish_reason
        talk = chat(stop=stop).choices[0].message.content
    assert found == (before, "stop") and stop not in talk


def test_logprobs(complete, chat):
    choice = complete(logprobs=True, extra_body={"top_logprobs": 3}, max_tokens=4).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text and len(choice.logprobs.token_logprobs) == 4
    assert choice.logprobs.text_offset[0] == 0
    for token, value, tops in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert tops[token] == value == max(tops.values())
    content = chat(logprobs=True, top_logprobs=2, max_tokens=4).choices[0].logprobs.content
    for entry in content:
        assert [t.logprob for t in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].token == entry.token and bytes(entry.bytes).decode() == entry.token
    with pytest.raises(openai.BadRequestError, match="logprobs are not supported in a stream"):
        chat(logprobs=True, stream=True)


@pytest.mark.slow
def test_tool_calls_in_a_conversation(chat):
    call = {"id": "1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a.txt"}'}}
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "text", "tool_call_id": "1"},
    ]
    with_calls = chat(*history, tools=[TOOL])
    assert with_calls.usage.prompt_tokens > chat().usage.prompt_tokens
    assert chat(tools=[TOOL], tool_choice="none").usage.prompt_tokens == chat().usage.prompt_tokens
    call["function"]["arguments"] = "{"
    with pytest.raises(
        openai.BadRequestError, match=r"messages\[1\].tool_calls\[0\].function.arguments"
    ) as wrong:
        chat(*history)
    assert wrong.value.param == "messages" and wrong.value.type == "invalid_request_error"


@pytest.mark.variations(5)
@pytest.mark.parametrize(
    ("fields", "param", "parts"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", ["json_object", "not supported"]),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", ["required", "not supported"]),
        ({"n": 2}, "n", ["n is 2", "expected 1"]),
        ({"temperature": -1}, "temperature", ["temperature is -1", "at least 0"]),
        ({"temperature": "hot"}, "temperature", ["temperature is 'hot'", "a number"]),
        ({"top_p": 1.5}, "top_p", ["top_p is 1.5", "0 to 1"]),
        ({"presence_penalty": "x"}, "presence_penalty", ["presence_penalty is 'x'", "a number"]),
        ({"max_tokens": -1}, "max_tokens", ["max_tokens is -1", "at least 1"]),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", ["is 1.5", "a whole number"]),
        ({"logprobs": True, "top_logprobs": 20}, "top_logprobs", ["top_logprobs is 20", "-1 to 11"]),
        ({"seed": -1}, "seed", ["seed is -1", "0 to"]),
        ({"logit_bias": {"x": 1}}, "logit_bias", ["'x'", "a number for each id"]),
        ({"extra_body": {"xtc_threshold": 0.9}}, "xtc_threshold", ["xtc_threshold is 0.9", "0 to 0.5"]),
        ({"extra_body": {"top_k": -2}}, "top_k", ["top_k is -2", "at least 0"]),
        ({"extra_body": {"min_p": 7}}, "min_p", ["min_p is 7", "0 to 1"]),
        (
            {"extra_body": {"repetition_context_size": 10**20}},
            "repetition_context_size",
            [str(10**20), "at most"],
        ),
        (
            {"extra_body": {"kvpred": {"exact_last": 2.5}}},
            "kvpred",
            ["last is 2.5", "expected a number of tokens"],
        ),
    ],
)
def test_what_is_refused(chat, fields, param, parts):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(**fields)
    error = refused.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", param)
    assert all(part in error.body["message"] for part in parts), error.body


def test_whole_numbers_where_fractions_are_expected(chat):
    assert chat(
        temperature=1, top_p=1, extra_body={"xtc_probability": 0, "xtc_threshold": 0, "min_p": 0}
    ).choices


def test_a_template_that_refuses_and_a_model_that_is_not_there(chat):
    with pytest.raises(openai.BadRequestError, match="no such talk"):
        chat({"role": "user", "content": "refuse"})
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        chat(model="gpt-4")


@pytest.mark.slow
def test_null_is_the_default(chat, complete):
    nothing = dict.fromkeys(("temperature", "top_p", "stop", "seed", "logprobs", "n", "logit_bias", "stream"))
    assert complete(**nothing).choices[0].text == complete().choices[0].text
    assert chat(**nothing, response_format={"type": "text"}).choices[0].message.content == (
        chat().choices[0].message.content
    )


def test_echo_and_a_suffix_are_refused(complete):
    for fields in ({"echo": True}, {"suffix": "end"}, {"best_of": 2}):
        with pytest.raises(openai.BadRequestError, match=f"{next(iter(fields))} is .* not supported"):
            complete(**fields)


def test_a_stream_that_is_left(complete):
    """And the next request is answered at once."""
    stream = complete(stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    assert complete(max_tokens=2).usage.completion_tokens == 2


def test_models(client):
    assert [m.id for m in client.models.list()] == [NAME, f"{NAME}:base"]
