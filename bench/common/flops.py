"""Floating-point operations until the first token, counted on the graph that MLX would evaluate.

A multiply-add counts 2.  Counted are matrix products: projections, experts, the vocabulary, and attention's
two products; embeddings, norms, RoPE and activations are free.  Because the graph holds only what the
asked-for arrays depend on, prediction is charged for nothing that is never evaluated, and a mixture of
experts only for the experts that are active.

Attention is counted causally: the cost of a prompt is the sum of the costs of its tokens, each processed by
itself after the tokens before it.  That cost is a piecewise linear function of the position (sliding windows
make the pieces), so a few positions are traced and the rest follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.bench.common.graph import Shape, Step, after, caches, fill, primitives
from kvpred_mlx.dial.plan import Call
from kvpred_mlx.dial.positions import ExactPositions
from kvpred_mlx.pair.model import KVPredictionModel


@dataclass(frozen=True)
class TTFT:
    """FLOPs from an empty cache to the first token, for one row of a batch.

    Args:
        exact: the base's full prefill, as mlx-lm does it, and its step on the last prompt token.
        predicted: the auxiliary up to the keys and values that are read (or the base's first layers), the predictor,
            and the base's step.
        auxiliary: the auxiliary by itself, prefill and step; None if there is none.
    """

    exact: int
    predicted: int
    auxiliary: int | None

    @property
    def ratio(self) -> float:
        """How many times sooner the first token could come, if every operation took the same time."""
        return self.exact / self.predicted


def ttft_flops(pair: KVPredictionModel, prompt_tokens: int) -> TTFT:
    """FLOPs of the three modes of a pair for a prompt of `prompt_tokens` tokens.

    A prompt that is too short to be predicted costs the same in both modes.
    """
    exact = full_prefill_flops(pair.base, prompt_tokens)
    predicted = exact
    if prompt_tokens > pair.min_prompt_tokens:
        predicted = dial_flops(pair, pair.exact_positions or ExactPositions(), prompt_tokens)
    alone = None if pair.auxiliary is None else full_prefill_flops(pair.auxiliary, prompt_tokens)
    return TTFT(exact, predicted, alone)


def dial_flops(pair: KVPredictionModel, dial: ExactPositions, prompt_tokens: int) -> int:
    """FLOPs of a predicted prompt of `prompt_tokens` tokens, some of it exact.

    The chosen (`top`) positions are not known beforehand: each costs as much as a candidate does on average.
    """
    call = Call.of(dial, prompt_tokens - 1, None, windowed=False)
    base = Cost(fill(pair.base), caches(pair.base))
    exact = base.until(call.first) + base.between(call.last, call.tokens) + _chosen_flops(base, call)
    return _reading_flops(pair, call) + exact + step_flops(pair.base, call.tokens)


def _chosen_flops(cost: Cost, call: Call) -> int:
    """What the chosen tokens cost."""
    start, stop = call.candidates
    return call.top * cost.between(start, stop) // (stop - start) if call.top else 0


def _reading_flops(pair: KVPredictionModel, call: Call) -> int:
    """What predicts and chooses: the auxiliary and the maps, or span by span the base's first layers and the maps."""
    reader = pair.first_layers_reader
    if call.top and reader is not None and pair.reads_in_order:
        cost = Cost(read(pair), reader_caches(pair))
        predicted = cost.between(call.first, call.last) - _chosen_flops(cost, call)
        return predicted + scores_flops(pair, call.tokens, reading=not reader.reads_once(call))
    scores = scores_flops(pair, call.tokens) if call.top else 0
    if reader is None:
        return Cost(predict(pair), reader_caches(pair)).until(call.read) + scores
    spans = [span for span in call.spans() if not span.exact]
    ends = [span.stop for span in spans[:-1]] + [max(call.read, call.last)]  # with a top the end is read, too
    return scores + sum(
        Cost(read(pair, span.depth), reader_caches(pair)).between(span.start, end)
        for span, end in zip(spans, ends, strict=True)
    )


def scores_flops(pair: KVPredictionModel, tokens: int, *, reading: bool = False) -> int:
    """FLOPs of choosing positions by the reader's attention, on top of what reading the prompt costs.

    Args:
        reading: with what is read to listen alone.
    """

    def listened(tokens: mx.array, cache: list[Any]) -> Any:
        with pair.importance.listen(pair.heard_layers) as heard:
            made = read(pair)(tokens, cache)
        scores = heard.scores(tokens.shape[1], tokens.shape[1], [0])
        return [scores] if reading else [made, scores]

    if reading:
        function, arrays = after(0, (1, tokens), listened, reader_caches(pair))
        return graph_flops(function, *arrays)

    both, alone = (
        graph_flops(function, *arrays)
        for function, arrays in (
            after(0, (1, tokens), step, reader_caches(pair)) for step in (listened, read(pair))
        )
    )
    return both - alone


def read(pair: KVPredictionModel, depth: int | None = None) -> Step:
    """The auxiliary, as far as the predictor reads it; or the base's first layers with all entries that follow."""
    reader = pair.first_layers_reader
    if reader is None:
        return lambda tokens, cache: pair.auxiliary_features(tokens, cache)

    def fill(tokens: mx.array, cache: list[Any]) -> Any:
        reader.fill(tokens, cache, depth=depth)
        return [c.state for c in cache]

    return fill


def predict(pair: KVPredictionModel) -> Step:
    """The auxiliary and the predictor."""
    return lambda tokens, cache: pair.predictor(read(pair)(tokens, cache))


def reader_caches(pair: KVPredictionModel) -> Callable[[], list[Any]]:
    """Makes the empty caches of what reads: the auxiliary's, or the base's."""
    if pair.first_layers_reader is not None:
        return caches(pair.base)
    return lambda: list(pair.make_cache()[-1].auxiliary)


def full_prefill_flops(model: nn.Module, prompt_tokens: int) -> int:
    """FLOPs of mlx-lm's prefill (only the cache is evaluated) and of the step on the last prompt token."""
    return Cost(fill(model), caches(model)).until(prompt_tokens - 1) + step_flops(model, prompt_tokens - 1)


def step_flops(model: nn.Module, position: int) -> int:
    """FLOPs of one decode step after `position` cached tokens, vocabulary included."""
    return Cost(lambda tokens, cache: model(tokens, cache=cache), caches(model)).at(position)


def graph_flops(function: Callable[..., Any], *arrays: mx.array) -> int:
    """FLOPs of what `function(*arrays)` would evaluate.

    Args:
        function: returns a list of arrays.
    """
    return sum(
        _PRODUCTS[name](inputs, outputs[0])
        for name, inputs, outputs in primitives(function, *arrays)
        if name in _PRODUCTS
    )


def prefill_bytes(model: nn.Module, batch_size: int, prompt_tokens: int, step_size: int) -> int:
    """An estimate of the memory that a full prefill needs beside the weights.

    The prompt's cache, and three arrays of the largest size that the last step makes: MLX frees an
    intermediate array when its last reader is done.
    """
    last = min(step_size, prompt_tokens - 1)
    function, arrays = after(prompt_tokens - 1 - last, (batch_size, last), fill(model), caches(model))
    largest = max(4 * prod(out) for _, _, outputs in primitives(function, *arrays) for out in outputs)
    cache = make_prompt_cache(model)
    model(mx.zeros((batch_size, prompt_tokens), mx.int32), cache=cache)
    return sum(c.nbytes for c in cache) + 3 * largest


class Cost:
    """The cost of one token as a function of how many tokens are cached."""

    def __init__(self, step: Step, make_cache: Callable[[], list[Any]]):
        self._step, self._make_cache = step, make_cache
        self._known: dict[int, int] = {}

    def at(self, cached: int) -> int:
        if cached not in self._known:
            self._known[cached] = self._trace(cached)
        return self._known[cached]

    def until(self, end: int) -> int:
        """The cost of tokens 0 to `end` - 1, one after the other."""
        return self.between(0, end)

    def between(self, start: int, end: int) -> int:
        """The cost of tokens `start` to `end` - 1, each after all before it."""
        return self._sum(start, end - 1) if end > start else 0

    def _sum(self, first: int, last: int) -> int:
        ends = self.at(first) + self.at(last)
        middle = (first + last) // 2
        on_line = (last - first) * (self.at(middle) - self.at(first)) == (middle - first) * (
            self.at(last) - self.at(first)
        )
        if last - first < 2 or on_line:
            return ends * (last - first + 1) // 2 if last > first else self.at(first)
        return self._sum(first, middle) + self._sum(middle + 1, last)

    def _trace(self, cached: int) -> int:
        function, arrays = after(cached, (1, 1), self._step, self._make_cache)
        return graph_flops(function, *arrays)


def _product(inputs: list[Shape], output: Shape) -> int:
    return 2 * prod(output) * inputs[0][-1]


def _attention(inputs: list[Shape], output: Shape) -> int:
    queries, keys, values = inputs[:3]
    return 2 * prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


# MLX's primitives that multiply matrices; the first input's last axis is summed over.
_PRODUCTS: dict[str, Callable[[list[Shape], Shape], int]] = {
    "Matmul": _product,
    "AddMM": _product,
    "QuantizedMatmul": _product,
    "GatherMM": _product,
    "GatherQMM": _product,
    "ScaledDotProductAttention": _attention,
}
