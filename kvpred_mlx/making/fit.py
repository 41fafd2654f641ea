"""A predictor in closed form: ridge regression of the base's keys and values on what is read of the auxiliary."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kvpred_mlx.making import layer_maps
from kvpred_mlx.making.data import PackedSequences
from kvpred_mlx.making.moments import Moments, Ridge
from kvpred_mlx.making.settings import FitSettings
from kvpred_mlx.pair import sources
from kvpred_mlx.pair.predictor import Predictor
from kvpred_mlx.progress import ProgressCallback, no_progress
from kvpred_mlx.taps.kv_taps import KVTaps

RIDGES = tuple(10.0**e for e in (-9, -7, -6, -5, -4, -3, -2, -1, 0))
HELD_OUT_BATCHES = 10  # one batch in so many chooses ridge and layer map
PARTS = ("keys", "values")


@dataclass(frozen=True)
class Fit:
    """A fitted predictor.

    Args:
        predictor: ready to be joined with the two models.
        tokens: how many were read.
        explained_variance: of the held-out batches, for `keys` and `values` of each base layer.
        ridges: that were chosen, likewise.
    """

    predictor: Predictor
    tokens: int
    explained_variance: dict[str, list[float]] = field(default_factory=dict)
    ridges: dict[str, list[float]] = field(default_factory=dict)


def fit(
    base: nn.Module,
    auxiliary: nn.Module,
    data: PackedSequences,
    settings: FitSettings,
    progress: ProgressCallback = no_progress,
) -> Fit:
    """Fit a predictor in one pass over the data.

    Args:
        data: packed sequences, of which `settings.tokens` are read in an order that depends on the seed.
        progress: called with the number of batches done and their total.

    Raises:
        UnsupportedModelError: one of the models cannot be tapped.
        ValueError: the layer map is none of these models, or there are fewer than two batches of data.
    """
    if len(data) < 2:
        raise ValueError("the data has 1 sequence, expected at least 2: one to fit and one to hold out")
    sums = _Sums(KVTaps(base), KVTaps(auxiliary), settings)
    length = data.rows.shape[1] - 1
    size = min(settings.batch_size, len(data) // 2)
    batches = max(2, min(settings.tokens // length, len(data)) // size)
    for i in range(batches):
        sums.read(data.batch(i, size, settings.seed)[:, :-1], held_out=i % HELD_OUT_BATCHES == 1)
        progress(i + 1, batches)
    return sums.solve()


Target = tuple[int, int]  # a base layer, and 0 for its keys or 1 for its values
Key = tuple[int, int]  # an auxiliary layer, and which of its feature arrays


class _Sums:
    """The moments of every base layer's keys and values with every candidate's features.

    All that may be predicted from one feature array stand side by side as its targets, so that a batch is one
    product of matrices.
    """

    def __init__(self, base: KVTaps, auxiliary: KVTaps, settings: FitSettings):
        self._base, self._auxiliary, self._settings = base, auxiliary, settings
        n, m = len(base), len(auxiliary)
        given = layer_maps.parse(settings.layer_map, n, m)
        self._candidates = layer_maps.candidates(n, m) if given is None else [[j] for j in given]
        self._widths = sources.feature_widths(settings.source, auxiliary)
        self._columns: dict[Key, dict[Target, slice]] = {}
        for i, candidates in enumerate(self._candidates):
            for j in candidates:
                for part, width in enumerate(base.widths[i]):
                    columns = self._columns.setdefault(self._key(j, part), {})
                    start = max((c.stop for c in columns.values()), default=0)
                    columns[i, part] = slice(start, start + width)
        self._fitted, self._held_out = (self._zeros() for _ in range(2))
        self._tokens = 0

    def read(self, tokens: mx.array, held_out: bool) -> None:
        """Add a batch `[B, L]`."""
        features, _ = sources.record(self._settings.source, self._auxiliary, tokens)
        raw, _ = self._base.record(tokens)
        mx.eval([features[j] for j, _ in self._columns], raw)
        self._tokens += tokens.size
        targets = {
            (i, part): _double(array) for i, layer in enumerate(raw) for part, array in enumerate(layer)
        }
        sums = self._held_out if held_out else self._fitted
        for (j, array), columns in self._columns.items():
            sums[j, array].add(
                _double(features[j][array]), np.concatenate([targets[t] for t in columns], axis=1)
            )

    def solve(self) -> Fit:
        """Choose layer map and ridges on the held-out batches, then fit on all."""
        solvers = {key: Ridge(moments) for key, moments in self._fitted.items()}
        tried = [{j: self._tried(solvers, i, j) for j in c} for i, c in enumerate(self._candidates)]
        layer_map = [max(t, key=lambda j: sum(v for v, _ in t[j])) for t in tried]
        chosen = [t[j] for t, j in zip(tried, layer_map, strict=True)]
        maps = self._maps(layer_map, [[ridge for _, ridge in parts] for parts in chosen])
        predictor = Predictor(layer_map, self._widths, self._base.widths, self._settings.source)
        predictor.load_maps(*maps)
        mx.eval(predictor.parameters())
        variances, ridges = (
            {name: [parts[part][k] for parts in chosen] for part, name in enumerate(PARTS)} for k in range(2)
        )
        return Fit(predictor, self._tokens, variances, ridges)

    def _tried(self, solvers: dict[Key, Ridge], i: int, j: int) -> list[tuple[float, float]]:
        """Base layer `i` from auxiliary layer `j`: the best held-out explained variance and its ridge, for each part."""
        ridges = RIDGES if self._settings.ridge is None else (self._settings.ridge,)
        best = []
        for part in range(2):
            key = self._key(j, part)
            fitted, held_out = (
                s[key].of_targets(self._columns[key][i, part]) for s in (self._fitted, self._held_out)
            )
            best.append(max((held_out.explained_variance(solvers[key].solve(fitted, r)), r) for r in ridges))
        return best

    def _maps(self, layer_map: list[int], ridges: list[list[float]]) -> list[list[tuple[mx.array, mx.array]]]:
        """Keys' and values' maps of all base layers, fitted on all batches."""
        whole = {key: self._fitted[key] + self._held_out[key] for key in self._columns if key[0] in layer_map}
        solvers = {key: Ridge(moments) for key, moments in whole.items()}
        maps: list[list[tuple[mx.array, mx.array]]] = [[], []]
        for i, j in enumerate(layer_map):
            for part in range(2):
                key = self._key(j, part)
                moments = whole[key].of_targets(self._columns[key][i, part])
                weight, bias = solvers[key].solve(moments, ridges[i][part])
                maps[part].append((mx.array(weight, mx.float32), mx.array(bias, mx.float32)))
        return maps

    def _key(self, layer: int, part: int) -> Key:
        """Where `part` of a base layer finds its features: only the source kv has an array for each part."""
        return layer, part if self._settings.source == "kv" else 0

    def _zeros(self) -> dict[Key, Moments]:
        return {
            (j, array): Moments.zeros(self._widths[j][array], max(c.stop for c in columns.values()))
            for (j, array), columns in self._columns.items()
        }


def _double(array: mx.array) -> np.ndarray:
    """`[B, L, width]` as `[B * L, width]` in double precision."""
    return np.array(array.astype(mx.float32)).reshape(-1, array.shape[-1]).astype(np.float64)
