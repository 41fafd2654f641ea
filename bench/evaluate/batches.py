"""Answers to many prompts through mlx-lm's batches: where a row ends, the next prompt takes its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvpred_mlx.bench.evaluate import tasks
from kvpred_mlx.bench.evaluate.modes import SparseModel, begun
from kvpred_mlx.pair.model import KVPredictionModel

Sampler = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Asked:
    """A prompt that waits for its answer.

    Args:
        key: what the caller knows it by.
        prompt: its token ids.
        room: tokens that the answer may have.
        draw: a sampler with random numbers of its own (see `seeded`); None: greedy.
    """

    key: Any
    prompt: list[int]
    room: int
    draw: Sampler | None = None


def answer_all(
    model: nn.Module | SparseModel,
    tokenizer: Any,
    asked: Iterable[Asked],
    stops: Sequence[str],
    batch_size: int,
) -> Iterator[tuple[Any, str]]:
    """(key, answer up to its stop) of everything that is `asked`, each as soon as it is known.

    They are what `stream_generate` gives for one prompt after the other, but for the rounding of sums whose order
    depends on the batch.  The longest prompts come first: memory that does not suffice is found out at once.

    Args:
        model: a pair, in the mode that it is in, a model of its own, or one that reads sparsely; left in that mode
            until the end.
        batch_size: rows that are decoded together.

    Raises:
        ValueError: a prompt is empty, or the model's cache cannot be batched.
    """
    tokenizer = tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
    waiting = deque(sorted(asked, key=lambda a: len(a.prompt), reverse=True))
    batch = BatchGenerator(
        model.base if isinstance(model, SparseModel) else model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
        # Shares of a prompt that nobody announces are those of a call.
        prefill_step_size=max((len(a.prompt) for a in waiting), default=1),
    )
    rows: dict[int, _Row] = {}
    greedy = make_sampler()
    try:
        while waiting or rows:
            if joining := _next_to_read(model, waiting, batch_size - len(rows)):
                starts = [begun(model, a.prompt) for a in joining]
                caches: list[Any] = [cache for _, _, cache in starts]
                uids = batch.insert(
                    [rest for _, rest, _ in starts],
                    caches=caches,
                    max_tokens=[a.room for a in joining],
                    samplers=[a.draw or greedy for a in joining],
                )
                rows |= {uid: _Row(a, tokenizer, stops) for uid, a in zip(uids, joining, strict=True)}
            responses = batch.next_generated()
            ended = [r for r in responses if rows[r.uid].ends_with(r.token, r.finish_reason)]
            batch.remove([r.uid for r in ended if r.finish_reason is None])
            for response in ended:
                row = rows.pop(response.uid)
                yield row.key, tasks.cut(row.text, stops)
    finally:
        batch.close()


def seeded(sampler: Sampler, seed: int) -> Sampler:
    """`sampler` with random numbers of its own, whatever is sampled between its calls; `seed` has 32 bits."""
    calls = count()

    def draw(logprobs: mx.array) -> mx.array:
        mx.random.seed(seed | next(calls) << 32)
        return sampler(logprobs)

    return draw


def _next_to_read(model: nn.Module | SparseModel, waiting: deque[Asked], room: int) -> list[Asked]:
    """The next prompts, off `waiting`, that are read in one call as each would be by itself."""
    joining: list[Asked] = []
    while waiting and len(joining) < room:
        if joining and _way(model, waiting[0].prompt) != _way(model, joining[0].prompt):
            break
        joining.append(waiting.popleft())
    return joining


def _way(model: nn.Module | SparseModel, prompt: list[int]) -> str | int:
    """How a prompt is read: beside a longer one a short one is predicted too, and all are read equally deep."""
    before_last = len(prompt) - 1
    if not isinstance(model, KVPredictionModel) or model.exact:
        return "exact"
    if not model.predicts(len(prompt)):
        return "short"
    depths = model.exact_positions.depth if model.exact_positions else ()
    return before_last if len(depths) > 1 else "predicted"


class _Row:
    """An answer under way."""

    def __init__(self, asked: Asked, tokenizer: TokenizerWrapper, stops: Sequence[str]):
        self.key, self.text = asked.key, ""
        self._detokenizer, self._stops = tokenizer.detokenizer, stops
        self._begin: Callable[[int], str] = partial(tasks.beginning, tokenizer, asked.prompt)

    def ends_with(self, token: int, reason: str | None) -> bool:
        """Take the next token; whether it is the last one, by mlx-lm's `reason` or by a stop."""
        if reason != "stop":
            self.text, self._begin = self.text + self._begin(token), lambda token: ""
            self._detokenizer.add_token(token)
        if reason is not None:
            self._detokenizer.finalize()
        self.text += self._detokenizer.last_segment
        return reason is not None or tasks.cut(self.text, self._stops) != self.text
