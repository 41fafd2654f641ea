"""The dial: prompt positions that the base computes exactly, among predicted ones.

Without it every position but a prompt's last is predicted.  With it the base processes a chosen part of the prompt
itself, attending to predicted and to exact entries, and its keys and values take the predicted ones' places.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from kvpred_mlx.dial.importance import Heard, choose
from kvpred_mlx.taps.kv import KV

if TYPE_CHECKING:
    from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
    from kvpred_mlx.pair.model import KVPredictionModel


@dataclass(frozen=True)
class ExactPositions:
    """Which of a prompt's tokens the base computes exactly; the prompt's last token always is, and does not count.

    Args:
        first: tokens at the beginning (attention sinks).
        last: the end, in tokens (int) or as a fraction of the prompt (float); the auxiliary leaves it to the
            base, unless it is asked for `top`.
        top: a fraction of the prompt, chosen among the others by the attention of the auxiliary's last queries.

    Raises:
        ValueError: naming what is out of range.
    """

    first: int = 0
    last: int | float = 0
    top: float = 0.0

    def __post_init__(self) -> None:
        wrong = []
        if type(self.first) is not int or self.first < 0:
            wrong.append(f"first is {self.first!r}, expected a number of tokens")
        fits = type(self.last) is int or (type(self.last) is float and self.last <= 1)
        if not fits or not self.last >= 0:
            wrong.append(f"last is {self.last!r}, expected a number of tokens, or a fraction from 0.0 to 1.0")
        if type(self.top) not in (int, float) or not 0 <= self.top <= 1:
            wrong.append(f"top is {self.top!r}, expected a fraction from 0 to 1")
        if wrong:
            raise ValueError("exact positions: " + "; ".join(wrong))

    def __bool__(self) -> bool:
        return bool(self.first or self.last or self.top)

    def last_of(self, tokens: int) -> int:
        """How many of `tokens` tokens `last` means."""
        return min(tokens, self.last if isinstance(self.last, int) else _share(self.last, tokens))

    def top_of(self, tokens: int) -> int:
        """How many of `tokens` tokens `top` means."""
        return _share(self.top, tokens)

    def as_dict(self) -> dict[str, int | float]:
        """As a pair's `config.json` holds it."""
        return asdict(self)


def _share(fraction: float, tokens: int) -> int:
    return ceil(round(fraction * tokens, 6))


@dataclass(frozen=True)
class Call:
    """What the dial means in one call of `tokens` tokens.

    The call's tokens `[0, first)` and `[last, tokens)` are exact and the rest is predicted; then `top` of the
    tokens `[candidates)`, numbered from the first of the last `seen` ones, are made exact.  The auxiliary reads the
    tokens `[0, read)`.
    """

    tokens: int
    first: int
    last: int
    top: int
    candidates: tuple[int, int]
    seen: int
    read: int

    @classmethod
    def of(cls, dial: ExactPositions, tokens: int, announced: tuple[int, int] | None, windowed: bool) -> Call:
        """Without an announced prompt (tokens done, tokens in all) every call is taken for a whole one."""
        done, total = announced or (0, tokens)
        head = total - dial.last_of(total)
        first = min(max(dial.first - done, 0), tokens)
        last = max(first, min(head - done, tokens))
        if windowed or announced is None:
            whole, start, end, top = tokens, first, last, dial.top_of(tokens)
        else:  # all in one, in the call in which the predicted part ends
            whole, start, end = done + tokens, dial.first, head
            top = dial.top_of(total) if done < head <= done + tokens else 0
        if windowed and top and last - first == 1:  # no gap in a ring: a single token is simply exact
            first = last = end = start
        top = min(top, max(0, end - start))
        read = tokens if dial.top else last if last > first else 0
        return cls(tokens, first, last, top, (start, end), whole, read)

    def chosen(self, scores: mx.array) -> mx.array:
        """The first and the top tokens [B, n] among the last `seen` ones, ascending, by their `scores` [B, seen]."""
        start, end = self.candidates
        rows = scores.shape[0]
        top = start + choose(scores[:, start:end], [self.top] * rows, [end - start] * rows)
        first = mx.arange(self.first) + (self.seen - self.tokens)
        return mx.concatenate([mx.broadcast_to(first, (rows, self.first)), top], axis=1)


def prefill(
    pair: KVPredictionModel,
    dial: ExactPositions,
    inputs: mx.array,
    base_cache: list[Any],
    entry: AuxiliaryCache,
) -> mx.array:
    """Fill the base's cache for `inputs` [B, L], exactly where the dial says so, else predicted.

    Returns the logits: the base's own for the end (and, without `top`, the beginning), teacher-forced ones
    elsewhere; all the base's own in a call of fewer than `min_prompt_tokens` tokens, which may be a speculative
    decoder's draft.
    """
    tokens = inputs.shape[1]
    lags, lengths = entry.lags(), entry.lengths(tokens)
    call = _call(pair, dial, tokens, base_cache, entry)
    short = tokens < pair.min_prompt_tokens
    aside = copy.deepcopy(base_cache) if short else None
    read = tokens if short else call.read
    with pair.importance.listen() if call.top else nullcontext(Heard()) as heard:
        predicted = pair.predict(inputs[:, :read], entry) if read else []
    entry.append(inputs)

    begin = 0 if call.top else call.first  # with a top, the first ones go through the base together with it
    before, middle, after = (inputs[:, a:b] for a, b in pairwise((0, begin, call.last, tokens)))
    parts = [pair.base(before, cache=base_cache)] if before.size else []
    if middle.size:
        part = slice(begin, call.last)
        filled = [KV(k[:, part], v[:, part]) for k, v in predicted]
        parts.append(_fill(pair, filled, middle, base_cache))
    chosen = _chosen(dial, call, heard, lags, lengths, inputs.shape[0])
    if chosen is not None:
        picked = mx.take_along_axis(entry.tail(call.seen), chosen, axis=1)
        pair.rows(picked, chosen, call.seen - after.shape[1], base_cache)
    parts += [pair.base(after, cache=base_cache)] if after.size else []
    entry.read_on(tokens, all_read=read == tokens, provisional=short and middle.size > 0)
    return mx.concatenate(parts, axis=1) if aside is None else pair.base(inputs, cache=aside)


def _call(
    pair: KVPredictionModel, dial: ExactPositions, tokens: int, base_cache: list[Any], entry: AuxiliaryCache
) -> Call:
    """The plan of a call; raises UnsupportedModelError if the base cannot follow it."""
    padded = entry.lengths(tokens) is not None
    if dial.top or padded:
        pair.rows.check()
    windowed = not all(isinstance(c, KVCache | QuantizedKVCache) for c in base_cache)
    call = Call.of(dial, tokens, None if padded else entry.announced, windowed)
    if not padded:
        return call
    # Each row ends elsewhere, so all that is exact is made so afterwards.
    return Call(tokens, 0, tokens, dial.top_of(tokens), (call.first, tokens), tokens, tokens)


def _fill(pair: KVPredictionModel, predicted: list[KV], tokens: mx.array, base_cache: list[Any]) -> mx.array:
    """Append predicted entries; the teacher-forced logits, lazy."""
    if not pair.base_taps.fused:
        return pair.base_taps.inject(predicted, tokens, base_cache, logits=True)
    aside = copy.deepcopy(base_cache)
    pair.fill(predicted, tokens, base_cache)
    return pair.base_taps.inject(predicted, tokens, aside, logits=True)


def _chosen(
    dial: ExactPositions, call: Call, heard: Heard, lags: Sequence[int], lengths: list[int] | None, rows: int
) -> mx.array | None:
    """Positions [B, n] to make exact among the last `seen` ones, ascending; None if there are none."""
    if lengths is None:
        if not call.top:
            return None
        return call.chosen(heard.scores(call.seen, call.tokens, [*lags] * (rows // len(lags))))
    start, ends = call.candidates[0], [n - dial.last_of(n) for n in lengths]
    parts = [mx.broadcast_to(mx.arange(start), (rows, start))] if start else []
    if call.top and start < call.tokens:
        lags = [*lags] * (rows // len(lags))
        scores = heard.scores(call.tokens, call.tokens, lags, lengths)[:, start:]
        limits = [max(1, e - start) for e in ends]
        counts = [max(1, min(dial.top_of(n), limit)) for n, limit in zip(lengths, limits, strict=True)]
        parts.append(start + choose(scores, counts, limits))
    if dial.last:
        most = max(n - e for n, e in zip(lengths, ends, strict=True))
        parts.append(mx.array(ends)[:, None] + mx.arange(most))
    if not parts:
        return None
    newest = mx.maximum(mx.array(lengths)[:, None] - 1, 0)
    return mx.sort(mx.minimum(mx.concatenate(parts, axis=1), newest), axis=1)
