"""How the dial reads a prompt: exact spans, predicted spans, and single exact positions among predicted ones.

Without it every position but a prompt's last is predicted.  With it the base processes a chosen part of the prompt
itself, attending to predicted and to exact entries, and its keys and values take the predicted ones' places.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from kvpred_mlx.dial.importance import Heard, choose
from kvpred_mlx.dial.plan import Call, keeps_all
from kvpred_mlx.dial.positions import ExactPositions
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.in_order import read_in_order
from kvpred_mlx.pair.parts import PairParts
from kvpred_mlx.taps.states import holds_states


def read_prompt(
    pair: PairParts, dial: ExactPositions, inputs: mx.array, base_cache: list[Any], entry: AuxiliaryCache
) -> mx.array:
    """Fill the base's cache for `inputs` [B, L], exactly where the dial says so, else predicted.

    Returns the logits, lazy: the base's own for the end (and, without `top`, the beginning), teacher-forced ones
    elsewhere; all the base's own in a call of fewer than `min_prompt_tokens` tokens.  Such a call may be a prompt's
    remainder, or a speculative decoder's draft: if the cache is then wound back it was a draft.
    """
    tokens = inputs.shape[1]
    lags, lengths = entry.lags(), entry.lengths(tokens)
    short = tokens < pair.min_prompt_tokens
    if (dial.top or (dial and lengths is not None)) and holds_states(base_cache):
        if not short:
            return read_in_order(pair, dial, inputs, base_cache, entry)
        entry.read_on(inputs, all_read=False)
        return pair.base(inputs, cache=base_cache)
    call = _call(pair, dial, tokens, base_cache, entry)
    aside = copy.deepcopy(base_cache) if short else None
    read = tokens if short else call.read
    spans = call.spans()
    filling = pair.reader.begin(inputs, call, read, entry)
    some_predicted = not all(span.exact for span in spans)
    entry.read_on(inputs, all_read=read == tokens, provisional=short and some_predicted)
    end = spans.pop() if spans[-1].start >= call.last else None  # exact, and sees the chosen ones
    parts = [filling(span, base_cache) for span in spans]
    chosen = _chosen(dial, call, filling.heard, lags, lengths, inputs.shape[0])
    if chosen is not None:
        picked = mx.take_along_axis(entry.tail(call.seen), chosen, axis=1)
        pair.rows(picked, chosen, call.seen - (tokens - call.last), base_cache)
    if end is not None:
        parts.append(filling(end, base_cache))
    return mx.concatenate(parts, axis=1) if aside is None else pair.base(inputs, cache=aside)


def _call(
    pair: PairParts, dial: ExactPositions, tokens: int, base_cache: list[Any], entry: AuxiliaryCache
) -> Call:
    """The plan of a call; raises UnsupportedModelError if the base cannot follow it."""
    padded = entry.lengths(tokens) is not None
    if dial.top or (padded and dial):
        pair.rows.check()
    if padded:
        return Call.padded(dial, tokens)
    return Call.of(dial, tokens, entry.announced, windowed=not keeps_all(base_cache))


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
    if dial.last_of(max(lengths)):
        most = max(n - e for n, e in zip(lengths, ends, strict=True))
        parts.append(mx.array(ends)[:, None] + mx.arange(most))
    if not parts:
        return None
    newest = mx.maximum(mx.array(lengths)[:, None] - 1, 0)
    return mx.sort(mx.minimum(mx.concatenate(parts, axis=1), newest), axis=1)
