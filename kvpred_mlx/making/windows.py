"""Windows of real text: a prompt, and what really follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from kvpred_mlx.errors import check_ranges

TOKENS_AT_ONCE = 4096  # of prompts side by side: eight of 2,000 read by a 1.5B and a 0.5B do not fit 24 GB


@dataclass(frozen=True)
class Windows:
    """Prompts of real text and the real text that follows.

    Args:
        prompts: `[W, P]` token ids.
        continuations: `[W, N]` token ids.
        documents: `[W]`, which document each window is from.
        bytes: `[W]`, UTF-8 bytes of the continuations' text; nan without a tokenizer.
    """

    prompts: np.ndarray
    continuations: np.ndarray
    documents: np.ndarray
    bytes: np.ndarray

    @classmethod
    def of(cls, prompts: np.ndarray, continuations: np.ndarray) -> Windows:
        """Each of a document of its own, of which no text is known."""
        count = len(prompts)
        return cls(prompts, continuations, np.arange(count), np.full(count, np.nan))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def at_once(self) -> int:
        """How many are read side by side, unless somebody says so."""
        return prompts_at_once(self.prompts.shape[1])

    def take(self, order: np.ndarray) -> Windows:
        """Those of the indices `order`, in that order."""
        return Windows(*(getattr(self, field.name)[order] for field in fields(self)))


def prompts_at_once(tokens: int) -> int:
    """How many prompts of so many tokens are read side by side: at most eight, and at least one."""
    return max(1, min(8, TOKENS_AT_ONCE // tokens))


def cut_windows(
    documents: Sequence[Sequence[int] | np.ndarray],
    prompt_tokens: int,
    score_tokens: int,
    tokenizer: Any = None,
    most: int = 160,
    per_document: int = 4,
) -> Windows:
    """Cut windows of `prompt_tokens` + `score_tokens` from documents, spread evenly over each.

    Raises:
        ValueError: no document is long enough, or a number is out of range.
    """
    counts = {
        "prompt_tokens": prompt_tokens,
        "score_tokens": score_tokens,
        "most": most,
        "per_document": per_document,
    }
    check_ranges(counts, dict.fromkeys(counts, 1), whole=counts)
    size = prompt_tokens + score_tokens
    found: list[tuple[int, Sequence[int] | np.ndarray]] = []
    for d, ids in enumerate(documents):
        count = min(per_document, len(ids) // size)
        starts = np.linspace(0, len(ids) - size, count).astype(int) if count > 1 else range(count)
        found += [(d, ids[s : s + size]) for s in starts]
    if not found:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"the longest of {len(documents)} documents has {longest} tokens, expected at least {size}: "
            f"{prompt_tokens} of prompt and {score_tokens} to score"
        )
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]
    rows = np.array([ids for _, ids in chosen])
    texts = [
        len(tokenizer.decode(row[prompt_tokens:].tolist()).encode()) if tokenizer else np.nan for row in rows
    ]
    return Windows(
        rows[:, :prompt_tokens], rows[:, prompt_tokens:], np.array([d for d, _ in chosen]), np.array(texts)
    )
