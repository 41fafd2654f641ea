"""Windows whose prompts end where a function's body begins, and whose answers are the base's own: the paper's task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvpred_mlx.making.pairing import LoadedModel
from kvpred_mlx.making.windows import Windows
from kvpred_mlx.progress import ProgressCallback, no_progress

CHARACTERS_PER_TOKEN = 8  # more than there are, so that what is encoded is long enough
BATCH = 64  # bodies that are written side by side


def body_windows(
    base: LoadedModel,
    befores: Sequence[str],
    prompt_tokens: int,
    answer_tokens: int,
    count: int,
    progress: ProgressCallback = no_progress,
    seed: int = 0,
) -> Windows:
    """At most `count` windows, in a random order that `seed` decides.

    Args:
        base: writes the bodies, greedily; those that it ends before `answer_tokens` are left out.
        befores: what precedes bodies (`requests.documented_functions`), of which the last `prompt_tokens` are read.

    Raises:
        ValueError: no text is long enough, or all bodies are shorter.
    """
    prompts = _ends(base, befores, prompt_tokens, count, seed)
    answers = []
    for start in range(0, len(prompts), BATCH):
        progress(start, len(prompts), "bodies")
        answers.append(greedy(base, prompts[start : start + BATCH], answer_tokens))
    progress(len(prompts), len(prompts), "bodies")
    written = np.concatenate(answers)
    ends = list(cast(TokenizerWrapper, base.tokenizer).eos_token_ids)
    whole = ~np.isin(written, ends).any(axis=1)
    if not whole.any():
        raise ValueError(f"{base.name} ends every body within {answer_tokens} tokens")
    kept = int(whole.sum())
    return Windows(prompts[whole], written[whole], np.arange(kept), np.full(kept, np.nan))


def greedy(base: LoadedModel, prompts: np.ndarray, tokens: int) -> np.ndarray:
    """The base's most likely continuations `[B, tokens]` of prompts `[B, P]`."""
    cache = make_prompt_cache(base.model)
    last, out = mx.array(prompts), []
    base.model(last[:, :-1], cache=cache)
    mx.eval([c.state for c in cache])
    last = last[:, -1:]
    for _ in range(tokens):
        last = mx.argmax(base.model(last, cache=cache)[:, -1:], axis=-1)
        mx.async_eval(last)
        out.append(last)
    return np.array(mx.concatenate(out, axis=1))


def _ends(base: LoadedModel, befores: Sequence[str], length: int, count: int, seed: int) -> np.ndarray:
    """The last `length` tokens `[<= count, length]` of texts that have so many, each from the beginning of a line."""
    rows, tokenizer = [], cast(TokenizerWrapper, base.tokenizer)
    for text in random.Random(seed).sample(befores, len(befores)):
        cut = text[-CHARACTERS_PER_TOKEN * length :]
        ids = tokenizer.encode(cut if cut == text else cut.partition("\n")[2], add_special_tokens=False)
        if len(ids) >= length:
            rows.append(ids[-length:])
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"no function with a docstring has {length} tokens before its body")
    return np.array(rows)
