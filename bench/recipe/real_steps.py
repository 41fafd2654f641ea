"""The steps of the recipe of real pairs: each leaves a file, and is passed over if that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.recipe.bodies import write_bodies
from kvpred_mlx.bench.recipe.requests import documented_functions
from kvpred_mlx.console import progress_bar
from kvpred_mlx.files import write_file
from kvpred_mlx.making.as_used import as_used_trainer
from kvpred_mlx.making.card import CardFacts, write_card
from kvpred_mlx.making.data import PackedSequences, encode, read_documents
from kvpred_mlx.making.fit import fit, fit_first_layers
from kvpred_mlx.making.fresh_windows import FreshWindows
from kvpred_mlx.making.in_turn import InTurn
from kvpred_mlx.making.joint import joint_trainer, restored_types
from kvpred_mlx.making.pairing import LoadedModel, join, join_first_layers
from kvpred_mlx.making.quality import measure
from kvpred_mlx.making.recording import Recording, record
from kvpred_mlx.making.settings import FitSettings, TrainingSettings
from kvpred_mlx.making.windows import Windows, cut_windows
from kvpred_mlx.pair import sources
from kvpred_mlx.pair.loading import own_auxiliary, save
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor
from kvpred_mlx.taps.kv_taps import KVTaps

PROMPT, SCORED = 448, 64  # tokens of a row that the closed form sums up, and of a window's answer
MEASURED = (448, 1984)  # tokens of a prompt, on the card
WINDOWS_OF_A_DOCUMENT = 64
Maps = Predictor | FirstLayersPredictor


def is_encoded(folder: Path) -> bool:
    """Whether the text of a recipe's folder is token ids already, and is not read again."""
    return (folder / "ends.npy").exists()


class RealPairs:
    """The steps of the recipe.

    Args:
        base: the model.
        folder: of all that is made.
        repository: what pairs link to (None: the base's directory).
        texts: to fit and to train on, encoded once: `tokens.npy`, and where each document ends in `ends.npy`.
    """

    def __init__(self, base: LoadedModel, folder: Path, repository: str | None, texts: Sequence[Path]):
        self.base, self.folder = base, folder
        self._linked = dataclasses.replace(base, name=repository or base.name)
        self._names = [self._linked.name]
        if not is_encoded(folder):
            folder.mkdir(parents=True, exist_ok=True)
            documents = [d for path in texts for d in read_documents(path, tokenizer=base.tokenizer)]
            ids = encode(base.tokenizer, documents)
            _write_npy(folder / "tokens.npy", np.concatenate(ids))
            _write_npy(folder / "ends.npy", np.cumsum([len(i) for i in ids]))
        tokens, ends = np.load(folder / "tokens.npy"), np.load(folder / "ends.npy")
        self._documents = np.split(tokens, ends[:-1])
        self._auxiliary: LoadedModel | None = None
        self.fitted: Maps
        self.taps = KVTaps(base.model)

    def check_long_enough(self, prompt_tokens: int) -> None:
        """Raise ValueError if no document has a window with a prompt of so many tokens."""
        self._windows(prompt_tokens, 1)

    def write_bodies(self, prompt_lens: Sequence[int], count: int) -> dict[int, int]:
        """Let the base write the bodies of at most `count` functions of the text for each length of prompt.

        Returns how many there are of each length.

        Raises:
            ValueError: there is no function, or none with so much before its body.
        """
        places = {n: self._bodies_file(n, count) for n in prompt_lens}
        if wanted := [n for n, place in places.items() if not place.exists()]:
            assert self.base.tokenizer is not None
            texts = map(self.base.tokenizer.decode, self._documents)
            befores = [function["before"] for function in documented_functions(texts)]
            for n in wanted:
                with progress_bar("writing") as progress:
                    _write_npy(
                        places[n], write_bodies(self.base, befores, n, SCORED, count, progress, seed=n)
                    )
        return {n: len(np.load(place)) for n, place in places.items()}

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

    def train_jointly(self, name: str, pair: KVPredictionModel, settings: TrainingSettings) -> None:
        """Train a pair of two models as the paper does; its auxiliary becomes its own, beside the linked base."""
        out = self.folder / f"{name}.joint.safetensors"
        own_auxiliary(pair)
        trained = {"auxiliary": pair.auxiliary_model, "predictor": pair.predictor}
        if not out.exists():
            states = self.folder / f"{name}.joint.state"
            with restored_types(pair):
                joint_trainer(pair, self._packed(), settings, state_folder=states).run(command.tell)
            weights: Any = {role: module.parameters() for role, module in trained.items()}
            _write(out, lambda file: mx.save_safetensors(file, dict(tree_flatten(weights))))
        loaded: Any = tree_unflatten(list(mx.load(str(out)).items()))  # type: ignore[union-attr]
        for role, module in trained.items():
            module.update(loaded[role])

    def train(
        self,
        name: str,
        pair: KVPredictionModel,
        settings: TrainingSettings,
        windows: int,
        prompt_lens: Sequence[int],
        bodies: int,
    ) -> None:
        """Train a pair's maps as its cache is used.

        Args:
            windows: of each length of prompt (0: all).
            bodies: the count of `write_bodies`, whose windows are read as well (0: none are).
        """
        out = self.folder / f"{name}.trained.safetensors"
        if not out.exists():
            cut = {str(n): self._windows(n, windows or None) for n in prompt_lens}
            cut |= {f"bodies-{n}": self._bodies(n, bodies) for n in prompt_lens if bodies}
            data = InTurn(
                [
                    self._recorded(pair, what, found) if windows else FreshWindows(pair, found)
                    for what, found in cut.items()
                ]
            )
            with restored_types(pair):
                as_used_trainer(pair, data, settings, state_folder=self.folder / f"{name}.state").run(
                    command.tell
                )
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
        figures = [measure(pair, cut, progress=_count) for cut in held]
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

    def _recorded(self, pair: KVPredictionModel, what: str, windows: Windows) -> Recording:
        """Windows for a pair of two models, or for the first layers of all depths."""
        whole = KVPredictionModel(self.taps, None, self.fitted) if pair.auxiliary is None else pair
        return record(whole, windows, self.folder / f"recorded-{what}", progress=_count)

    def _bodies(self, prompt: int, count: int) -> Windows:
        rows = np.load(self._bodies_file(prompt, count))
        return Windows.of(rows[:, :prompt], rows[:, prompt:])

    def _bodies_file(self, prompt: int, count: int) -> Path:
        return self.folder / f"bodies-{prompt}-{count}.npy"

    def _empty(self, depths: list[int]) -> FirstLayersPredictor:
        return FirstLayersPredictor(depths, self.taps.input_widths, self.taps.widths)

    def _packed(self) -> PackedSequences:
        end = self.base.tokenizer.eos_token_id if self.base.tokenizer else None
        return PackedSequences.of([d.tolist() for d in self._documents], PROMPT + SCORED, end)

    def _windows(self, prompt: int, count: int | None = None) -> Windows:
        """Windows of the text in a random order; `count` of them, from as many documents as possible, or all."""
        long = [d for d in self._documents if len(d) >= prompt + SCORED]
        each = WINDOWS_OF_A_DOCUMENT if count is None else ceil(count / max(1, len(long)))
        cut = cut_windows(
            long or self._documents, prompt, SCORED, most=count or len(long) * each, per_document=each
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


def _count(done: int, total: int, what: str | None = None) -> None:
    print(f"{what or 'measuring'}: {done} of {total} windows", flush=True)
