"""Record and replace what any mlx-lm model keeps of a prompt, without code for any family.

An attention layer's K and V projections are *tapped*: for the length of one forward call a tap stands
where the projection stood, and either passes the projection's output through and keeps it (record) or
returns a given array instead (inject).  The model's own code then does k_norm, RoPE, sliding windows and
the cache.  MLX is lazy, so whatever an injected array makes unnecessary is never computed.

Recurrent and convolutional layers are tapped at the projections that their states are made from
(`kvpred_mlx.taps.search`).

A tap *shadows* its projection (`kvpred_mlx.taps.shadows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.checkpointing import Arrays, Call, Flow, Norms
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.layers import Layers, layer_list_owners
from kvpred_mlx.taps.named import named_structure
from kvpred_mlx.taps.places import Place, Structure, divide, join
from kvpred_mlx.taps.proof import check_injection
from kvpred_mlx.taps.search import searched_structures
from kvpred_mlx.taps.sites import attention_only, project
from kvpred_mlx.taps.states import padded


class KVTaps:
    """The raw keys and values of a model, layer by layer.

    A *KV layer* is a layer that makes keys and values of its own; layers that borrow another layer's are
    not counted.  `widths[i]` is the pair (key width, value width) of KV layer i; the value width is 0
    where a fused projection's columns all reach the cached keys (latent attention).  `input_widths[i]` is the
    width of what layer i's key projection reads.

    Of a layer with recurrent or convolutional state the *keys* are what matters to it at every position, and the
    *values* what matters at the last `tails[i]` positions only (a convolution's window); elsewhere `tails[i]` is None.

    Args:
        model: any mlx-lm model whose caches hold nothing but what its projections' outputs make.

    Raises:
        UnsupportedModelError: naming the family and the reason.
    """

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, Layers(model)
        self.family: str = getattr(model, "model_type", type(model).__module__)
        failed: UnsupportedModelError | None = None
        for structure in _structures(self.family, model):
            self._use(structure)
            try:
                check_injection(self, structure.vocabulary, structure.proved_by)
            except UnsupportedModelError as error:
                failed = error
            else:
                return
        if failed is not None:
            raise failed

    def _use(self, structure: Structure) -> None:
        self._runner, self._layers = structure.runner, structure.layers
        self.input_widths, self.tails = structure.input_widths, structure.tails
        self.widths = [_width(places) for places in self._layers]
        self._places = {place.call: place for places in self._layers for place in places}
        self.run = self._runner.run

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def checkpointed(self) -> bool:
        """Whether each layer is computed again in a backward pass instead of keeping its activations."""
        return self._runner.checkpointed

    @checkpointed.setter
    def checkpointed(self, value: bool) -> None:
        self._runner.checkpointed = value

    @property
    def fused(self) -> bool:
        """Whether logits need more than what the cache does: queries beside keys, values of all positions."""
        return any(not place.plain for place in self._places.values()) or any(self.tails)

    @property
    def places(self) -> list[list[Place]]:
        """Where each KV layer's keys and values are made."""
        return self._layers

    def record(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        norms: Norms | None = None,
        inputs: list[mx.array] | None = None,
    ) -> tuple[list[KV], mx.array]:
        """Run the model over `tokens` [B, L] and keep every KV layer's raw keys and values.

        Nothing is computed until it is evaluated.  Returns the recorded arrays and the logits.

        Args:
            norms: filled with what the key norms give, if the model has any (`kvpred_mlx.taps.key_norms`).
            inputs: filled with what every KV layer's key projection reads, `[B, L, input_widths[i]]`; not for a
                backward pass through layers that are `checkpointed`.
        """
        read: dict[Call, mx.array] = {}

        def keep(flow: Flow, call: Call, projection: nn.Module, x: mx.array) -> mx.array:
            read[call] = x
            flow.kept[call] = project(projection, x)
            return flow.kept[call]

        flow = Flow(norms=norms)
        logits = self.run(tokens, cache, keep, flow)
        reached = [i for i, places in enumerate(self._layers) if places[0].call in flow.kept]
        if inputs is not None:
            inputs += [read[self._layers[i][0].call] for i in reached]
        return [self._kv(i, flow.kept) for i in reached], logits

    def record_inputs(
        self, tokens: mx.array, cache: list[Any] | None = None
    ) -> tuple[list[mx.array], mx.array]:
        """What every KV layer's key projection reads, `[B, L, input_widths[i]]`; else as `record`."""

        def keep(flow: Flow, call: Call, projection: nn.Module, x: mx.array) -> mx.array:
            flow.kept[call] = x
            return project(projection, x)

        flow = Flow()
        logits = self.run(tokens, cache, keep, flow)
        return [flow.kept[places[0].call] for places in self._layers if places[0].call in flow.kept], logits

    def inject(
        self,
        kv: Sequence[KV],
        tokens: mx.array,
        cache: list[Any] | None = None,
        *,
        logits: bool,
        norms: Norms | None = None,
        noise: mx.array | None = None,
    ) -> mx.array:
        """Run the model over `tokens` [B, L] with the given raw keys and values in place of its own.

        Args:
            kv: one `KV` for each KV layer, as `record` returns them; with values of the last `tails[i]` rows alone or
                of all.
            cache: updated in place; its entries depend on `kv` alone if `logits` is false.
            logits: whether the returned logits [B, L, vocabulary] will be used.  If not, the queries of
                fused projections are left out, else the cached entries would depend on them.
            norms: as in `record`.
            noise: a random key: random numbers stand where nothing should matter.

        Raises:
            ValueError: if the number, the widths or the tokens of `kv` are not as expected.
        """
        self._check_widths(kv)
        shapes = {
            a.shape[:-1]
            for pair, tail in zip(kv, self.tails, strict=True)
            for a in (pair if tail is None else pair[:1])
        }
        if shapes != {tokens.shape}:
            raise ValueError(f"{self.family}: keys and values for {sorted(shapes)}, expected {tokens.shape}")

        give = partial(self._give, logits=logits)
        return self.run(tokens, cache, give, Flow(self._given(kv), norms=norms, noise=noise))

    def inject_after(
        self,
        layer: int,
        predict: Callable[[mx.array], Sequence[KV]],
        tokens: mx.array,
        cache: list[Any] | None = None,
        *,
        logits: bool,
        norms: Norms | None = None,
    ) -> mx.array:
        """Run the model over `tokens` [B, L]; behind KV layer `layer` keys and values are predicted from what it reads.

        Layers up to `layer` are the model's own, so their cache entries are exact.  One lazy pass: the entries of the
        others depend on `layer`'s input alone, if `logits` is false, and nothing above it is computed.

        Args:
            predict: from what `layer`'s key projection reads, `[B, L, input_widths[layer]]`, to raw keys and values of
                every KV layer behind it.
            cache, logits, norms: as in `inject`.

        Raises:
            ValueError: the predicted widths are not as expected.
        """
        behind = self._layers[layer + 1 :]
        source = self._layers[layer][0].call

        def derive(x: mx.array) -> dict[Call, Arrays]:
            kv = predict(x)
            self._check_widths(kv, layer + 1)
            return self._given(kv, layer + 1)

        def pass_or_give(flow: Flow, call: Call, projection: nn.Module, x: mx.array) -> mx.array:
            if call in replaced:
                flow.settle()
                return self._give(flow, call, projection, x, logits=logits)
            if call == source:
                flow.kept[call] = x
            return project(projection, x)

        replaced = {place.call for places in behind for place in places}
        return self.run(tokens, cache, pass_or_give, Flow(norms=norms, source=source, derive=derive))

    def rows_asked(self, cache: list[Any] | None) -> list[int | None]:
        """How many of a call's last values each KV layer needs (None: all): of rows that end elsewhere, all."""
        if cache is None or any(padded(entry) for entry in cache):
            return [None] * len(self)
        return self.tails

    def layer_of(self, kv_layer: int) -> int:
        """The place in the model's list of layers of a KV layer."""
        return self._runner.sites[self._layers[kv_layer][0].call[0]].layer

    def norm_places(self) -> list[Call]:
        """For each KV layer the place of its normed keys in `norms` (see `record`), if there is a norm."""
        return [places[0].call for places in self._layers]

    @contextmanager
    def first_layers(self, n: int | None) -> Iterator[None]:
        """Let the model run its first `n` layers only (None: all), so that no graph is built beyond them."""
        with self.layers.first(n):
            yield

    def depth(self, kv_layers: int) -> tuple[int, int] | None:
        """How many layers and how many cache entries the first `kv_layers` KV layers need.

        Returns None if the model must run whole (it needs all, or its layers cannot be cut short).
        """
        n = max(map(self.layer_of, range(kv_layers))) + 1
        looped = any(nth for _, nth in self._places)
        if looped or n >= len(self.model.layers) or not layer_list_owners(self.model):
            return None
        whole = make_prompt_cache(self.model)
        try:
            with self.first_layers(n):
                cache = make_prompt_cache(self.model)
                found = len(self.record(mx.array([[0, 0]]), cache)[0])
                self.record(mx.array([[0, 0]]))  # without a cache too: some index their caches by layer
                used = [not c.empty() for c in cache]
                entries = sum(used)
                every = [*make_prompt_cache(self.model)[:entries], *whole[entries:]]
                self.record(mx.array([[0, 0]]), every)
        except (IndexError, KeyError, TypeError, ValueError):  # a family that counts on all its layers
            return None
        return (n, entries) if found >= kv_layers and all(used[:entries]) else None

    def _kv(self, layer: int, outputs: dict[Call, mx.array]) -> KV:
        places = self._layers[layer]
        return join([place.take(outputs[place.call]) for place in places])

    def _give(self, flow: Flow, call: Call, projection: nn.Module, x: mx.array, *, logits: bool) -> mx.array:
        """What stands in the place of a projection's output."""
        place = self._places[call]
        kv, rest = KV(*(a.astype(x.dtype) for a in flow.given[call])), None
        if place.columns.rest and logits:
            rest = place.columns.take_rest(project(projection, x))
        return place.give(kv, x.shape[1], rest, flow.noise)

    def _given(self, kv: Sequence[KV], first: int = 0) -> dict[Call, Arrays]:
        """What each call of a projection is given, from KV layer `first` on: its part of the keys and values."""
        return {
            place.call: tuple(part)
            for places, layer in zip(self._layers[first:], kv, strict=True)
            for place, part in zip(places, divide(layer, places), strict=True)
        }

    def _check_widths(self, kv: Sequence[KV], first: int = 0) -> None:
        given, expected = [(k.shape[-1], v.shape[-1]) for k, v in kv], self.widths[first:]
        if given != expected:
            raise ValueError(f"{self.family}: injected key and value widths {given}, expected {expected}")


def _structures(family: str, model: nn.Module) -> Iterator[Structure]:
    """By names where they tell, else by trying; the first one that can be proved is true."""
    caches = make_prompt_cache(model)
    if not caches:
        raise UnsupportedModelError(f"{family}: the model has no key-value cache")
    if attention_only(caches):
        with suppress(UnsupportedModelError):
            yield named_structure(family, model)
    yield from searched_structures(family, model)


def _width(places: Sequence[Place]) -> tuple[int, int]:
    keys, values = zip(*(place.widths for place in places), strict=True)
    return sum(keys), sum(values)
