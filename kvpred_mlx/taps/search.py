"""What any layer keeps, and which projections it is made from: found by a gradient, whatever they are called.

All modules with weights of two or more dimensions (projections, experts, embeddings) become leaves with random
output, so that nothing is computed but what stands between projections and states, and no large weight is read: a
model whose weights are not there yet will do.

1. A gradient of the states finds the projections with a direct way to a state: the cut that is nearest to the states.
2. One whose input the others determine is left to the model (Mamba's `x_proj` reads a convolution of `in_proj`).
3. The wide half of a low-rank pair gives way to the narrow one.
4. A second gradient, with the kept ones as leaves, tells columns and positions: a convolution's window needs the
   last rows only.

Layers that are built alike are found at once.  `kvpred_mlx.taps.proof` then has the last word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.candidates import candidates, other_leaves
from kvpred_mlx.taps.checkpointing import Call, Flow
from kvpred_mlx.taps.fused import FusedColumns
from kvpred_mlx.taps.layers import Layers
from kvpred_mlx.taps.places import Place, Structure
from kvpred_mlx.taps.running import Runner
from kvpred_mlx.taps.shaken import shaken
from kvpred_mlx.taps.sites import key_norm
from kvpred_mlx.taps.states import Kind, states

PROBE_TOKENS = 24  # a window that is shorter than half of it counts as a window
PROBE_VOCABULARY = 8

Reach = dict[
    Kind, dict[Call, mx.array]
]  # where a kind of state moves with a call's output, [tokens, columns]


@dataclass
class _Columns:
    """Which columns of a call's output matter, and to what."""

    everywhere: set[int] = field(default_factory=set)
    values: set[int] = field(default_factory=set)  # of attention
    last: set[int] = field(default_factory=set)
    rows: int = 0  #: of `last`

    def add(self, other: _Columns) -> None:
        self.everywhere |= other.everywhere
        self.values |= other.values
        self.last |= other.last
        self.rows = max(self.rows, other.rows)


def searched_structures(family: str, model: nn.Module) -> Iterator[Structure]:
    """What a model keeps, by trying: cheap guesses first, to be proved by who asks.

    A state may hold a layer's input (RWKV's token shift does): then the layer's norms are places too.

    Raises:
        UnsupportedModelError: nothing is found.
    """
    for norms, alike in ((False, True), (False, False), (True, False)):
        with mx.stream(mx.cpu), shaken(model):  # custom kernels of a GPU have no gradient
            search = _Search(model, norms, alike)
            found = search.columns()
        if found:
            yield search.structure(found)
    if not found:
        raise UnsupportedModelError(f"{family}: no projection was found that its cache is made from")


class _Search:
    def __init__(self, model: nn.Module, norms: bool, alike: bool):
        inside = list(candidates(model, norms))
        known = {id(site.projection) for site in inside}
        self._model, self._alike = model, alike
        self._inside = len(inside)
        self._runner = Runner(model, [*inside, *other_leaves(model, known)])
        self._tokens = mx.random.randint(0, PROBE_VOCABULARY, (1, PROBE_TOKENS), key=mx.random.key(7))
        self._widths: dict[Call, int] = {}
        self._leaves = self._outputs()

    def columns(self) -> dict[Call, _Columns]:
        """Of every call that makes a part of what is kept."""
        leaves, asked = self._leaves, [c for c in self._leaves if c[0] < self._inside]
        rows: dict[Call, int] = {}
        for by_call in self._reach(asked, leaves).values():
            for call, moved in by_call.items():
                if n := _rows(moved):
                    rows[call] = max(rows.get(call, 0), n)
        kept, computed = self._undetermined(rows)
        fixed = {call: leaf for call, leaf in leaves.items() if call not in computed}
        sizes = {kind: array.shape for (_, kind), array in self._states(fixed).items()}
        found: dict[Call, _Columns] = {}
        for kind, by_call in self._reach(kept, fixed).items():
            for call, moved in by_call.items():
                found.setdefault(call, _Columns()).add(_what(kind, moved, sizes[kind]))
        return self._in_all_layers(
            {call: c for call, c in found.items() if c.everywhere or c.values or c.last}
        )

    def structure(self, found: Mapping[Call, _Columns]) -> Structure:
        """The places in the order of their calls, layer by layer."""
        ordered = [call for call in self._leaves if call in found]
        used = sorted({site for site, _ in ordered})
        sites = [self._runner.sites[site] for site in used]
        layers: dict[int, list[Call]] = {}
        for call in ordered:
            layers.setdefault(self._runner.sites[call[0]].layer, []).append(call)
        places, tails, norms = [], [], {}
        for layer in sorted(layers):
            calls = layers[layer]
            places.append([self._place(call, found[call], used) for call in calls])
            attention = any(found[call].values for call in calls)
            windowed = not attention and any(place.widths[1] for place in places[-1])
            tails.append(max(found[call].rows for call in calls) if windowed else None)
            if attention:
                site = sites[places[-1][0].call[0]]
                if (norm := key_norm(site)) is not None:
                    norms[places[-1][0].call[0]] = norm
        input_widths = [self._widths[layers[layer][0]] for layer in sorted(layers)]
        runner = Runner(self._model, sites, norms=norms, needs_cache=True)
        proved_by = self._entries_of({*self._alikes.values(), *self._lasts})
        return Structure(runner, places, input_widths, tails, self._vocabulary, proved_by)

    def _place(self, call: Call, columns: _Columns, used: list[int]) -> Place:
        keys = columns.everywhere
        values = (columns.values | columns.last) - keys
        rest = set(range(self._leaves[call].shape[-1])) - keys - values
        name = self._runner.sites[call[0]].full_name
        return Place(
            (used.index(call[0]), call[1]), FusedColumns(sorted(keys), sorted(values), sorted(rest)), name
        )

    # What is run

    def _outputs(self) -> dict[Call, mx.array]:
        """A random array in place of the output of every call, in the order of the calls."""
        shapes: dict[Call, tuple[tuple[int, ...], mx.Dtype]] = {}

        def note(flow: Flow, call: Call, module: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            output = module(x, *args, **kwargs)
            if isinstance(output, mx.array) and mx.issubdtype(output.dtype, mx.floating):
                shapes[call], self._widths[call] = (output.shape, output.dtype), x.shape[-1]
            return output

        cache = make_prompt_cache(self._model)
        self._entries: dict[int, set[int]] = {}
        with Layers(self._model).noted(cache, self._entries):
            logits = self._runner.run(self._tokens, cache, note, Flow())
        self._vocabulary = logits.shape[-1]
        return {call: _random(i, *shape) for i, (call, shape) in enumerate(shapes.items())}

    def _run(self, leaves: Mapping[Call, mx.array], read: dict[Call, mx.array] | None = None) -> list[Any]:
        """The caches of a run with some outputs given; `read` gets what the calls read."""

        def give(flow: Flow, call: Call, module: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            if read is not None:
                read[call] = x
            return leaves[call] if call in leaves else module(x, *args, **kwargs)

        cache = make_prompt_cache(self._model)
        self._runner.run(self._tokens, cache, give, Flow())
        return cache

    def _states(self, leaves: Mapping[Call, mx.array]) -> dict[tuple[int, Kind], mx.array]:
        return {key: s for key, s in states(self._run(leaves)).items() if key[0] in self._asked}

    def _reach(self, moving: Sequence[Call], fixed: Mapping[Call, mx.array]) -> Reach:
        found: Reach = {}
        for kind in sorted({kind for _, kind in self._states(fixed)}):

            def total(arrays: list[mx.array], kind: Kind = kind) -> mx.array:
                given = self._states({**fixed, **dict(zip(moving, arrays, strict=True))})
                of_kind = (s.astype(mx.float32) for (_, own), s in given.items() if own == kind)
                return sum(((s * _random(3, s.shape, s.dtype)).sum() for s in of_kind), mx.array(0.0))

            gradients = mx.grad(total)([fixed[call] for call in moving])
            moved = [(g != 0).reshape(-1, g.shape[-1]) for g in gradients]
            mx.eval(moved)
            found[kind] = dict(zip(moving, moved, strict=True))
        return found

    # Which calls

    def _undetermined(self, rows: Mapping[Call, int]) -> tuple[list[Call], set[Call]]:
        """The calls that the others do not determine, and those that they do.

        Args:
            rows: how many of its last rows reach a state, of each call that does.
        """
        leaves, other = self._leaves, dict[Call, mx.array]()
        for i, (call, leaf) in enumerate(leaves.items()):
            fresh, n = _random(10_000 + i, leaf.shape, leaf.dtype), rows.get(call, 0)
            if n and leaf.ndim == 3 and leaf.shape[1] == PROBE_TOKENS:
                other[call] = mx.concatenate(
                    [fresh[:, : PROBE_TOKENS - n], leaf[:, PROBE_TOKENS - n :]], axis=1
                )
            else:
                other[call] = leaf if n else fresh
        one, two = dict[Call, mx.array](), dict[Call, mx.array]()
        self._run(leaves, one)
        self._run(other, two)
        kept = {call: call for call in rows if not mx.array_equal(one[call], two[call]).item()}
        computed = set(rows) - set(kept)
        for call in kept:
            if one[call].shape[-1] < leaves[call].shape[-1]:
                narrow = next((c for c in self._beside(call) if _same(leaves[c], one[call])), None)
                if narrow is not None:
                    kept[call] = narrow
                    computed.add(call)
        return sorted(set(kept.values()), key=list(leaves).index), computed

    def _beside(self, call: Call) -> list[Call]:
        """Other candidates in the same layer."""
        sites = self._runner.sites
        layer = sites[call[0]].layer
        return [c for c in self._leaves if c != call and c[0] < self._inside and sites[c[0]].layer == layer]

    # Which layers

    @cached_property
    def _alikes(self) -> dict[int, int]:
        """For each layer the first one that is built alike."""
        first: dict[Any, int] = {}
        layers = [layer for layer in enumerate(self._model.layers) if isinstance(layer[1], nn.Module)]
        return {i: first.setdefault(_build(layer) if self._alike else i, i) for i, layer in layers}

    @property
    def _lasts(self) -> set[int]:
        """The last layer of each build."""
        return set({first: i for i, first in self._alikes.items()}.values())

    @cached_property
    def _asked(self) -> set[int]:
        """The cache entries whose states are looked at."""
        return self._entries_of(set(self._alikes.values()))

    def _entries_of(self, layers: set[int]) -> set[int]:
        """The cache entries of some layers, and those that are no layer's."""
        whose: dict[int, set[int]] = {}
        for layer, entries in self._entries.items():
            for entry in entries:
                whose.setdefault(entry, set()).add(layer)
        return {e for e in range(len(make_prompt_cache(self._model))) if e not in whose or layers & whose[e]}

    def _in_all_layers(self, found: Mapping[Call, _Columns]) -> dict[Call, _Columns]:
        sites, every = self._runner.sites, dict(found)
        alike = {
            (self._alikes.get(sites[site].layer), sites[site].full_name, nth): columns
            for (site, nth), columns in found.items()
            if self._alikes.get(sites[site].layer) == sites[site].layer
        }
        for call in self._leaves:
            site = sites[call[0]]
            columns = alike.get((self._alikes.get(site.layer), site.full_name, call[1]))
            if call[0] < self._inside and columns is not None:
                every.setdefault(call, _Columns()).add(columns)
        return every


def _build(layer: nn.Module) -> tuple[Any, ...]:
    """What a layer is made of: equal for layers that are built alike."""
    modules = sorted((path, type(module).__name__) for path, module in layer.named_modules())
    parameters: Any = tree_flatten(layer.parameters())
    return (*modules, *sorted((name, array.shape) for name, array in parameters))


def _rows(moved: mx.array) -> int:
    """How many of the last rows move anything."""
    rows: Any = mx.any(moved, axis=-1).tolist()
    return len(rows) - rows.index(True) if any(rows) else 0


def _what(kind: Kind, moved: mx.array, size: tuple[int, ...]) -> _Columns:
    """Which columns make a kind of state, given where it moves with them."""
    some: Any = mx.any(moved, axis=0).tolist()
    columns, rows = {c for c, any_row in enumerate(some) if any_row}, _rows(moved)
    if kind.attention == "values":
        return _Columns(values=columns)
    if kind.attention != "keys" and rows <= PROBE_TOKENS // 2 and rows in size:
        return _Columns(last=columns, rows=rows)
    return _Columns(everywhere=columns)


def _random(seed: int, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    return (mx.random.normal(tuple(shape), key=mx.random.key(seed)) * 0.7).astype(dtype)


def _same(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and bool(mx.array_equal(a, b).item())
