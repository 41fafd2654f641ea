"""Keys and values of attention models, found by the names of their projections: nothing needs to be computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.checkpointing import Call, Flow
from kvpred_mlx.taps.fused import FusedColumns
from kvpred_mlx.taps.places import Place, Structure
from kvpred_mlx.taps.proof import reached_columns
from kvpred_mlx.taps.running import Runner
from kvpred_mlx.taps.sites import find_sites, group_calls, key_norm, project


def named_structure(family: str, model: nn.Module) -> Structure:
    """What an attention model keeps, by the names of its key, value and fused projections.

    Raises:
        UnsupportedModelError: there are none of a known name, or a layer has other ones than expected.
    """
    sites = list(find_sites(model))
    norms = {i: norm for i, site in enumerate(sites) if (norm := key_norm(site)) is not None}
    dry = _DryRun(Runner(model, sites))
    calls = dry.run(make_prompt_cache(model))
    # Layers that borrow keys and values find them in the cache; without one they make their own.
    needs_cache = calls != dry.run(None)
    runner = Runner(model, sites, dry.pieces, norms, needs_cache)
    layers = group_calls(family, sites, calls)
    fused = _fused_columns(family, runner, layers, dry)
    places = []
    for layer, columns in zip(layers, fused, strict=True):
        names, widths = [sites[s].full_name for s, _ in layer], [dry.out_dims[s] for s, _ in layer]
        if columns is not None:
            places.append([Place(layer[0], columns, names[0])])
        else:
            key, value = (
                Place.keys(layer[0], widths[0], names[0]),
                Place.values(layer[1], widths[1], names[1]),
            )
            places.append([key, value])
    input_widths = [dry.in_dims[layer[0][0]] for layer in layers]
    return Structure(runner, places, input_widths, [None] * len(places), dry.vocabulary)


class _DryRun:
    """Which sites a prefill really calls, and the widths of what they read and return."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self.pieces: dict[int, list[int]] = {}
        self.in_dims: dict[int, int] = {}
        self.out_dims: dict[int, int] = {}

    def run(self, cache: list[Any] | None) -> list[Call]:
        """The calls in their order."""
        calls: list[Call] = []

        def note(flow: Flow, call: Call, projection: nn.Module, x: mx.array) -> Any:
            site = call[0]
            calls.append(call)
            output = projection(x)
            if not isinstance(output, mx.array):
                self.pieces[site] = list(accumulate(piece.shape[-1] for piece in output))[:-1]
            self.in_dims[site], self.out_dims[site] = x.shape[-1], project(projection, x).shape[-1]
            return output

        self.vocabulary: int = self._runner.run(mx.array([[0, 0]]), cache, note, Flow()).shape[-1]
        return calls


def _fused_columns(
    family: str, runner: Runner, layers: Sequence[tuple[Call, ...]], dry: _DryRun
) -> list[FusedColumns | None]:
    """The columns of each layer's fused projection; None where keys and values have projections of their own."""
    fused: list[FusedColumns | None] = [None] * len(layers)
    for i, calls in enumerate(layers):
        pieces, width = dry.pieces.get(calls[0][0]), dry.out_dims[calls[0][0]]
        if pieces is not None:  # the projection itself returns queries, keys and values
            is_key = [pieces[0] <= c < pieces[1] for c in range(width)]
            fused[i] = FusedColumns.of(is_key, [c >= pieces[1] for c in range(width)])
    unknown = [i for i, calls in enumerate(layers) if len(calls) == 1 and fused[i] is None]
    if unknown:
        asked = [layers[i][0] for i in unknown]
        widths = [dry.out_dims[site] for site, _ in asked]
        for i, (is_key, is_value) in zip(
            unknown, reached_columns(runner.model, runner.run, asked, widths), strict=True
        ):
            fused[i] = FusedColumns.of(is_key, is_value)
    for i, columns in enumerate(fused):
        if columns is not None and not columns.keys:
            raise UnsupportedModelError(
                f"{family}: no output of layer {i}'s fused projection reaches the cached keys"
            )
    return fused
