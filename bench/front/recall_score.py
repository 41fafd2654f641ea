"""How much of what was planted is recalled: exact match by kind and depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx

from kvpred_mlx.bench.common.statistics import share
from kvpred_mlx.bench.front.recall import KINDS, Question, RecallTask
from kvpred_mlx.making.quality import Prefill
from kvpred_mlx.progress import ProgressCallback, no_progress

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def questions(tokenizer: Any, documents: Sequence[str], tokens: int, count: int, seed: int) -> list[Question]:
    """`count` questions of each kind at each depth, with prompts of `tokens` tokens."""
    task = RecallTask(tokenizer, documents, seed)
    return [task.question(kind, tokens, depth) for kind in KINDS for depth in DEPTHS for _ in range(count)]


def recalled(
    prefill: Prefill,
    asked: Sequence[Question],
    batch_size: int,
    progress: ProgressCallback = no_progress,
) -> list[bool]:
    """Whether the model that `prefill` gives answers each question greedily, every token of it right."""
    found: dict[int, bool] = {}
    length = lambda i: len(asked[i].answer)
    for _, group in groupby(sorted(range(len(asked)), key=length), length):
        for batch in _batches(list(group), batch_size):
            prompts = mx.array([asked[i].prompt for i in batch])
            answers = mx.array([asked[i].answer for i in batch])
            model, cache = prefill(prompts)
            # Greedy decoding gives the answer if each token of it is the most likely one after those before.
            logits = model(mx.concatenate([prompts[:, -1:], answers[:, :-1]], axis=1), cache=cache)
            right: Any = mx.all(mx.argmax(logits, axis=-1) == answers, axis=1).tolist()
            found |= dict(zip(batch, right, strict=True))
            progress(len(found), len(asked))
    return [found[i] for i in range(len(asked))]


def summary(asked: Sequence[Question], right: Sequence[bool]) -> dict[str, Any]:
    """Exact match of all questions, of each kind, and of each kind at each depth, with 95 % Wilson intervals.

    `right` has every answer, in the questions' order: 1 or 0.
    """
    rows = list(zip(asked, right, strict=True))
    return {
        "all": share(right),
        "kinds": {kind: share([r for q, r in rows if q.kind == kind]) for kind in KINDS},
        "depths": {
            kind: {str(d): share([r for q, r in rows if (q.kind, q.depth) == (kind, d)]) for d in DEPTHS}
            for kind in KINDS
        },
        "right": "".join("01"[r] for r in right),
    }


def _batches(items: list[int], size: int) -> Iterable[list[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))
