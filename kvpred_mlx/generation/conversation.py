"""A conversation with a pair: the history, the prompt cache behind it, and answers as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from kvpred_mlx.generation.stream import GenerationResponse, stream_generate
from kvpred_mlx.pair.model import KVPredictionModel


class Conversation:
    """Turns with one pair and one prompt cache.

    Each turn's prompt is the whole history; what the cache has of it already is not processed again.  Without a
    chat template the history is plain text that the pair continues.

    Args:
        pair: answers.
        tokenizer: mlx-lm's wrapper.
        system_prompt: first message of the history (chat templates only).
        context: tokens of history and answer together (None: no limit).
        options: passed on to `stream_generate`; `max_kv_size` is the prompt cache's.
    """

    def __init__(
        self,
        pair: KVPredictionModel,
        tokenizer: Any,
        system_prompt: str | None = None,
        context: int | None = None,
        **options: Any,
    ):
        self.pair, self.tokenizer, self.context = pair, tokenizer, context
        self._system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
        self._options = options
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.messages = list(self._system)
        self.forget_cache()

    def forget_cache(self) -> None:
        """Process the history again at the next turn: after an interruption, or in another mode."""
        self._cache = self.pair.make_cache(self._options.get("max_kv_size"))

    def say(self, text: str, max_tokens: int) -> Iterator[GenerationResponse]:
        """Answer `text`; what was answered is part of the history, also if it is stopped half-way.

        Raises:
            ValueError: the history is longer than the context; `text` is not part of it then.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt()
        except ValueError:
            self.messages.pop()
            raise
        answer = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        room = max_tokens if self.context is None else min(max_tokens, self.context - len(prompt))
        new = self._rewind(prompt)
        finished = False
        try:
            options = self._options | {"prompt_cache": self._cache}
            for response in stream_generate(self.pair, self.tokenizer, mx.array(new), room, **options):
                answer["content"] += response.text
                yield response
            finished = True
        finally:
            if not finished:  # it may have ended between two entries of the cache
                self.forget_cache()
                if not answer["content"]:
                    del self.messages[-2:]

    def _prompt(self) -> list[int]:
        if self.tokenizer.has_chat_template:
            prompt = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True)
        else:
            prompt = self.tokenizer.encode(_plain(self.messages))
        if self.context is not None and len(prompt) >= self.context:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, expected fewer than the model's context of "
                f"{self.context}: /reset begins a new one"
            )
        return prompt

    def _rewind(self, prompt: list[int]) -> list[int]:
        """Wind the cache back to what it has in common with `prompt`; returns the rest of `prompt`."""
        known = self._cache[-1].logged()
        common = next((i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b), None)
        common = min(len(known), len(prompt)) if common is None else common
        common = min(common, len(prompt) - 1)
        if len(known) > common and not can_trim_prompt_cache(self._cache):
            self.forget_cache()
            return prompt
        if len(known) > common:
            trim_prompt_cache(self._cache, len(known) - common)
        return prompt[common:]


def _plain(messages: list[dict[str, str]]) -> str:
    """The history as text, each message on lines of its own."""
    contents = [m["content"] for m in messages if m["role"] != "system"]
    return "".join(c if c.endswith("\n") or not c else c + "\n" for c in contents)
