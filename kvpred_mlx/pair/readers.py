"""Who reads a prompt in the base's place: a small auxiliary model, or the base's own first layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache, trim_prompt_cache

from kvpred_mlx.dial.importance import Heard, Importance
from kvpred_mlx.dial.plan import Call, Span, keeps_all
from kvpred_mlx.dial.rows import close
from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.pair import cpu_prefill
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache, count, counts_tokens
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor
from kvpred_mlx.pair.sources import Features, feature_widths, layers_read, record
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps
from kvpred_mlx.taps.states import holds_keys, states

PROBE_TOKENS = 8


class Filling(Protocol):
    """A call under way."""

    heard: Heard  #: attention of the last queries, once all spans are filled; nothing unless the call has a `top`

    def __call__(self, span: Span, cache: list[Any]) -> mx.array:
        """Append predicted entries of a span to the base's caches; the teacher-forced logits, lazy."""
        ...


class Reader(Protocol):
    """Reads prompts and fills the base's cache with predictions."""

    importance: Importance

    def caches(self, max_kv_size: int | None) -> list[Any]:
        """The caches that the reader needs beside the base's."""
        ...

    def forced(self, tokens: mx.array) -> mx.array:
        """Teacher-forced logits [B, L, vocabulary]: predicted keys and values at every position of `tokens` [B, L]."""
        ...

    def begin(self, tokens: mx.array, call: Call, read: int, entry: AuxiliaryCache) -> Filling:
        """Begin a call with `tokens` [B, L], the first `read` of which are read."""
        ...

    def begin_in_order(
        self, tokens: mx.array, call: Call, entry: AuxiliaryCache, cache: list[Any]
    ) -> tuple[Filling, Heard]:
        """Begin a call whose spans depend on what is heard; `cache` is the base's, and stays as it is."""
        ...


class AuxiliaryReader:
    """The auxiliary reads, and the predictor maps what it keeps (paper, section 3.1).

    Args:
        base, auxiliary: taps of the two models.
        predictor: between them.

    Raises:
        ValueError: the predictor's widths are not those of the models.
    """

    def __init__(self, base: KVTaps, auxiliary: KVTaps, predictor: Predictor):
        _check_widths(
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
    ) -> tuple[Filling, Heard]:
        filling = self.begin(tokens, call, call.read, entry)
        return filling, filling.heard


class _Injecting:
    """Spans of a call that the auxiliary has read."""

    def __init__(
        self, base: KVTaps, predictor: Predictor, tokens: mx.array, features: list[Features], heard: Heard
    ):
        self._base, self._predictor, self._tokens = base, predictor, tokens
        self._features, self.heard = features, heard

    def __call__(self, span: Span, cache: list[Any]) -> mx.array:
        part = slice(span.start, span.stop)
        features = [tuple(a[:, part] for a in layer) for layer in self._features]

        def inject(cache: list[Any], *, logits: bool) -> mx.array:
            kv = self._predictor(features, None if logits else self._base.rows_asked(cache))
            return self._base.inject(kv, self._tokens[:, part], cache, logits=logits)

        return with_logits(self._base, inject, cache)


class FirstLayersReader:
    """The base's own first layers read, as always; what the others keep is predicted in the same pass.

    Entries up to the depth are exact, whatever comes before or after; there is no second model, no second cache and
    nothing to catch up with.

    Args:
        base: taps of the base.
        predictor: its maps.

    Raises:
        ValueError: the predictor's widths are not those of the base.
        UnsupportedModelError: the family's layers do not follow one from the other.
    """

    def __init__(self, base: KVTaps, predictor: FirstLayersPredictor):
        _check_widths(
            (("base", predictor.base_widths, base.widths, base),
             ("input", predictor.auxiliary_widths, [(w, w) for w in base.input_widths], base))
        )  # fmt: skip
        self._base, self._predictor = base, predictor
        self._resumable: dict[int, bool] = {}
        self.importance = Importance(base.model)

    @property
    def depth(self) -> int:
        """How many layers read, unless the dial says otherwise."""
        return self._predictor.depths[-1]

    def caches(self, max_kv_size: int | None) -> list[Any]:
        """None."""
        return []

    def fill(
        self, tokens: mx.array, cache: list[Any] | None, *, depth: int | None = None, logits: bool = False
    ) -> mx.array:
        """Append entries of `tokens` [B, L] to the base's caches; the logits [B, L, vocabulary].

        Args:
            depth: the layers that read (default: `depth`).
            logits: whether the logits will be used (`KVTaps.inject`).
        """
        depth = self.depth if depth is None else depth
        tails = None if logits else self._base.rows_asked(cache)
        return self._base.inject_after(
            depth, self._predictor.behind(depth, tails), tokens, cache, logits=logits
        )

    def forced(self, tokens: mx.array) -> mx.array:
        return self.fill(tokens, None, logits=True)

    def check(self) -> None:
        """Prove on a few tokens that the entries up to each depth are those of an ordinary prefill.

        Raises:
            UnsupportedModelError: they are not.
        """
        tokens = mx.arange(PROBE_TOKENS)[None]
        plain = make_prompt_cache(self._base.model)
        self._base.model(tokens, cache=plain)
        for depth in self._predictor.depths:
            cache = make_prompt_cache(self._base.model)
            self.fill(tokens, cache, depth=depth)
            pairs = _pairs(plain[: depth + 1], cache[: depth + 1])
            same = [mx.array_equal(x, y) for x, y in pairs]
            if not all(bool(one) for one in same):
                raise UnsupportedModelError(
                    f"{self._base.family}: its first {depth} layers do not stand alone"
                )

    @contextmanager
    def watched(self, depth: int, cache: list[Any], kept: list[mx.array]) -> Iterator[None]:
        """Keep what layer `depth` reads, the hidden states [B, L, D], of every call with `cache`."""
        with self._base.layers.watched(self._base.layer_of(depth), cache[depth], kept):
            yield

    def resume(self, depth: int, hidden: mx.array, tokens: mx.array, cache: list[Any]) -> None:
        """Process `tokens` [B, L] from what layer `depth` read of them, `hidden` [B, L, D], on.

        Args:
            cache: entries from `depth` on are updated in place; those before are not asked for.
        """
        later = cache[depth:]
        # Masks are made from the caches of layers that do not run: they must stand where the later ones do.
        before = [next((c for c in later if type(c) is type(own)), later[0]) for own in cache[:depth]]
        with self._base.layers.resumed(self._base.layer_of(depth), hidden):
            self._base.model(tokens, cache=[*before, *later])

    def resumable(self, depth: int) -> bool:
        """Whether the family can begin at a layer: tried once, on a few tokens, against its ordinary prefill."""
        if depth not in self._resumable:
            self._resumable[depth] = self._try_to_resume(depth)
        return self._resumable[depth]

    def _try_to_resume(self, depth: int) -> bool:
        tokens, cut = mx.arange(PROBE_TOKENS)[None], PROBE_TOKENS // 2
        plain, again, kept = (
            make_prompt_cache(self._base.model),
            make_prompt_cache(self._base.model),
            list[mx.array](),
        )
        try:
            with self.watched(depth, plain, kept):
                self._base.model(tokens, cache=plain)
            for part in (slice(cut), slice(cut, None)):
                self.resume(depth, kept[0][:, part], tokens[:, part], again)
            return all(close(x, y) for x, y in _pairs(plain[depth:], again[depth:]))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
            return False  # a family whose layers do more than follow one from the other

    def begin(self, tokens: mx.array, call: Call, read: int, entry: AuxiliaryCache) -> Filling:
        return _FirstLayersReading(self, self._base, tokens, call, read)

    def begin_in_order(
        self, tokens: mx.array, call: Call, entry: AuxiliaryCache, cache: list[Any]
    ) -> tuple[Filling, Heard]:
        filling, heard = self.begin(tokens, replace(call, top=0), call.read, entry), Heard()
        if call.top:
            with self.importance.listen(self.heard_layers(self.depth)) as heard:
                self.fill(tokens, copy.deepcopy(cache))
        return filling, heard

    def heard_layers(self, depth: int) -> int:
        """How many of the first `depth` layers' caches hold keys, so that their attention can be listened to.

        Raises:
            UnsupportedModelError: none.
        """
        entries = make_prompt_cache(self._base.model)[:depth]
        if heard := sum(1 for entry in entries if holds_keys(entry)):
            return heard
        raise UnsupportedModelError(
            f"{self._base.family}: no attention among its first {depth} layers, which the top positions could be "
            "chosen by"
        )


class _FirstLayersReading:
    """Spans of a call as the first layers read them, each to its depth."""

    def __init__(self, reader: FirstLayersReader, base: KVTaps, tokens: mx.array, call: Call, read: int):
        self._reader, self._base, self._tokens, self._call, self._read = reader, base, tokens, call, read
        self.heard = Heard()

    def __call__(self, span: Span, cache: list[Any]) -> mx.array:
        if not self._call.top or span.stop < self._call.last:
            return self._fill(span.start, span.stop, span.depth, cache)
        # The last queries choose, also if they stand in the exact end: the first layers read that too.
        beyond = self._read - span.stop
        heard_in = cache if not beyond or keeps_all(cache) else copy.deepcopy(cache)
        heard_layers = self._reader.heard_layers(span.depth or self._reader.depth)
        with self._reader.importance.listen(heard_layers) as self.heard:
            logits = self._fill(span.start, self._read, span.depth, heard_in)
        if heard_in is not cache:
            return self._fill(span.start, span.stop, span.depth, cache)
        if beyond:
            trim_prompt_cache(cache, beyond)
        return logits[:, : span.stop - span.start]

    def _fill(self, start: int, stop: int, depth: int | None, cache: list[Any]) -> mx.array:
        fill = partial(self._reader.fill, self._tokens[:, start:stop], depth=depth)
        return with_logits(self._base, fill, cache)


def with_logits(base: KVTaps, inject: Callable[..., mx.array], cache: list[Any]) -> mx.array:
    """Fill `cache` by `inject(cache, logits=...)`; the teacher-forced logits, lazy.

    Cached entries must not depend on a fused projection's queries, so there logits need a pass of their own.
    """
    if not base.fused:
        return inject(cache, logits=True)
    aside = copy.deepcopy(cache)
    inject(cache, logits=False)
    return inject(aside, logits=True)


def _pairs(some: Sequence[Any], others: Sequence[Any]) -> list[tuple[mx.array, mx.array]]:
    """What two caches hold, side by side; arrays without columns are left out."""
    pairs = zip(states(some).values(), states(others).values(), strict=True)
    return [(x, y) for x, y in pairs if x.size]


def _check_widths(parts: Sequence[tuple[str, Sequence[Any], Sequence[Any], KVTaps]]) -> None:
    wrong = [
        f"{name} key and value widths {list(have)}, expected {list(expected)} of {taps.family}"
        for name, have, expected, taps in parts
        if list(have) != list(expected)
    ]
    if wrong:
        raise ValueError("predictor does not fit the models: " + "; ".join(wrong))
