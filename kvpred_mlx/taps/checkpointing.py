"""Gradient checkpointing of tapped layers: what a tap gives or keeps goes through `mx.checkpoint` explicitly.

To `mx.checkpoint` an array that a function finds in its closure is a constant without a gradient, and the backward
pass runs the function again when the taps of the forward pass are gone.  So a layer takes its injected arrays as
arguments, returns its recorded ones, and sets its taps itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.layers import layer_list_owners
from kvpred_mlx.taps.shadows import shadowed
from kvpred_mlx.taps.sites import Site

Call = tuple[int, int]  # a site, and which call of it
Arrays = tuple[mx.array, ...]
Norms = dict[Call, mx.array]


@dataclass
class Flow:
    """What goes into and comes out of the taps during one forward call.

    Args:
        given: arrays to inject, of each call its keys and values.
        kept: recorded arrays.
        norms: what key norms gave; None if nobody asks.
        derive: what is to be injected once `kept` has the array of the call `source`; None if nothing waits for it.
        noise: what to fill in where it should not matter; anything finite if None.
    """

    given: dict[Call, Arrays] = field(default_factory=dict)
    kept: dict[Call, mx.array] = field(default_factory=dict)
    norms: Norms | None = None
    source: Call | None = None
    derive: Callable[[mx.array], dict[Call, Arrays]] | None = None
    noise: mx.array | None = None

    def settle(self) -> None:
        """Derive what is given as soon as it can be."""
        if self.derive is not None and self.source in self.kept:
            self.given |= self.derive(self.kept[self.source])
            self.derive = None


# What a tap gives for a call of a projection and what the projection reads (and is called with besides).
OnCall = Callable[..., mx.array]
Tapped = Callable[[Flow, int], AbstractContextManager[None]]


@contextmanager
def checkpointed_layers(
    model: nn.Module, sites: Sequence[Site], tapped: Tapped, flow: Flow
) -> Iterator[None]:
    """Let each layer of `model` be checkpointed.

    Args:
        tapped: sets the taps of one layer, with a flow of its own.

    Raises:
        UnsupportedModelError: the model has no list of layers that could be replaced.
    """
    owners = layer_list_owners(model)
    if not owners:
        raise UnsupportedModelError(f"{type(model).__module__}: its layers cannot be checkpointed")
    layers = [_CheckpointedLayer(layer, i, sites, tapped, flow) for i, layer in enumerate(model.layers)]
    with ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(shadowed(owner, name, layers))
        yield


class _CheckpointedLayer:
    """Stands in a layer's place; other attributes are still the layer's."""

    def __init__(self, layer: nn.Module, index: int, sites: Sequence[Site], tapped: Tapped, flow: Flow):
        self._layer, self._index, self._tapped, self._flow = layer, index, tapped, flow
        self._sites = sites

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer, flow, places = self._layer, self._flow, Flow()
        flow.settle()
        calls = [call for call in flow.given if self._sites[call[0]].layer == self._index]

        def run(parameters: Any, given: Any, args: Any, kwargs: Any) -> Any:
            norms: Norms | None = None if flow.norms is None else {}
            inside = Flow(dict(zip(calls, map(tuple, given), strict=True)), norms=norms)
            before = layer.trainable_parameters()
            layer.update(parameters)
            try:
                with self._tapped(inside, self._index):
                    output = layer(*args, **kwargs)
            finally:
                layer.update(before)
            places.kept, places.norms = inside.kept, inside.norms
            return output, list(inside.kept.values()), list((inside.norms or {}).values())

        given = [list(flow.given[call]) for call in calls]
        output, kept, norms = mx.checkpoint(run)(layer.trainable_parameters(), given, args, kwargs)
        flow.kept.update(zip(places.kept, kept, strict=True))
        if flow.norms is not None:
            flow.norms.update(zip(places.norms or {}, norms, strict=True))
        return output
