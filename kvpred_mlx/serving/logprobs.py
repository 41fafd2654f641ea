"""Probabilities of an answer's tokens in the shapes of OpenAI's two interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def logprobs(
    tokenizer: Any,
    tokens: Sequence[int],
    chosen: Sequence[float],
    tops: Sequence[Sequence[dict[str, Any]]],
    *,
    chat: bool,
) -> dict[str, Any]:
    """Of chat completions (`content`) or of completions (`tokens`, `token_logprobs`, `top_logprobs`, `text_offset`).

    Args:
        tokens: of the answer.
        chosen: their log probabilities.
        tops: the likeliest tokens at each place, as mlx-lm finds them: in no order, and not always with the chosen one.
    """
    words = [tokenizer.decode([token]) for token in tokens]
    ordered = [sorted(top, key=lambda t: -t["logprob"]) for top in tops] or [[] for _ in tokens]
    named = [[(tokenizer.decode([t["id"]]), t["logprob"]) for t in top] for top in ordered]
    if chat:
        content = [
            _entry(word, value) | {"id": token, "top_logprobs": [_entry(*top) for top in top_words]}
            for token, word, value, top_words in zip(tokens, words, chosen, named, strict=True)
        ]
        return {"content": content}
    starts = [len("".join(words[:i])) for i in range(len(words))]
    return {
        "tokens": words,
        "token_logprobs": list(chosen),
        "top_logprobs": [dict(top) for top in named] if tops else None,
        "text_offset": starts,
    }


def _entry(word: str, value: float) -> dict[str, Any]:
    return {"token": word, "logprob": value, "bytes": list(word.encode())}
