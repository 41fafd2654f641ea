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
        kv = self._recording.split_kv(batch["kv"])
        return (
            {(k, 0): batch[f"layer_{k}"] for k in self.depths},
            {(i, part): kv[i][part] for i, part in self.target_widths},
            None,
        )


class Sums:
    """Moments of every feature array with its targets, side by side, so that a batch is one product of matrices.

    Products are taken in double precision on the host: beside the forward pass they are a few hundredths of the work
    (docs/making-pairs.md), and ridges can be small.

    Args:
        recorder: gives features and targets.
        targets: what each feature array is to predict.
        columns: of each target at most so many columns count, spread evenly (None: all).
    """

    def __init__(
        self, recorder: Recorder, targets: Mapping[Key, Sequence[Target]], columns: int | None = None
    ):
        self._recorder = recorder
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
        weigh = None if weights is None else np.array(weights, np.float64).reshape(-1)
        for key, wanted in self.targets.items():
            y = [_double(targets[t])[:, self._picked[t]] for t in wanted]
            x = _double(features[key])
            sums[key].add(x, np.concatenate(y, axis=1), weigh)
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


def _double(array: mx.array) -> np.ndarray:
    """`[B, L, width]` as `[B * L, width]` in double precision."""
    return np.array(array.astype(mx.float32)).reshape(-1, array.shape[-1]).astype(np.float64)


def _spread(width: int, most: int | None) -> Any:
    """Which columns count: an index that copies nothing if all do."""
    if most is None or width <= most:
        return slice(0, width)
    return np.linspace(0, width - 1, most).astype(int)
