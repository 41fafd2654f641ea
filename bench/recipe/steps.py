"""The steps of the recipe: each leaves a file or a folder, and is passed over if that is there."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np

from kvpred_mlx.bench.recipe import corpus, plan
from kvpred_mlx.bench.recipe.pretrain import Budget, pretrain, run
from kvpred_mlx.convert.tokenizer import convert_sentencepiece
from kvpred_mlx.files import new_directory
from kvpred_mlx.making.card import CardFacts, write_card
from kvpred_mlx.making.data import PackedSequences, encode
from kvpred_mlx.making.fit import fit, fit_first_layers
from kvpred_mlx.making.joint import default_dtype, joint_trainer, restored_types
from kvpred_mlx.making.loop import Trainer
from kvpred_mlx.making.pairing import join, join_first_layers, load_part
from kvpred_mlx.making.quality import SCORE_TOKENS, Quality, measure
from kvpred_mlx.making.settings import FitSettings, TrainingSettings
from kvpred_mlx.making.windows import cut_windows
from kvpred_mlx.pair.loading import load, save
from kvpred_mlx.taps.kv_taps import KVTaps


@dataclass(frozen=True)
class Recipe:
    """Where the steps leave their results, and how long the trainings may take.

    Args:
        folder: of all intermediate results.
        minutes: of training, altogether.
        iters: steps of each training, instead of what the minutes allow.
        batch_size: sequences a step.
        layout: of the models, one of `plan.CONFIGS`.
    """

    folder: Path
    minutes: float
    iters: dict[str, int] = field(default_factory=dict)
    batch_size: int = 4
    layout: str = "attention"

    def budget(self, training: str) -> Budget:
        """What one of the trainings gets."""
        return Budget(self.minutes * plan.SHARES[training], self.iters.get(training))

    def corpus(self) -> None:
        """Corpus, tokenizer and rows."""
        if (self.folder / "recall.npy").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        corpus.write(self.folder)
        texts = corpus.read(self.folder / "train.jsonl")
        corpus.train_tokenizer(texts, self.folder / "tokenizer.model", plan.VOCABULARY)
        convert_sentencepiece(self.folder / "tokenizer.model", self.folder / "tokenizer")
        tokenizer = mlx_lm.utils.load_tokenizer(self.folder / "tokenizer")
        text = corpus.text_rows(tokenizer, texts, plan.TEXT_TOKENS, seed=0)
        repeating = corpus.repeating_rows(text, plan.REPEATING_ROWS, plan.REPEATING_TOKENS, seed=0)
        recall = corpus.recall_rows(tokenizer, texts, plan.CONTEXT, seed=1)
        for name, rows in (("text", text), ("repeating", repeating), ("recall", recall)):
            np.save(self.folder / f"{name}.new.npy", rows.rows)
            (self.folder / f"{name}.new.npy").replace(self.folder / f"{name}.npy")

    def pretrain(self, role: str) -> None:
        """Base or auxiliary, one lesson after the other."""
        begin: Path | None = None
        for lesson in plan.LESSONS:
            out = self.folder / f"{role}{lesson.suffix}"
            if not out.exists():
                self._teach(plan.CONFIGS[self.layout][role], lesson, begin, out)
            begin = out

    def _teach(self, config: dict[str, Any], lesson: plan.Lesson, begin: Path | None, out: Path) -> None:
        settings = TrainingSettings(
            batch_size=self.batch_size * lesson.batch_size, learning_rate=lesson.learning_rate, warmup=50,
            end_learning_rate=0.02, save_every=200, optimizer="muon",
        )  # fmt: skip
        rows = PackedSequences(np.load(self.folder / lesson.rows))
        states = self.folder / f"{out.name}.state"
        model = pretrain(config, rows, self.budget(out.name), settings, states, begin, lesson.short)

        def save_model() -> None:
            with new_directory(out) as directory:
                mlx_lm.utils.save_model(directory, model)
                mlx_lm.utils.save_config(dict(config), directory / "config.json")
                for file in (self.folder / "tokenizer").iterdir():
                    shutil.copy(file, directory)

        alone(save_model)

    def fit(self) -> None:
        """The closed-form fit."""
        out = self.folder / "fitted"
        if out.exists():
            return
        base, auxiliary = (load_part(str(self.folder / role)) for role in ("base", "auxiliary"))
        fitted = fit(base.model, auxiliary.model, self.rows(), FitSettings())
        save(out, join(base, auxiliary, fitted.predictor), base.tokenizer)

    def first_layers(self) -> None:
        """A pair that reads with half of its base's own layers, closed form; none of a base of two layers."""
        out = self.folder / "first-layers"
        if out.exists():
            return
        base = load_part(str(self.folder / "base"))
        taps = KVTaps(base.model)
        if len(taps) < 3:
            return
        fitted = fit_first_layers(taps, [len(taps) // 2], self.rows(), FitSettings())
        save(out, join_first_layers(base, fitted.predictor), base.tokenizer)

    def train(self, stage: plan.Stage, begin: str) -> None:
        """Joint training of the pair in `begin`."""
        out = self.folder / stage.name
        if out.exists():
            return
        pair, tokenizer = load(self.folder / begin)
        settings = TrainingSettings(
            batch_size=self.batch_size, learning_rate=stage.learning_rate, warmup=50, end_learning_rate=0.02,
            save_every=50, seed=stage.seed, dtype=default_dtype(), optimizer=stage.optimizer,
        )  # fmt: skip

        def trainer(rows: PackedSequences, settings: TrainingSettings, states: Path | None) -> Trainer:
            twin = load(self.folder / begin)[0] if states is None else pair
            return joint_trainer(twin, rows, settings, stage.weights, states)

        with restored_types(pair):
            states = self.folder / f"{stage.name}.state"
            run(trainer, self.rows(), self.budget(stage.name), settings, states, stage.short)
        alone(lambda: save(out, pair, tokenizer))

    def rows(self) -> PackedSequences:
        """What the fit and the joint trainings read: modules, and text with facts planted."""
        return PackedSequences(np.load(self.folder / "recall.npy"))

    def figures(self, pair_folder: Path) -> list[Quality]:
        """Quality on the held-out modules, which no training has seen."""
        pair, tokenizer = load(pair_folder)
        mlx_lm.utils.dequantize_model(pair)  # the same weights: MLX's CPU backend is slow on quantized ones
        ids = encode(tokenizer, corpus.read(self.folder / "heldout.jsonl"))
        return [measure(pair, cut_windows(ids, n, SCORE_TOKENS, tokenizer)) for n in plan.PROMPT_TOKENS]

    def finish(self) -> Path:
        """Quantize, measure, write the card; the pair is complete or not there."""
        out = self.folder / "pair"
        if out.exists():
            return out
        pair, tokenizer = load(self.folder / plan.STAGES[-1].name)
        with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints
            mlx_lm.utils.quantize_model(pair, {}, group_size=plan.GROUP_SIZE, bits=plan.BITS)
        save(self.folder / "quantized", pair, tokenizer, overwrite=True)
        figures = self.figures(self.folder / "quantized")
        made = [plan.MADE, self._effort()]
        name = plan.NAME
        if self.layout in plan.HYBRIDS:
            made, name = [plan.HYBRIDS[self.layout], *made], f"{plan.NAME}-{self.layout}"

        def extras(folder: Path) -> None:
            write_card(folder, CardFacts(name, made=made, licence="mit"), figures)
            shutil.copy(plan.PROMPT, folder)

        save(out, pair, tokenizer, extras=extras)
        return out

    def _effort(self) -> str:
        """How long each training was."""
        steps = {
            t: json.loads((self.folder / f"{t}.state" / "plan.json").read_text())["iters"]
            for t in plan.SHARES
        }
        said = ", ".join(f"{training} {count}" for training, count in steps.items())
        return f"Steps of {self.batch_size} rows of {plan.CONTEXT} tokens, halved for the first part: {said}."


def alone(step: Callable[[], None]) -> None:
    """Run a step in the first process; the others of `mlx.launch` wait for it."""
    group = mx.distributed.init()
    if not group.rank():
        step()
    mx.eval(mx.distributed.all_sum(mx.array(0.0), group=group))
