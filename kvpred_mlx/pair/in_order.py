"""The dial on a base with recurrent or convolutional states: a prompt is read in order, in exact and predicted spans.

A state has no positions: a token in the middle cannot be made exact afterwards.  So what the dial chooses is chosen
before the base reads anything, in blocks, and the spans follow one another.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import mlx.core as mx

from kvpred_mlx.dial.importance import choose
from kvpred_mlx.dial.plan import Call, Span
from kvpred_mlx.dial.positions import ExactPositions
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.parts import PairParts

BLOCK_TOKENS = 32  # what is chosen together: each span costs a call of the base


def read_in_order(
    pair: PairParts, dial: ExactPositions, inputs: mx.array, base_cache: list[Any], entry: AuxiliaryCache
) -> mx.array:
    """Fill the base's cache for `inputs` [B, L] as `read_prompt` does, block by block.

    The rows of a batch share their spans: what is exact in one is exact in all.  The blocks are chosen among the tokens
    of one call, and what the scores are computed from is evaluated.
    """
    rows, tokens = inputs.shape
    lags, lengths = [*entry.lags()] * rows, entry.lengths(tokens)
    call = Call.of(dial, tokens, entry.announced, windowed=True)
    if lengths is not None:
        last = max(call.first, min(n - dial.last_of(n) for n in lengths))
        call = replace(call, last=last, candidates=(call.first, last), top=min(call.top, last - call.first))
    filling = pair.reader.begin_in_order(inputs, call, entry, base_cache)
    entry.read_on(inputs, all_read=call.read == tokens)
    chosen: list[int] = []
    if call.top:
        scores = filling.heard.scores(tokens, tokens, lags[:rows], lengths).sum(axis=0, keepdims=True)
        start, stop = call.candidates
        columns: Any = choose(scores[:, start:stop], [call.top], [stop - start], BLOCK_TOKENS)[0].tolist()
        chosen = [start + column for column in columns]
    return mx.concatenate([filling(span, base_cache) for span in _spans(call, chosen)], axis=1)


def _spans(call: Call, chosen: list[int]) -> list[Span]:
    """The call's spans, with the chosen tokens exact among the predicted ones."""
    exact = {*range(call.first), *chosen, *range(call.last, call.tokens)}
    found = []
    for span in replace(call, top=0, first=0, last=call.tokens).spans():
        inside = range(span.start + 1, span.stop)
        cuts = [span.start, *(i for i in inside if (i in exact) != (i - 1 in exact)), span.stop]
        found += [replace(span, start=a, stop=b, exact=a in exact) for a, b in pairwise(cuts)]
    return found
