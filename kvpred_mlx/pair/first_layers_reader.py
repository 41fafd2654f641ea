"""The base's own first layers read a prompt, in place of all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from kvpred_mlx.dial.importance import Heard, Importance
from kvpred_mlx.dial.plan import Call, Span, keeps_all
from kvpred_mlx.dial.rows import close
from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.pair.readers import Filling, check_widths, with_logits
from kvpred_mlx.taps.kv_taps import KVTaps
from kvpred_mlx.taps.states import holds_keys, states

PROBE_TOKENS = 8


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
        check_widths(
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

    def resume(
        self,
        depth: int,
        hidden: mx.array,
        tokens: mx.array,
        cache: list[Any],
        *,
        predicted: bool = False,
        logits: bool = True,
    ) -> mx.array:
        """Process `tokens` [B, L] from what layer `depth` read of them, `hidden` [B, L, D], on.

        Args:
            cache: entries from `depth` on are updated in place; those before are not asked for.
            predicted: entries behind `depth` are predicted; else they are the base's own.
            logits: as in `fill`.

        Returns:
            The logits [B, L, vocabulary], lazy.
        """
        later = cache[depth:]
        # Masks are made from the caches of layers that do not run: they must stand where the later ones do.
        before = [next((c for c in later if type(c) is type(own)), later[0]) for own in cache[:depth]]
        with self._base.layers.resumed(self._base.layer_of(depth), hidden):
            if predicted:
                return self.fill(tokens, [*before, *later], depth=depth, logits=logits)
            return self._base.model(tokens, cache=[*before, *later])

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
    ) -> Filling:
        if not call.top:
            return self.begin(tokens, call, call.read, entry)
        listening = self.importance.listen(self.heard_layers(self.depth))
        if self.reads_once(call):
            hidden: list[mx.array] = []
            ahead = [*cache[: self.depth], *copy.deepcopy(cache[self.depth :])]
            with listening as heard, self.watched(self.depth, ahead, hidden):
                self.fill(tokens, ahead)
            return _BehindFirstLayers(self, self._base, tokens, hidden[0], heard)
        with listening as heard:
            self.fill(tokens, copy.deepcopy(cache))
        filling = self.begin(tokens, replace(call, top=0), call.read, entry)
        filling.heard = heard
        return filling

    def reads_once(self, call: Call) -> bool:
        """Whether spans that are chosen by what is heard go on from there; else first layers read them again."""
        return all(k in (None, self.depth) for k, _ in call.depths) and self.resumable(self.depth)

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
        if span.exact:
            return self._base.model(self._tokens[:, span.start : span.stop], cache=cache)
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


class _BehindFirstLayers:
    """Spans of a call that the first layers have read: exact and predicted ones alike begin behind them."""

    def __init__(
        self, reader: FirstLayersReader, base: KVTaps, tokens: mx.array, hidden: mx.array, heard: Heard
    ):
        self._reader, self._base, self._tokens = reader, base, tokens
        self._hidden, self.heard = hidden, heard

    def __call__(self, span: Span, cache: list[Any]) -> mx.array:
        part = slice(span.start, span.stop)
        given = self._reader.depth, self._hidden[:, part], self._tokens[:, part]
        if span.exact:
            return self._reader.resume(*given, cache)
        return with_logits(self._base, partial(self._reader.resume, *given, predicted=True), cache)


def _pairs(some: Sequence[Any], others: Sequence[Any]) -> list[tuple[mx.array, mx.array]]:
    """What two caches hold, side by side; arrays without columns are left out."""
    pairs = zip(states(some).values(), states(others).values(), strict=True)
    return [(x, y) for x, y in pairs if x.size]
