"""A predictor in closed form: ridge regression of the base's keys and values on what is read of a prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kvpred_mlx.files import new_directory
from kvpred_mlx.making import layer_maps
from kvpred_mlx.making.data import PackedSequences
from kvpred_mlx.making.moments import Ridge, explained_variance
from kvpred_mlx.making.recording import Recording
from kvpred_mlx.making.regression import FirstLayers, Key, Maps, RecordedFirstLayers, Sums, Target, TwoModels
from kvpred_mlx.making.settings import FitSettings
from kvpred_mlx.pair.description import norms_checksum
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor
from kvpred_mlx.progress import ProgressCallback, no_progress
from kvpred_mlx.taps.kv_taps import KVTaps

RIDGES = tuple(10.0**e for e in (-9, -7, -6, -5, -4, -3, -2, -1, 0))
HELD_OUT_BATCHES = 10  # one batch in so many chooses ridges
SELECTION_SHARE = 0.1  # of the batches choose the layer map, and are read again afterwards
SELECTION_COLUMNS = 64  # of each layer's keys and values are looked at for that
SAVE_SECONDS = 60.0
PARTS = ("keys", "values")
P = TypeVar("P", Predictor, FirstLayersPredictor)


@dataclass(frozen=True)
class Fit(Generic[P]):
    """A fitted predictor.

    Args:
        predictor: ready to be joined with its models.
        tokens: how many were read.
        explained_variance: of the held-out batches, for `keys` and `values` of each base layer; 1 where the base
            computes them itself.  With several depths, at the greatest.
        ridges: that were chosen, likewise; 0 there.
    """

    predictor: P
    tokens: int
    explained_variance: dict[str, list[float]] = field(default_factory=dict)
    ridges: dict[str, list[float]] = field(default_factory=dict)


def fit(
    base: nn.Module | KVTaps,
    auxiliary: nn.Module | KVTaps,
    data: PackedSequences,
    settings: FitSettings,
    progress: ProgressCallback = no_progress,
    folder: Path | None = None,
) -> Fit[Predictor]:
    """Fit the predictor of two models in one pass over the data, and a short one before it if the layer map is auto.

    Args:
        data: packed sequences, of which `settings.tokens` are read in an order that depends on the seed.
        progress: called with the number of batches done and their total.
        folder: where the sums so far are saved now and then; what is there is gone on from.

    Raises:
        UnsupportedModelError: one of the models cannot be tapped.
        ValueError: the layer map is none of these models, there are fewer than two batches of data, or `folder` holds
            the sums of another fit.
    """
    recorder = TwoModels(_taps(base), _taps(auxiliary), settings.source, settings.weighted)
    run = _Run((recorder.base.model, recorder.auxiliary.model), data, settings, progress, folder)
    n, m = len(recorder.base), len(recorder.auxiliary)
    layer_map = layer_maps.parse(settings.layer_map, n, m)
    if layer_map is None:
        layer_map = _select(recorder, layer_maps.candidates(n, m), run)
    targets: dict[Key, list[Target]] = {}
    for i, j in enumerate(layer_map):
        for part in range(2):
            targets.setdefault(recorder.key(j, part), []).append((i, part))
    sums = Sums(recorder, targets)
    run.read(sums, "fitting")
    solved = _Solution(sums, settings.ridge)
    return solved.fit(recorder.predictor(layer_map, solved.maps), n)


def fit_first_layers(
    base: nn.Module | KVTaps,
    depths: Sequence[int],
    data: PackedSequences,
    settings: FitSettings,
    progress: ProgressCallback = no_progress,
    folder: Path | None = None,
) -> Fit[FirstLayersPredictor]:
    """Fit maps from what a base's own layers at `depths` read to the keys and values behind them, in one pass.

    Arguments and errors as those of `fit`; `settings.source` and `settings.layer_map` have no meaning here.
    """
    recorder = FirstLayers(_taps(base), depths, settings.weighted)
    sums = Sums(recorder, {(k, 0): recorder.targets_of(k) for k in depths})
    _Run((recorder.base.model,), data, settings, progress, folder).read(sums, "fitting")
    solved = _Solution(sums, settings.ridge)
    return solved.fit(recorder.predictor(solved.maps), len(recorder.base))


def fit_recorded(
    base: KVTaps,
    depths: Sequence[int],
    recording: Recording,
    windows: Sequence[int],
    ridge: float | None = None,
    progress: ProgressCallback = no_progress,
) -> Iterator[Fit[FirstLayersPredictor]]:
    """As `fit_first_layers` from recorded windows: a fit for each number of windows in `windows`, ascending."""
    recorder = RecordedFirstLayers(base, depths, recording)
    sums = Sums(recorder, {(k, 0): recorder.targets_of(k) for k in depths})
    for i in range(max(windows)):
        sums.read(recording.rows([i]), held_out=i % HELD_OUT_BATCHES == 1)
        progress(i + 1, max(windows), "summing up")
        if i + 1 in windows:
            solved = _Solution(sums, ridge)
            yield solved.fit(FirstLayers(base, depths).predictor(solved.maps), len(base))


def _taps(model: nn.Module | KVTaps) -> KVTaps:
    return model if isinstance(model, KVTaps) else KVTaps(model)


def _select(recorder: TwoModels, candidates: list[list[int]], run: _Run) -> list[int]:
    """For each base layer the candidate that explains it best on held-out batches, by some columns of some batches."""
    targets: dict[Key, list[Target]] = {}
    for i, layers in enumerate(candidates):
        for j in layers:
            for part in range(2):
                targets.setdefault(recorder.key(j, part), []).append((i, part))
    sums = Sums(recorder, targets, SELECTION_COLUMNS)
    run.read(sums, "choosing the layer map", batches=max(2, round(run.batches * SELECTION_SHARE)))
    solved = _Solution(sums, run.settings.ridge)

    def explained(i: int, j: int) -> float:
        return sum(solved.variances[recorder.key(j, part), (i, part)] for part in range(2))

    return [max(layers, key=lambda j, i=i: explained(i, j)) for i, layers in enumerate(candidates)]  # type: ignore[misc]


class _Run:
    """Batches by number, progress, and sums that are saved now and then."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        data: PackedSequences,
        settings: FitSettings,
        progress: ProgressCallback,
        folder: Path | None,
    ):
        if len(data) < 2:
            raise ValueError("the data has 1 sequence, expected at least 2: one to fit and one to hold out")
        self.settings, self._data, self._progress, self._folder = settings, data, progress, folder
        self._models = [] if folder is None else [norms_checksum(model) for model in models]
        self._size = min(settings.batch_size, len(data) // 2)
        length = data.rows.shape[1] - 1
        self.batches = max(2, min(settings.tokens // length, len(data)) // self._size)

    def read(self, sums: Sums, what: str, batches: int | None = None) -> None:
        """Add so many batches (default: all); every tenth one, and one at least, is held out."""
        total = self.batches if batches is None else min(batches, self.batches)
        place = None if self._folder is None else self._folder / what.replace(" ", "-")
        begin, saved = self._resume(sums, place), time.monotonic()
        try:
            for i in range(begin, total):
                self._progress(i, total, what)
                batch = self._data.batch(i, self._size, self.settings.seed)[:, :-1]
                sums.read(batch, held_out=i % HELD_OUT_BATCHES == 1)
                begin = i + 1
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save(sums, place, begin)
                    saved = time.monotonic()
        finally:  # an interruption, too: at most the batch under way is lost
            self._save(sums, place, begin)
        self._progress(total, total, what)

    def _identity(self, sums: Sums) -> dict[str, object]:
        places = [[*key, *map(list, targets)] for key, targets in sums.targets.items()]
        return {
            "models": self._models,
            "data": self._data.checksum(),
            "settings": asdict(self.settings),
            "targets": json.dumps(places),
        }

    def _save(self, sums: Sums, place: Path | None, done: int) -> None:
        if place is None:
            return
        with new_directory(place, overwrite=True) as directory:
            np.savez(directory / "sums.npz", **sums.state())  # type: ignore[arg-type]
            (directory / "config.json").write_text(json.dumps({"batches": done, **self._identity(sums)}))

    def _resume(self, sums: Sums, place: Path | None) -> int:
        if place is None or not place.is_dir():
            return 0
        facts = json.loads((place / "config.json").read_text())
        identity = self._identity(sums)
        differ = [k for k in identity if facts.get(k) != identity[k]]
        if differ:
            raise ValueError(f"{place} holds the sums of a fit with other {' and '.join(differ)}: remove it")
        with np.load(place / "sums.npz") as state:
            sums.load(state)
        return int(facts["batches"])


class _Solution:
    """Ridges chosen on the held-out batches, maps fitted on all."""

    def __init__(self, sums: Sums, ridge: float | None):
        self.maps: Maps = {}
        self.variances: dict[tuple[Key, Target], float] = {}
        self._ridges: dict[tuple[Key, Target], float] = {}
        self._tokens = sums.tokens
        tried = RIDGES if ridge is None else (ridge,)
        for key, places in sums.places.items():
            held_out = sums.held_out[key]
            errors = Ridge(sums.fitted[key]).squared_errors(held_out, tried)
            deviations = held_out.deviations()
            ridges = np.zeros(len(deviations))
            for target, columns in places.items():
                explained = [explained_variance(e[columns], deviations[columns]) for e in errors]
                best = max(zip(explained, tried, strict=True)) if ridges[columns].size else (0.0, 0.0)
                self.variances[key, target], self._ridges[key, target] = best
                ridges[columns] = best[1]
            weight, bias = Ridge(sums.whole(key)).solve(ridges)
            for target, columns in places.items():
                self.maps[key, target] = (
                    mx.array(weight[columns], mx.float32),
                    mx.array(bias[columns], mx.float32),
                )

    def fit(self, predictor: P, layers: int) -> Fit[P]:
        """What is known of a predictor that was made of the maps."""

        def by_layer(values: dict[tuple[Key, Target], float], own: float) -> dict[str, list[float]]:
            last = {target: value for (_, target), value in values.items()}  # the greatest depth comes last
            return {
                name: [last.get((i, part), own) for i in range(layers)] for part, name in enumerate(PARTS)
            }

        return Fit(predictor, self._tokens, by_layer(self.variances, 1.0), by_layer(self._ridges, 0.0))
