"""Functions' bodies that a base writes itself, behind real text as far as a body's beginning: the paper's task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvpred_mlx.making.pairing import LoadedModel
from kvpred_mlx.making.quality import prefill_of
from kvpred_mlx.progress import ProgressCallback, no_progress

TOKENS = 8192  # of prompts that are read side by side


def write_bodies(
    base: LoadedModel,
    befores: Sequence[str],
    prompt_tokens: int,
    answer_tokens: int,
    count: int,
    progress: ProgressCallback = no_progress,
    seed: int = 0,
) -> np.ndarray:
    """Prompts and the bodies that the base writes, greedily: at most `count` rows `[prompt_tokens + answer_tokens]`.

    Args:
        befores: what precedes bodies (`requests.documented_functions`), in an order that `seed` decides; the last
            `prompt_tokens` are read.  Bodies that the base ends sooner are left out.

    Raises:
        ValueError: no text is long enough, or all bodies are shorter.
    """
    prompts = _ends(base, befores, prompt_tokens, count, seed)
    size = max(1, TOKENS // prompt_tokens)
    answers = []
    for start in range(0, len(prompts), size):
        progress(start, len(prompts), "bodies")
        answers.append(greedy(base, prompts[start : start + size], answer_tokens))
    progress(len(prompts), len(prompts), "bodies")
    written = np.concatenate(answers)
    ends = list(cast(TokenizerWrapper, base.tokenizer).eos_token_ids)
    whole = ~np.isin(written, ends).any(axis=1)
    if not whole.any():
        raise ValueError(f"{base.name} ends every body within {answer_tokens} tokens")
    return np.hstack([prompts[whole], written[whole]])


def greedy(base: LoadedModel, prompts: np.ndarray, tokens: int) -> np.ndarray:
    """The base's most likely continuations `[B, tokens]` of prompts `[B, P]`."""
    model, cache = prefill_of(base.model)(mx.array(prompts))
    mx.eval([c.state for c in cache])
    last, out = mx.array(prompts[:, -1:]), []
    for _ in range(tokens):
        last = mx.argmax(model(last, cache=cache)[:, -1:], axis=-1)
        mx.async_eval(last)
        out.append(last)
    return np.array(mx.concatenate(out, axis=1))


def _ends(base: LoadedModel, befores: Sequence[str], length: int, count: int, seed: int) -> np.ndarray:
    """The last `length` tokens `[<= count, length]` of texts that have so many."""
    rows, tokenizer = [], cast(TokenizerWrapper, base.tokenizer)
    for text in random.Random(seed).sample(befores, len(befores)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= length:
            rows.append(ids[-length:])
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"no function with a docstring has {length} tokens before its body")
    return np.array(rows)
