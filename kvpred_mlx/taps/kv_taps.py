"""Record and replace the raw keys and values of any mlx-lm model, without per-family attention code.

An attention layer's K and V projections are *tapped*: for the length of one forward call a tap stands
where the projection stood, and either passes the projection's output through and keeps it (record) or
returns a given array instead (inject).  The model's own code then does k_norm, RoPE, sliding windows and
the cache.  MLX is lazy, so whatever an injected array makes unnecessary is never computed.

A tap *shadows* its projection (`kvpred_mlx.taps.shadows`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.checkpointing import Arrays, Call, Flow, Norms, OnCall, checkpointed_layers
from kvpred_mlx.taps.fused import FusedColumns
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.layers import Layers, layer_list_owners
from kvpred_mlx.taps.proof import check_injection, reached_columns
from kvpred_mlx.taps.shadows import Tap, lock, shadowed
from kvpred_mlx.taps.sites import check_caches, find_sites, group_calls, key_norm, project


class KVTaps:
    """The raw keys and values of a model, layer by layer.

    A *KV layer* is a layer that makes keys and values of its own; layers that borrow another layer's are
    not counted.  `widths[i]` is the pair (key width, value width) of KV layer i; the value width is 0
    where a fused projection's columns all reach the cached keys (latent attention).  `input_widths[i]` is the
    width of what layer i's key projection reads.

    Args:
        model: any mlx-lm model whose caches hold nothing but attention keys and values.

    Raises:
        UnsupportedModelError: naming the family and the reason.
    """

    checkpointed = False  #: compute each layer again in a backward pass instead of keeping its activations
    _needs_cache = False

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, Layers(model)
        self.family: str = getattr(model, "model_type", type(model).__module__)
        check_caches(self.family, make_prompt_cache(model))
        sites = list(find_sites(model))
        self._sites = sites
        self._norms = {i: norm for i, site in enumerate(sites) if (norm := key_norm(site)) is not None}
        self._pieces: dict[int, list[int]] = {}
        self._in_dims: dict[int, int] = {}
        self._out_dims: dict[int, int] = {}
        calls = self._dry_run(make_prompt_cache(model))
        # Layers that borrow keys and values find them in the cache; without one they make their own.
        self._needs_cache = calls != self._dry_run(None)
        self._layers = group_calls(self.family, sites, calls)
        self._fused: list[FusedColumns | None] = [None] * len(self._layers)
        dims = [[self._out_dims[s] for s, _ in layer] for layer in self._layers]
        self.widths = [(d[0], d[-1]) for d in dims]
        self.input_widths = [self._in_dims[layer[0][0]] for layer in self._layers]
        self._find_fused_columns()
        self._fused_at = {calls[0]: f for calls, f in zip(self._layers, self._fused, strict=True) if f}
        check_injection(self.family, self.model, self.inject, self.widths, self._vocabulary)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def fused(self) -> bool:
        """Whether any layer makes queries, keys and values in one projection."""
        return any(self._fused)

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
        reached = [i for i, calls in enumerate(self._layers) if calls[0] in flow.kept]
        if inputs is not None:
            inputs += [read[self._layers[i][0]] for i in reached]
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
        return [flow.kept[calls[0]] for calls in self._layers if calls[0] in flow.kept], logits

    def inject(
        self,
        kv: Sequence[KV],
        tokens: mx.array,
        cache: list[Any] | None = None,
        *,
        logits: bool,
        norms: Norms | None = None,
    ) -> mx.array:
        """Run the model over `tokens` [B, L] with the given raw keys and values in place of its own.

        Args:
            kv: one `KV` for each KV layer, as `record` returns them.
            cache: updated in place; its entries depend on `kv` alone if `logits` is false.
            logits: whether the returned logits [B, L, vocabulary] will be used.  If not, the queries of
                fused projections are left out, else the cached entries would depend on them.
            norms: as in `record`.

        Raises:
            ValueError: if the number, the widths or the tokens of `kv` are not as expected.
        """
        self._check_widths(kv)
        shapes = {a.shape[:-1] for pair in kv for a in pair}
        if shapes != {tokens.shape}:
            raise ValueError(f"{self.family}: keys and values for {sorted(shapes)}, expected {tokens.shape}")

        give = partial(self._give, logits=logits)
        return self.run(tokens, cache, give, Flow(self._given(kv), norms=norms))

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
        source = self._layers[layer][0]

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

        replaced = {call for calls in behind for call in calls}
        return self.run(tokens, cache, pass_or_give, Flow(norms=norms, source=source, derive=derive))

    def layer_of(self, kv_layer: int) -> int:
        """The place in the model's list of layers of a KV layer."""
        return self._sites[self._layers[kv_layer][0][0]].layer

    def norm_places(self) -> list[Call]:
        """For each KV layer the place of its normed keys in `norms` (see `record`), if there is a norm."""
        return [layer[0] for layer in self._layers]

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
        looped = any(nth for calls in self._layers for _, nth in calls)
        if looped or n >= len(self.model.layers) or not layer_list_owners(self.model):
            return None
        try:
            with self.first_layers(n):
                cache = make_prompt_cache(self.model)
                found = len(self.record(mx.array([[0, 0]]), cache)[0])
                self.record(mx.array([[0, 0]]))  # without a cache too: some index their caches by layer
        except (
            IndexError,
            KeyError,
            TypeError,
            ValueError,
        ):  # a family that counts on all its layers: run it whole
            return None
        used = [not c.empty() for c in cache]
        entries = sum(used)
        return (n, entries) if found >= kv_layers and all(used[:entries]) else None

    def run(self, tokens: mx.array, cache: list[Any] | None, on_call: OnCall, flow: Flow) -> mx.array:
        """Run the model over `tokens` [B, L] while `on_call` answers for its projections; returns the logits."""
        if cache is None and self._needs_cache:
            cache = make_prompt_cache(self.model)
        with lock, ExitStack() as stack:
            if self.checkpointed:
                tapped = partial(self._tapped, on_call)
                stack.enter_context(checkpointed_layers(self.model, self._sites, tapped, flow))
            else:
                stack.enter_context(self._tapped(on_call, flow))
            return self.model(tokens, cache=cache) if cache is not None else self.model(tokens)

    @contextmanager
    def _tapped(self, on_call: OnCall, flow: Flow, layer: int | None = None) -> Iterator[None]:
        """Let `on_call` answer for the projections of a layer (None: of all), with `flow` at hand."""
        counts: Counter[int] = Counter()

        def tap(site: int) -> Tap:
            def call(projection: nn.Module, x: mx.array) -> Any:
                counts[site] += 1
                output = on_call(flow, (site, counts[site] - 1), projection, x)
                return mx.split(output, self._pieces[site], axis=-1) if site in self._pieces else output

            return Tap(self._sites[site].projection, call)

        def norm_tap(site: int, norms: Norms) -> Tap:
            def call(norm: nn.Module, x: mx.array) -> mx.array:
                place = (site, counts[site] - 1)  # the projection was called just before
                norms[place] = norm(x)
                return norms[place]

            return Tap(self._norms[site].projection, call)

        with lock, ExitStack() as stack:
            for i, site in enumerate(self._sites):
                if layer in (None, site.layer):
                    stack.enter_context(shadowed(site.owner, site.name, tap(i)))
                    if flow.norms is not None and i in self._norms:
                        norm = norm_tap(i, flow.norms)
                        stack.enter_context(shadowed(site.owner, self._norms[i].name, norm))
            yield

    def _dry_run(self, cache: list[Any] | None) -> list[tuple[int, int]]:
        """Which sites a prefill really calls, in call order, as (site, nth call of it)."""
        calls: list[tuple[int, int]] = []

        def note(flow: Flow, call: Call, projection: nn.Module, x: mx.array) -> mx.array:
            site = call[0]
            calls.append(call)
            output = projection(x)
            if not isinstance(output, mx.array):
                self._pieces[site] = list(accumulate(piece.shape[-1] for piece in output))[:-1]
            whole = project(projection, x)
            self._in_dims[site], self._out_dims[site] = x.shape[-1], whole.shape[-1]
            return whole

        self._vocabulary = self.run(mx.array([[0, 0]]), cache, note, Flow()).shape[-1]
        return calls

    def _kv(self, layer: int, outputs: dict[Call, mx.array]) -> KV:
        calls, fused = self._layers[layer], self._fused[layer]
        if fused is not None:
            return fused.split(outputs[calls[0]])
        return KV(outputs[calls[0]], outputs[calls[1]])

    def _give(self, flow: Flow, call: Call, projection: nn.Module, x: mx.array, *, logits: bool) -> mx.array:
        """What stands in the place of a projection's output."""
        arrays = [a.astype(x.dtype) for a in flow.given[call]]
        fused = self._fused_at.get(call)
        if fused is None:
            return arrays[0]
        if not logits:
            return fused.pad(KV(*arrays))
        return fused.join(fused.take_rest(project(projection, x)), KV(*arrays))

    def _given(self, kv: Sequence[KV], first: int = 0) -> dict[Call, Arrays]:
        """What each call of a projection is given, from KV layer `first` on: both arrays if fused, else its own."""
        given: dict[Call, Arrays] = {}
        for calls, layer in zip(self._layers[first:], kv, strict=True):
            if calls[0] in self._fused_at:
                given[calls[0]] = tuple(layer)
            else:
                given |= {call: (array,) for call, array in zip(calls, layer, strict=False)}
        return given

    def _check_widths(self, kv: Sequence[KV], first: int = 0) -> None:
        given, expected = [(k.shape[-1], v.shape[-1]) for k, v in kv], self.widths[first:]
        if given != expected:
            raise ValueError(f"{self.family}: injected key and value widths {given}, expected {expected}")

    def _find_fused_columns(self) -> None:
        for i, calls in enumerate(self._layers):
            pieces = self._pieces.get(calls[0][0])
            if pieces is not None:  # the projection itself returns queries, keys and values
                width = self.widths[i][0]
                is_key = [pieces[0] <= c < pieces[1] for c in range(width)]
                self._set_fused(i, FusedColumns.of(is_key, [c >= pieces[1] for c in range(width)]))
        unknown = [i for i, calls in enumerate(self._layers) if len(calls) == 1 and self._fused[i] is None]
        if unknown:
            asked = [self._layers[i][0] for i in unknown]
            widths = [self.widths[i][0] for i in unknown]
            reached = reached_columns(self.model, self.run, asked, widths)
            for i, (is_key, is_value) in zip(unknown, reached, strict=True):
                self._set_fused(i, FusedColumns.of(is_key, is_value))

    def _set_fused(self, layer: int, fused: FusedColumns) -> None:
        if not fused.keys:
            raise UnsupportedModelError(
                f"{self.family}: no output of layer {layer}'s fused projection reaches the cached keys"
            )
        self._fused[layer] = fused
        self.widths[layer] = (len(fused.keys), len(fused.values))
