"""A small model that reads a prompt in the base's place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from kvpred_mlx.dial.importance import Heard, Importance
from kvpred_mlx.dial.plan import Call, Span
from kvpred_mlx.pair import cpu_prefill
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache, count, counts_tokens
from kvpred_mlx.pair.predictor import Predictor
from kvpred_mlx.pair.readers import Filling, check_widths, with_logits
from kvpred_mlx.pair.sources import Features, feature_widths, layers_read, record
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps


class AuxiliaryReader:
    """The auxiliary reads, and the predictor maps what it keeps (paper, section 3.1).

    Args:
        base, auxiliary: taps of the two models.
        predictor: between them.

    Raises:
        ValueError: the predictor's widths are not those of the models.
    """

    def __init__(self, base: KVTaps, auxiliary: KVTaps, predictor: Predictor):
        check_widths(
            (("base", predictor.base_widths, base.widths, base),
             ("auxiliary", predictor.auxiliary_widths, feature_widths(predictor.source, auxiliary), auxiliary))
        )  # fmt: skip
        self._base, self.taps, self._predictor = base, auxiliary, predictor
        self.depth = auxiliary.depth(layers_read(predictor.source, predictor.layer_map, auxiliary))
        self.importance = Importance(auxiliary.model)
        own = self._own_caches()
        self._counted = None if counts_tokens(own) else len(own)  # behind how many caches a counter stands

    def _own_caches(self, max_kv_size: int | None = None) -> list[Any]:
        return make_prompt_cache(self.taps.model, max_kv_size)[
            : None if self.depth is None else self.depth[1]
        ]

    def caches(self, max_kv_size: int | None) -> list[Any]:
        """Those of the auxiliary's layers that the predictor needs; behind them a counter, if they do not count."""
        own = self._own_caches(max_kv_size)
        return own if self._counted is None else [*own, KVCache()]

    def features(self, tokens: mx.array, caches: Sequence[Any] | None = None) -> list[Features]:
        """What the predictor reads of the auxiliary's layers for `tokens` [B, L], and of no layer beyond.

        Args:
            caches: the auxiliary's (`AuxiliaryCache.auxiliary`); updated in place.  If they are those of all its
                layers (it will draft), all are filled.
        """
        source = self._predictor.source
        if caches is not None and self._counted is not None:
            count(caches[self._counted], tokens)
            caches = caches[: self._counted]
        if self.depth is None or (caches is not None and len(caches) > self.depth[1]):
            return record(source, self.taps, tokens, list(caches) if caches is not None else None)[0]
        layers, entries = self.depth
        if caches is not None:  # layers that do not run still have their masks made from their caches
            caches = [*caches, *make_prompt_cache(self.taps.model)[entries:]]
        with self.taps.first_layers(layers):
            return record(source, self.taps, tokens, caches)[0]

    def predict(self, tokens: mx.array, entry: AuxiliaryCache | None = None) -> list[KV]:
        """Predicted raw base keys and values of `tokens` [B, L]; the auxiliary catches up first."""
        return self._predictor(self.read(tokens, entry))

    def read(self, tokens: mx.array, entry: AuxiliaryCache | None = None) -> list[Features]:
        """What the predictor reads for `tokens` [B, L]; the auxiliary catches up first."""
        if entry is None:
            return self.features(tokens)
        unread = entry.catch_up(tokens)
        unread.prepare(entry.auxiliary)
        recorded = cpu_prefill.read(partial(self.features, caches=entry.auxiliary), unread.tokens)
        unread.finalize(entry.auxiliary)
        new = tokens.shape[1]
        return [tuple(unread.predicted(a, new) for a in layer) for layer in recorded]

    def forced(self, tokens: mx.array) -> mx.array:
        return self._base.inject(self.predict(tokens), tokens, logits=True)

    def begin(self, tokens: mx.array, call: Call, read: int, entry: AuxiliaryCache) -> Filling:
        listening: Any = self.importance.listen() if call.top else nullcontext(Heard())
        with listening as heard:
            features = self.read(tokens[:, :read], entry) if read else []
        return _Injecting(self._base, self._predictor, tokens, features, heard)

    def begin_in_order(
        self, tokens: mx.array, call: Call, entry: AuxiliaryCache, cache: list[Any]
    ) -> Filling:
        return self.begin(tokens, call, call.read, entry)


class _Injecting:
    """Spans of a call that the auxiliary has read."""

    def __init__(
        self, base: KVTaps, predictor: Predictor, tokens: mx.array, features: list[Features], heard: Heard
    ):
        self._base, self._predictor, self._tokens = base, predictor, tokens
        self._features, self.heard = features, heard

    def __call__(self, span: Span, cache: list[Any]) -> mx.array:
        part = slice(span.start, span.stop)
        if span.exact:
            return self._base.model(self._tokens[:, part], cache=cache)
        features = [tuple(a[:, part] for a in layer) for layer in self._features]

        def inject(cache: list[Any], *, logits: bool) -> mx.array:
            kv = self._predictor(features, None if logits else self._base.rows_asked(cache))
            return self._base.inject(kv, self._tokens[:, part], cache, logits=logits)

        return with_logits(self._base, inject, cache)
