"""Speculative decoding with the pair's own auxiliary as draft model: it has read the prompt already."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from kvpred_mlx.generation.chunks import process_prompt
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.taps.states import holds_states

AUXILIARY = "auxiliary"  #: the draft's name in flags and requests


class AuxiliaryDraft:
    """A pair's auxiliary as mlx-lm's draft model, without a prompt cache of its own.

    It drafts from the cache with which it predicted the prompt: what the base has verified stands in the pair's
    token log, what the auxiliary has not read of it is read first, and winding the pair's cache back winds the
    auxiliary back.

    Args:
        pair: whose auxiliary drafts.
    """

    def __init__(self, pair: KVPredictionModel):
        self._pair = pair
        self.drafted = 0  #: tokens that were drafted so far

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """Logits [1, 1, vocabulary] after the last of `inputs` [1, L]; the others are in the log already."""
        self.drafted += 1
        entry, auxiliary = cache[0].entry, self._pair.auxiliary_model
        entry.end_prompt()
        unread = entry.unread()
        if unread.shape[1] > 1:  # a prompt that the base processed exactly, or the end of one
            process_prompt(auxiliary, unread[0], list(entry.auxiliary))
            unread = unread[:, :0]
        tokens = mx.concatenate([unread.astype(inputs.dtype), inputs[:, -1:]], axis=1)
        return auxiliary(tokens, cache=list(entry.auxiliary))[:, -1:]

    def make_cache(self) -> list[Any]:
        """None of its own."""
        return []

    def attach(self, prompt_cache: list[Any], num_draft_tokens: int, end: int | None) -> list[Any]:
        """The prompt cache that speculative decoding takes: the pair's, and the draft's view of it.

        Args:
            prompt_cache: the pair's; a cache that is only as deep as the predictor reads is read again whole.
            end: tokens that it will hold at the end (None: any number).

        Raises:
            ValueError: the cache is not the pair's, cannot be wound back, or verification calls would be taken
                for prompts.
        """
        entry = prompt_cache[-1]
        if not isinstance(entry, AuxiliaryCache):
            raise ValueError("the auxiliary drafts from a prompt cache made by the pair's make_cache()")
        for model in (self._pair.base, self._pair.auxiliary_model):
            if holds_states(whole := make_prompt_cache(model)) and not can_trim_prompt_cache(whole):
                raise ValueError(
                    f"{getattr(model, 'model_type', 'a model')} keeps states that cannot be wound back to before a "
                    "draft: no speculative decoding"
                )
        if num_draft_tokens + 1 >= self._pair.min_prompt_tokens:
            raise ValueError(
                f"{num_draft_tokens} draft tokens, expected fewer than {self._pair.min_prompt_tokens - 1}: "
                f"longer calls are prompts (min_prompt_tokens {self._pair.min_prompt_tokens})"
            )
        whole = make_prompt_cache(self._pair.auxiliary_model)
        if len(entry.auxiliary) < len(whole):
            entry.read_again(whole)
        caches = [*prompt_cache[:-1], *entry.auxiliary]
        windows = [size for c in caches if (size := getattr(c, "max_size", None)) is not None]
        if windows and (end is None or min(windows) < end):
            room = "an answer of any length" if end is None else f"{end} tokens (prompt, answer and draft)"
            raise ValueError(
                f"a cache of {min(windows)} tokens cannot be wound back once it is full, expected room for {room} "
                "to use a draft"
            )
        return [*prompt_cache, _View(entry)]


class _View:
    """The draft's part of the prompt cache, as mlx-lm sees it: the pair's entry does the winding back."""

    def __init__(self, entry: AuxiliaryCache):
        self.entry = entry

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        return n
