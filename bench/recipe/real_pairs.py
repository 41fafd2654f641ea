"""The recipe of the pairs of real models: `make real-pairs BASE=... DATA=... HELD_OUT=...`.

Closed form, training as the cache is used, quantization, figures and card, for a base's own first layers at several
depths, or (`--auxiliary`) for a second model that reads.  Every step leaves a folder and is passed over if that is
there; sums, recordings and trainings go on where they were stopped.  The pairs are linked: megabytes beside models that
the user has.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import typer
from mlx.utils import tree_flatten

from kvpred_mlx.bench.common import command
from kvpred_mlx.console import numbers, progress_bar
from kvpred_mlx.errors import changes
from kvpred_mlx.files import write_file
from kvpred_mlx.making.as_used import as_used_trainer
from kvpred_mlx.making.card import CardFacts, write_card
from kvpred_mlx.making.data import PackedSequences, encode, read_documents
from kvpred_mlx.making.fit import fit, fit_first_layers
from kvpred_mlx.making.fresh_windows import FreshWindows
from kvpred_mlx.making.joint import restored_types
from kvpred_mlx.making.pairing import LoadedModel, check_same_tokenizer, join, join_first_layers, load_part
from kvpred_mlx.making.quality import measure
from kvpred_mlx.making.recording import Recording, record, write_json
from kvpred_mlx.making.reports import Report
from kvpred_mlx.making.settings import FitSettings, TrainingSettings
from kvpred_mlx.making.windows import Windows, cut_windows
from kvpred_mlx.pair import sources
from kvpred_mlx.pair.loading import save
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor
from kvpred_mlx.quantization import WEIGHT_BITS
from kvpred_mlx.taps.kv_taps import KVTaps

PROMPT, SCORED = 448, 64  # tokens of a window to train on
MEASURED = (448, 1984)  # tokens of a prompt, on the card
WINDOWS_OF_A_DOCUMENT = 64
Maps = Predictor | FirstLayersPredictor


def main(
    base: Annotated[str, typer.Option(help="Any mlx-lm model.")],
    data: Annotated[Path, typer.Option(help="Text to fit and to train on.")],
    held_out: Annotated[Path, typer.Option(help="Other text, to measure on.")],
    folder: Annotated[Path, typer.Option(help="Of all that is made.")] = Path("real-pairs"),
    depths: Annotated[str, typer.Option(help="How many layers read, 10,14: a pair each.")] = "10,14",
    auxiliary: Annotated[str | None, typer.Option(help="A second model that reads, instead.")] = None,
    source: Annotated[str, typer.Option(help="What is read of it.")] = FitSettings.source,
    name: Annotated[str, typer.Option(help="Of the pairs; the depth is added.")] = "pair",
    links: Annotated[
        str,
        typer.Option(help="Repositories to link to instead of the models' directories: BASE[,AUXILIARY]."),
    ] = "",
    tokens: Annotated[int, typer.Option(min=1024, help="Of the closed form.")] = 200_000,
    windows: Annotated[
        int, typer.Option(min=0, help="To record and train on; 0: all there are, recorded nowhere.")
    ] = 400,
    iters: Annotated[int, typer.Option(min=0, help="Training steps of each pair.")] = 400,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0)] = 3e-4,
    q_bits: Annotated[int, typer.Option(help="Of the predictors.")] = 4,
    measured: Annotated[
        tuple[int, int], typer.Option(help="Windows of the card's figures, of 448 tokens and of 1984.")
    ] = (24, 6),
    licence: Annotated[str | None, typer.Option(help="Of the pairs, for their cards.")] = None,
) -> None:
    """Make pairs of real models, text to card; run again, it goes on where it stopped."""
    if q_bits not in WEIGHT_BITS:
        raise typer.BadParameter(
            f"{q_bits}, expected one of {', '.join(map(str, WEIGHT_BITS))}", param_hint="--q-bits"
        )
    chosen = numbers("--depths", [depths], 1)
    check_same(folder, {k: v for k, v in locals().items() if k not in ("folder", "chosen")})
    recipe = RealPairs(load_part(base), folder, _named(links, 0), data)
    held = recipe.held_out(held_out, measured)
    pairs: dict[str, Callable[[], KVPredictionModel]]
    if auxiliary is None:
        recipe.fit(chosen, tokens)
        pairs = {f"{name}-{depth}": partial(recipe.at, depth) for depth in chosen}
    else:
        second = load_part(auxiliary)
        check_same_tokenizer(recipe.base, second)
        recipe.fit_two(second, source, tokens, _named(links, 1))
        pairs = {name: recipe.read_by_auxiliary}
    settings = TrainingSettings(
        max(1, iters), batch_size, learning_rate, warmup=min(20, iters // 5), weight_decay=0.0, save_every=50,
        steps_per_report=10,
    )  # fmt: skip
    for called, made in pairs.items():
        pair = made()
        if iters:
            recipe.train(called, pair, settings, windows)
        done = f"trained as the cache is used in {iters} steps of {batch_size} windows, " if iters else ""
        recipe.finish(called, pair, q_bits, held, f"{done}quantized to {q_bits} bits", licence)


def check_same(folder: Path, given: dict[str, Any]) -> None:
    """Note what a folder's results are made with, or make sure that it is the same.

    Raises:
        ValueError: they were made with something else, which is named.
    """
    now = {name: None if value is None else str(value) for name, value in given.items()}
    place = folder / "recipe.json"
    if place.exists():
        if differ := changes(json.loads(place.read_text(encoding="utf-8")), now):
            raise ValueError(
                f"{folder} was begun with {'; '.join(differ)}: give the same, or another --folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(place, now)


class RealPairs:
    """The steps of the recipe.

    Args:
        base: the model.
        folder: of all that is made.
        repository: what pairs link to (None: the base's directory).
        data: text to fit and to train on, encoded once: `tokens.npy`, and where each document ends in `ends.npy`.
    """

    def __init__(self, base: LoadedModel, folder: Path, repository: str | None, data: Path):
        self.base, self.folder = base, folder
        self._linked = dataclasses.replace(base, name=repository or base.name)
        self._names = [self._linked.name]
        if not (folder / "ends.npy").exists():
            folder.mkdir(parents=True, exist_ok=True)
            ids = encode(base.tokenizer, list(read_documents(data)))
            _write_npy(folder / "tokens.npy", np.concatenate(ids))
            _write_npy(folder / "ends.npy", np.cumsum([len(i) for i in ids]))
        tokens, ends = np.load(folder / "tokens.npy"), np.load(folder / "ends.npy")
        self._documents = np.split(tokens, ends[:-1])
        self._auxiliary: LoadedModel | None = None
        self.fitted: Maps
        self.taps = KVTaps(base.model)

    def fit(self, depths: list[int], tokens: int) -> None:
        """Maps from all depths in closed form, by one pass over the text."""
        out = self.folder / "fitted.safetensors"
        if not out.exists():
            with progress_bar("fitting") as progress:
                fitted = fit_first_layers(
                    self.taps, depths, self._packed(), FitSettings(tokens), progress, self.folder / "sums"
                )
            _write_weights(out, fitted.predictor)
        self.fitted = self._empty(depths)
        self.fitted.load_weights(str(out))

    def fit_two(self, auxiliary: LoadedModel, source: str, tokens: int, repository: str | None) -> None:
        """Maps from an auxiliary in closed form."""
        self._auxiliary = dataclasses.replace(auxiliary, name=repository or auxiliary.name)
        self._names.append(self._auxiliary.name)
        out = self.folder / "fitted.safetensors"
        if not out.exists():
            with progress_bar("fitting") as progress:
                fitted = fit(
                    self.taps, auxiliary.model, self._packed(), FitSettings(tokens, source=source), progress,
                    self.folder / "sums",
                )  # fmt: skip
            _write_weights(out, fitted.predictor)
        loaded: Any = mx.load(str(out), return_metadata=True)
        layer_map = [int(j) for j in loaded[1]["layer_map"].split(",")]
        widths = sources.feature_widths(source, KVTaps(auxiliary.model))
        self.fitted = Predictor(layer_map, widths, self.taps.widths, source)
        self.fitted.load_weights(str(out))

    def at(self, depth: int) -> KVPredictionModel:
        """The pair that reads with so many layers, as it was fitted."""
        assert isinstance(self.fitted, FirstLayersPredictor)
        predictor = self._empty([depth])
        maps: Any = tree_flatten(self.fitted.at(depth).parameters())
        predictor.at(depth).load_weights(maps)
        return join_first_layers(self._linked, predictor, linked=True)

    def read_by_auxiliary(self) -> KVPredictionModel:
        """The pair of two models, as it was fitted."""
        assert self._auxiliary is not None
        assert isinstance(self.fitted, Predictor)
        return join(self._linked, self._auxiliary, self.fitted, linked=True)

    def train(self, name: str, pair: KVPredictionModel, settings: TrainingSettings, windows: int) -> None:
        """Train a pair's maps as its cache is used."""
        out = self.folder / f"{name}.trained.safetensors"
        if not out.exists():
            data = self._recorded(windows) if windows else FreshWindows(pair, self._windows())
            with restored_types(pair):
                as_used_trainer(pair, data, settings, state_folder=self.folder / f"{name}.state").run(_tell)
            _write_weights(out, pair.predictor)
        pair.predictor.load_weights(str(out))

    def held_out(self, text: Path, windows: Sequence[int]) -> list[Windows]:
        """Windows of other text to measure on, for each of the lengths of `MEASURED`.

        Raises:
            ValueError: no document is long enough.
        """
        ids = encode(self.base.tokenizer, list(read_documents(text)))
        return [
            cut_windows(ids, tokens, SCORED, self.base.tokenizer, most, per_document=2)
            for tokens, most in zip(MEASURED, windows, strict=True)
        ]

    def finish(
        self,
        name: str,
        pair: KVPredictionModel,
        bits: int,
        held: list[Windows],
        how: str,
        licence: str | None,
    ) -> None:
        """Quantize a pair's predictor, measure it, write the card; the pair is complete or not there."""
        out = self.folder / name
        if out.exists():
            return
        nn.quantize(pair.predictor, 64, bits)
        mx.eval(pair.predictor.parameters())
        figures = [
            measure(pair, cut, batch_size=max(1, 3584 // cut.prompts.shape[1]), progress=_count)
            for cut in held
        ]
        read = (
            f"its first {pair.predictor.depths[0]} layers"
            if isinstance(pair.predictor, FirstLayersPredictor)
            else self._names[-1]
        )
        made = (
            f"Maps from {read} to the keys and values of {self._names[0]}, fitted in closed form, {how} "
            "(docs/real-pairs.md of kvpred-mlx)."
        )
        second = self._names[1] if len(self._names) > 1 else None
        facts = CardFacts(name, self._names[0], second, [made], licence)
        save(out, pair, extras=lambda directory: write_card(directory, facts, figures))

    def _recorded(self, windows: int) -> Recording:
        """Windows for all pairs of the recipe."""
        auxiliary = None if self._auxiliary is None else KVTaps(self._auxiliary.model)
        whole = KVPredictionModel(self.taps, auxiliary, self.fitted)
        return record(whole, self._windows(windows), self.folder / "recorded", progress=_count)

    def _empty(self, depths: list[int]) -> FirstLayersPredictor:
        return FirstLayersPredictor(depths, self.taps.input_widths, self.taps.widths)

    def _packed(self) -> PackedSequences:
        end = self.base.tokenizer.eos_token_id if self.base.tokenizer else None
        return PackedSequences.of([d.tolist() for d in self._documents], PROMPT + SCORED, end)

    def _windows(self, count: int | None = None) -> Windows:
        """Windows of the text in a random order; `count` of them, from as many documents as possible, or all."""
        long = [d for d in self._documents if len(d) >= PROMPT + SCORED]
        each = WINDOWS_OF_A_DOCUMENT if count is None else ceil(count / max(1, len(long)))
        cut = cut_windows(
            long or self._documents, PROMPT, SCORED, most=count or len(long) * each, per_document=each
        )
        return cut.take(np.random.default_rng(0).permutation(len(cut)))


def _write_npy(path: Path, array: np.ndarray) -> None:
    _write(path, lambda file: np.save(file, array.astype(np.int32)))


def _write_weights(path: Path, predictor: Maps) -> None:
    weights = dict(tree_flatten(predictor.parameters()))
    facts = {"layer_map": ",".join(map(str, predictor.layer_map))}
    _write(path, lambda file: mx.save_safetensors(file, weights, facts))


def _write(path: Path, make: Callable[[Any], object]) -> None:
    """As `write_file`, for what would add to a file's name."""

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            make(file)

    write_file(path, write)


def _named(links: str, place: int) -> str | None:
    """One of the repositories of `--links`, if it is there."""
    names = links.split(",") if links else []
    return names[place] if place < len(names) else None


def _count(done: int, total: int, what: str | None = None) -> None:
    print(f"{what or 'measuring'}: {done} of {total} windows", flush=True)


def _tell(report: Report) -> None:
    terms = ", ".join(f"{name} {value:.4f}" for name, value in report.terms.items())
    print(
        f"step {report.step}: {terms}, {report.tokens_per_second:.0f} tokens/s, {report.seconds_left:.0f} s left",
        flush=True,
    )


if __name__ == "__main__":
    command.run(main)
