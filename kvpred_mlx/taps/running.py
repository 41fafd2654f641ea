"""One forward call of a model while something else answers for some of its projections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.taps.checkpointing import Flow, Norms, OnCall, checkpointed_layers
from kvpred_mlx.taps.shadows import Tap, lock, shadowed
from kvpred_mlx.taps.sites import Site


class Runner:
    """Runs a model with its sites tapped.

    Args:
        model: any mlx-lm model.
        sites: what is tapped.
        pieces: of a site whose projection returns several arrays: where to cut what stands in their place.
        norms: the key norm behind a site.
        needs_cache: whether the model does other things without a cache.
    """

    checkpointed = False  #: compute each layer again in a backward pass instead of keeping its activations

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        pieces: Mapping[int, list[int]] | None = None,
        norms: Mapping[int, Site] | None = None,
        needs_cache: bool = False,
    ):
        self.model, self.sites = model, sites
        self._pieces, self._norms, self._needs_cache = pieces or {}, norms or {}, needs_cache

    def run(self, tokens: mx.array, cache: list[Any] | None, on_call: OnCall, flow: Flow) -> mx.array:
        """Run the model over `tokens` [B, L] while `on_call` answers for its sites; returns the logits."""
        if cache is None and self._needs_cache:
            cache = make_prompt_cache(self.model)
        with lock, ExitStack() as stack:
            if self.checkpointed:
                tapped = partial(self._tapped, on_call)
                stack.enter_context(checkpointed_layers(self.model, self.sites, tapped, flow))
            else:
                stack.enter_context(self._tapped(on_call, flow))
            return self.model(tokens, cache=cache) if cache is not None else self.model(tokens)

    @contextmanager
    def _tapped(self, on_call: OnCall, flow: Flow, layer: int | None = None) -> Iterator[None]:
        """Let `on_call` answer for the sites of a layer (None: of all), with `flow` at hand."""
        counts: Counter[int] = Counter()

        def tap(site: int) -> Tap:
            def call(projection: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
                counts[site] += 1
                output = on_call(flow, (site, counts[site] - 1), projection, x, *args, **kwargs)
                return mx.split(output, self._pieces[site], axis=-1) if site in self._pieces else output

            return Tap(self.sites[site].projection, call)

        def norm_tap(site: int, norms: Norms) -> Tap:
            def call(norm: nn.Module, x: mx.array) -> mx.array:
                place = (site, counts[site] - 1)  # the projection was called just before
                norms[place] = norm(x)
                return norms[place]

            return Tap(self._norms[site].projection, call)

        lists: dict[tuple[int, str], list[Any]] = {}
        with lock, ExitStack() as stack:
            for i, site in enumerate(self.sites):
                if layer not in (None, site.layer):
                    continue
                if site.index is None:
                    stack.enter_context(shadowed(site.owner, site.name, tap(i)))
                else:  # a module in a list: the list is shadowed
                    key = (id(site.owner), site.name)
                    if key not in lists:
                        lists[key] = list(site.owner[site.name])
                        stack.enter_context(shadowed(site.owner, site.name, lists[key]))
                    lists[key][site.index] = tap(i)
                if flow.norms is not None and i in self._norms:
                    stack.enter_context(shadowed(site.owner, self._norms[i].name, norm_tap(i, flow.norms)))
            yield
