"""What a fit regresses on what: features and targets of one forward pass, and their sums of products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from kvpred_mlx.making.attention_weights import AttentionWeights
from kvpred_mlx.making.moments import Moments
from kvpred_mlx.making.recording import Recording
from kvpred_mlx.pair import sources
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor
from kvpred_mlx.scans.when import on_cpu
from kvpred_mlx.taps.kv_taps import KVTaps

Target = tuple[int, int]  # a base layer, and 0 for its keys or 1 for its values
Key = tuple[int, int]  # a layer that is read, and which of its feature arrays
Recorded = tuple[dict[Key, mx.array], dict[Target, mx.array], mx.array | None]
Maps = dict[tuple[Key, Target], tuple[mx.array, mx.array]]  # weight and bias


class Recorder(Protocol):
    """A forward pass that gives features and targets."""

    @property
    def widths(self) -> Mapping[Key, int]:
        """Of every feature array."""
        ...

    @property
    def target_widths(self) -> Mapping[Target, int]:
        """Of every target."""
        ...

    def record(self, batch: Any) -> Recorded:
        """Features and targets of a batch (tokens [B, L], or windows of a recording), `[B, L, width]` each, and the
        tokens' weights [B, L] (None: all alike), lazy."""
        ...


class TwoModels:
    """The base's raw keys and values on what a source gives of the auxiliary.

    Args:
        base, auxiliary: taps of the models.
        source: one of `kvpred_mlx.pair.sources.SOURCES`.
        weighted: tokens count by the attention that the base pays to them.
    """

    def __init__(self, base: KVTaps, auxiliary: KVTaps, source: str, weighted: bool = False):
        self.base, self.auxiliary, self.source = base, auxiliary, source
        self._weights = AttentionWeights(base, weighted)
        self.feature_widths = sources.feature_widths(source, auxiliary)
        arrays = 2 if source == "kv" else 1
        self.widths = {(j, a): w[a] for j, w in enumerate(self.feature_widths) for a in range(arrays)}
        self.target_widths = {(i, part): w for i, ws in enumerate(base.widths) for part, w in enumerate(ws)}

    def record(self, tokens: mx.array) -> Recorded:
        features, _ = sources.record(self.source, self.auxiliary, tokens)
        raw, weights = self._weights.record(tokens)
        return (
            {(j, a): array for j, layer in enumerate(features) for a, array in enumerate(layer)},
            {(i, part): array for i, layer in enumerate(raw) for part, array in enumerate(layer)},
            weights,
        )

    def key(self, layer: int, part: int) -> Key:
        """Where `part` of a base layer finds its features: only the source kv has an array for each part."""
        return layer, part if self.source == "kv" else 0

    def predictor(self, layer_map: Sequence[int], maps: Maps) -> Predictor:
        """The predictor of fitted maps."""
        predictor = Predictor(layer_map, self.feature_widths, self.base.widths, self.source)
        predictor.load_maps(
            *([maps[self.key(j, part), (i, part)] for i, j in enumerate(layer_map)] for part in range(2))
        )
        mx.eval(predictor.parameters())
        return predictor


class FirstLayers:
    """The base's raw keys and values behind each depth on what the layer at that depth reads.

    Args:
        base: its taps.
        depths: how many layers are run, ascending.
        weighted: see `TwoModels`.
    """

    def __init__(self, base: KVTaps, depths: Sequence[int], weighted: bool = False):
        self.base, self.depths = base, list(depths)
        self._weights = AttentionWeights(base, weighted)
        self._empty = FirstLayersPredictor(depths, base.input_widths, base.widths)
        self.widths = {(k, 0): base.input_widths[k] for k in depths}
        self.target_widths = {
            (i, part): w for i, ws in enumerate(base.widths) if i > min(depths) for part, w in enumerate(ws)
        }

    def record(self, tokens: mx.array) -> Recorded:
        inputs: list[mx.array] = []
        raw, weights = self._weights.record(tokens, inputs=inputs)
        return (
            {(k, 0): inputs[k] for k in self.depths},
            {(i, part): raw[i][part] for i, part in self.target_widths},
            weights,
        )

    def targets_of(self, depth: int) -> list[Target]:
        """The targets behind a depth."""
        return [target for target in self.target_widths if target[0] > depth]

    def predictor(self, maps: Maps) -> FirstLayersPredictor:
        """The predictor of fitted maps."""
        for k in self.depths:
            behind = range(k + 1, len(self.base))
            self._empty.at(k).load_maps(*([maps[(k, 0), (i, part)] for i in behind] for part in range(2)))
        mx.eval(self._empty.parameters())
        return self._empty


class RecordedFirstLayers(FirstLayers):
    """The same from windows that were recorded before (`kvpred_mlx.making.recording`)."""

    def __init__(self, base: KVTaps, depths: Sequence[int], recording: Recording):
        super().__init__(base, depths)
        self._recording = recording

    def record(self, batch: Any) -> Recorded:
        kv = self._recording.layout.split_kv(batch["kv"])
        return (
            {(k, 0): batch[f"layer_{k}"] for k in self.depths},
            {(i, part): kv[i][part] for i, part in self.target_widths},
            None,
        )


class Sums:
    """Moments of every feature array with its targets, side by side, so that a batch is one product of matrices.

    Beside MLX's CPU backend products are taken in double precision on the host: they are a few hundredths of the
    forward pass there (docs/making-pairs.md), and ridges can be small.  A GPU's forward pass is done before its host's
    products: there they are taken on the device, a batch at a time in float32, and added up in double precision.

    Args:
        recorder: gives features and targets.
        targets: what each feature array is to predict.
        columns: of each target at most so many columns count, spread evenly (None: all).
        on_host: where products are taken (None: as the device suggests).
    """

    def __init__(
        self,
        recorder: Recorder,
        targets: Mapping[Key, Sequence[Target]],
        columns: int | None = None,
        *,
        on_host: bool | None = None,
    ):
        self._recorder, self._on_host = recorder, on_cpu() if on_host is None else on_host
        self.targets = {key: list(wanted) for key, wanted in targets.items()}
        widths = recorder.target_widths
        self._picked = {t: _spread(w, columns) for t, w in widths.items()}
        self._counted = {t: w if columns is None else min(w, columns) for t, w in widths.items()}
        self.places: dict[Key, dict[Target, slice]] = {}
        for key, wanted in self.targets.items():
            ends = np.cumsum([0, *(self._counted[t] for t in wanted)])
            self.places[key] = {
                t: slice(int(a), int(b)) for t, (a, b) in zip(wanted, pairwise(ends), strict=True)
            }
        self.fitted, self.held_out = (self._zeros() for _ in range(2))
        self.tokens = 0

    def read(self, batch: Any, *, held_out: bool) -> None:
        """Add a batch, as the recorder takes it."""
        features, targets, weights = self._recorder.record(batch)
        sums = self.held_out if held_out else self.fitted
        mx.eval([features[key] for key in self.targets], list(targets.values()), weights)
        weigh = None if weights is None else weights.astype(mx.float32).reshape(-1)
        for key, wanted in self.targets.items():
            y = mx.concatenate([_rows(targets[t])[:, self._picked[t]] for t in wanted], axis=1)
            x = _rows(features[key])
            if self._on_host:
                sums[key].add(_double(x), _double(y), None if weigh is None else _double(weigh))
            else:
                sums[key].merge(moments_of(x, y, weigh))
        self.tokens += len(x)

    def whole(self, key: Key) -> Moments:
        """Of all batches."""
        return self.fitted[key] + self.held_out[key]

    def state(self) -> dict[str, np.ndarray]:
        """All sums as arrays by name, to be saved."""
        state = {"tokens": np.array(self.tokens)}
        for name, part in (("fitted", self.fitted), ("held_out", self.held_out)):
            for (layer, array), moments in part.items():
                state |= {f"{name}.{layer}.{array}.{k}": np.asarray(v) for k, v in vars(moments).items()}
        return state

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a saved `state`."""
        self.tokens = int(state["tokens"])
        for name, part in (("fitted", self.fitted), ("held_out", self.held_out)):
            for (layer, array), moments in part.items():
                for k in vars(moments):
                    value = state[f"{name}.{layer}.{array}.{k}"]
                    setattr(moments, k, float(value) if k == "n" else value)

    def _zeros(self) -> dict[Key, Moments]:
        return {
            key: Moments.zeros(self._recorder.widths[key], max((s.stop for s in places.values()), default=0))
            for key, places in self.places.items()
        }


def moments_of(x: mx.array, y: mx.array, weights: mx.array | None) -> Moments:
    """Of samples `x` [T, a] and `y` [T, b], on the device in float32; `weights` [T] instead of 1 each.

    Products are those of deviations from means near their own, which are then put back in double precision: features
    and targets may be far larger than they vary.
    """
    w = mx.ones(len(x)) if weights is None else weights
    n = w.sum()
    mean_x, mean_y = w @ x / n, w @ y / n
    x, y = x - mean_x, y - mean_y
    wx, wy = x * w[:, None], y * w[:, None]
    sums = [n, mean_x, mean_y, wx.sum(0), wy.sum(0), wx.T @ x, wx.T @ y, (wy * y).sum(0)]
    mx.eval(sums)
    total, m_x, m_y, d_x, d_y, xx, xy, yy = (np.array(array).astype(np.float64) for array in sums)
    xx += np.outer(m_x, d_x) + np.outer(d_x, m_x) + total * np.outer(m_x, m_x)
    xy += np.outer(m_x, d_y) + np.outer(d_x, m_y) + total * np.outer(m_x, m_y)
    yy += 2 * m_y * d_y + total * m_y**2
    return Moments(float(total), d_x + total * m_x, d_y + total * m_y, xx, xy, yy)


def _rows(array: mx.array) -> mx.array:
    """`[B, L, width]` as `[B * L, width]`."""
    return array.astype(mx.float32).flatten(0, -2)  # reshape takes no -1 where there are no columns


def _double(array: mx.array) -> np.ndarray:
    return np.array(array).astype(np.float64)


def _spread(width: int, most: int | None) -> Any:
    """Which columns count: an index that copies nothing if all do."""
    if most is None or width <= most:
        return slice(0, width)
    return mx.array(np.linspace(0, width - 1, most).astype(int))
