"""What a request may ask: refused here is what mlx-lm does not look at and would trip over."""

from __future__ import annotations

import json
import math
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
LARGEST = (1 << 31) - 1  # of sizes and counts: more does not fit MLX's integers
WHOLE = {  # whole numbers: the least, and the largest; mlx-lm would take true and false for numbers
    "max_tokens": (1, LARGEST), "max_completion_tokens": (1, LARGEST), "num_draft_tokens": (0, LARGEST),
    "seed": (0, (1 << 64) - 1), "top_k": (0, LARGEST), "top_logprobs": (-1, 11),
    "repetition_context_size": (0, LARGEST), "presence_context_size": (0, LARGEST),
    "frequency_context_size": (0, LARGEST),
}  # fmt: skip
NUMBERS = {  # likewise numbers; mlx-lm's samplers refuse more, in mid-generation
    "temperature": (0, None), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0, None),
    "presence_penalty": (None, None), "frequency_penalty": (None, None), "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
}  # fmt: skip
FLAGS = {"stream", "logprobs"}
UNKEPT = {  # what OpenAI promises, with the values that ask for nothing
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
OBJECTS = ("logit_bias", "stream_options", "role_mapping", "chat_template_kwargs")


class RequestError(ValueError):
    """A request that is refused, in the terms of OpenAI's errors."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def check_types(body: dict[str, Any]) -> None:
    """Refuse numbers that are none, and parameters that mlx-lm does not look at.

    Raises:
        RequestError: naming the parameter.
    """
    check_representable(body)
    for name, values in UNKEPT.items():
        if name in body and body[name] not in values:
            raise RequestError(f"{name} is {_short(body[name])}, which is not supported", name)
    for name, value in body.items():
        if name in WHOLE or name in NUMBERS:
            _check_number(name, value)
        if name in FLAGS and type(value) is not bool:
            raise RequestError(f"{name} is {value!r}, expected true or false", name)
    if body.get("stream") and (
        body.get("logprobs") or (isinstance(body.get("top_logprobs"), int) and body["top_logprobs"] > 0)
    ):
        raise RequestError("logprobs are not supported in a stream, expected one of the two", "logprobs")
    if isinstance(body.get("top_logprobs"), int) and body["top_logprobs"] > 0 and not body.get("logprobs"):
        raise RequestError("top_logprobs without logprobs, expected logprobs: true beside it", "top_logprobs")
    if body.get("n") not in (None, 1):
        raise RequestError(f"n is {body['n']!r}, expected 1: one choice for each request", "n")
    if body.get("adapters") is not None:
        raise RequestError("adapters are not supported: load them into the pair", "adapters")
    stop = body.get("stop")
    if not (stop is None or _is_text(stop) or (isinstance(stop, list) and all(map(_is_text, stop)))):
        raise RequestError(
            f"stop is {stop!r}, expected a string that is not empty, or a list of such", "stop"
        )
    for name in OBJECTS:
        if not isinstance(body.get(name), dict | None):
            raise RequestError(f"{name} is {body[name]!r}, expected an object", name)
    for token, bias in (body.get("logit_bias") or {}).items():
        if type(bias) not in (int, float) or not math.isfinite(bias) or not token.lstrip("-").isdigit():
            raise RequestError(
                f"logit_bias is {{{token!r}: {bias!r}}}, expected a number for each id", "logit_bias"
            )


def _check_number(name: str, value: Any) -> None:
    """Refuse what is no number, or out of its range."""
    whole = name in WHOLE
    low, high = WHOLE.get(name) or NUMBERS[name]
    if type(value) is not int and (whole or type(value) is not float):
        shown = _short(value) if type(value) is not bool else json.dumps(value)
        raise RequestError(f"{name} is {shown}, expected a {'whole ' * whole}number", name)
    if not math.isfinite(value):
        raise RequestError(f"{name} is {value}, expected a finite number", name)
    if (low is not None and value < low) or (high is not None and value > high):
        expected = f"{low} to {high}" if high is not None and high != LARGEST else f"at least {low}"
        if high == LARGEST and value > high:
            expected = f"at most {LARGEST}"
        raise RequestError(f"{name} is {value}, expected {expected}", name)


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """The fields that say something: null stands for a field's default, as in OpenAI's interface."""
    return {name: value for name, value in body.items() if value is not None}


def plain_text(content: Any) -> str:
    """A message's content, given as text, as parts or as nothing, as text."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def check_representable(value: Any, where: str = "") -> None:
    """Refuse text that is none: half of a character that JSON writes as two (a lone surrogate).

    Raises:
        RequestError: naming the field.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            name = where.partition(".")[0] or None
            raise RequestError(
                f"{where or 'a name'} has half of a surrogate pair, expected text", name
            ) from error
    elif isinstance(value, dict):
        for key, item in value.items():
            check_representable(key, where)
            check_representable(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_representable(item, f"{where}[{i}]")


def check_input(body: dict[str, Any], chat: bool) -> None:
    """Refuse a prompt or messages that are not text.

    Raises:
        RequestError: naming the parameter.
    """
    if not chat:
        if not isinstance(body.get("prompt"), str):
            raise RequestError(f"prompt is {_short(body.get('prompt'))}, expected a string", "prompt")
        return
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {_short(messages)}, expected a list that is not empty", "messages")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RequestError(f"{where} is {_short(message)}, expected an object with a role", "messages")
        _check_calls(message.get("tool_calls"), where)
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        texts = all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
        )
        if not isinstance(content, str | list | None) or not texts:
            raise RequestError(f"{where}.content is {_short(content)}, expected text", "messages")
    tools = body.get("tools")
    if not (tools is None or (isinstance(tools, list) and all(isinstance(t, dict) for t in tools))):
        raise RequestError(f"tools is {_short(tools)}, expected a list of objects", "tools")


def _check_calls(calls: Any, where: str) -> None:
    """Refuse a history of tool calls that mlx-lm could not hand to a chat template."""
    if calls is None:
        return
    if not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls is {_short(calls)}, expected a list", "messages")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"{where}.tool_calls[{i}] is {_short(call)}, expected an object with a function and its name",
                "messages",
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                json.loads(arguments)
            except ValueError as error:
                raise RequestError(
                    f"{where}.tool_calls[{i}].function.arguments is {_short(arguments)}, expected JSON",
                    "messages",
                ) from error


def check_prompt(prompt: list[int], context: int | None, vocab_size: int) -> None:
    """Refuse what would end the generation thread or be answered with nonsense.

    Raises:
        RequestError: the prompt is empty, too long, or has tokens that the model does not know.
    """
    if not prompt:
        raise RequestError("the prompt is empty, expected at least one token", "prompt")
    if context is not None and len(prompt) >= context:
        message = f"the prompt has {len(prompt)} tokens, expected fewer than the model's context of {context}"
        raise RequestError(message, "prompt", "context_length_exceeded")
    if max(prompt) >= vocab_size:
        raise RequestError(
            f"the prompt has token id {max(prompt)}, expected ids below {vocab_size}", "prompt"
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
