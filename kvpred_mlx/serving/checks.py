"""What a request may ask: refused here is what mlx-lm does not look at and would trip over."""

from __future__ import annotations

import json
import math
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
NUMBERS = {  # parameters that mlx-lm would take true and false for
    "max_tokens", "max_completion_tokens", "num_draft_tokens", "seed", "temperature", "top_p", "top_k", "min_p",
    "top_logprobs", "repetition_penalty", "repetition_context_size", "presence_penalty", "presence_context_size",
    "frequency_penalty", "frequency_context_size", "xtc_probability", "xtc_threshold",
}  # fmt: skip
FLAGS = {"stream", "logprobs"}
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
    for name, value in body.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{name} is {value}, expected a finite number", name)
        if type(value) is bool and name in NUMBERS:
            raise RequestError(f"{name} is {json.dumps(value)}, expected a number", name)
        if name in FLAGS and type(value) is not bool:
            raise RequestError(f"{name} is {value!r}, expected true or false", name)
    seed = body.get("seed")
    if type(seed) is int and not 0 <= seed < 1 << 64:
        raise RequestError(f"seed is {seed}, expected 0 to {(1 << 64) - 1}", "seed")
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
