"""The whole recipe of the bundled pair: `make demo-pair MINUTES=60`.

Corpus, tokenizer, base and auxiliary (each in three lessons: text, looking back, recall), fit, joint training,
quantization, figures and model card.  Every step leaves a file or a folder and is passed over if that is there,
training resumes from its last state, and the minutes are shared out among the trainings: the same recipe on CPU, Metal
or CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np

from kvpred_mlx.bench.recipe import corpus
from kvpred_mlx.bench.recipe.pretrain import SHORT_SHARE, Budget, pretrain, run
from kvpred_mlx.convert.tokenizer import convert_sentencepiece
from kvpred_mlx.files import new_directory
from kvpred_mlx.making.card import CardFacts, write_card
from kvpred_mlx.making.data import PackedSequences, encode
from kvpred_mlx.making.fit import fit
from kvpred_mlx.making.joint import default_dtype, joint_trainer, restored_types
from kvpred_mlx.making.loop import Trainer
from kvpred_mlx.making.loss import LossWeights
from kvpred_mlx.making.pairing import join, load_part
from kvpred_mlx.making.quality import SCORE_TOKENS, Quality, measure
from kvpred_mlx.making.settings import FitSettings, TrainingSettings
from kvpred_mlx.making.windows import cut_windows
from kvpred_mlx.pair.loading import DEMO_PAIR, load, save

CONTEXT = 640
REPEATING_ROWS = 10_000
TEXT_TOKENS, REPEATING_TOKENS = 512, 64
VOCABULARY = 4096
PROMPT_TOKENS = (192, 448)
BITS, GROUP_SIZE = 8, 32
NAME = "pycode"
PROMPT = DEMO_PAIR / "prompt.txt"
MADE = (
    (
        "A demonstration that is small enough to ship: it writes Python-shaped text, no more. `make demo-pair` is the whole "
        "recipe: corpus (the source of CPython's standard library, PSF licence, held-out modules left out, and rows with facts "
        "planted to be recalled), SentencePiece tokenizer, base and auxiliary (Muon), closed-form fit, joint training, "
        "quantization."
    ),
)
SHARES = {
    "base-text": 0.35,
    "base-repeating": 0.05,
    "base": 0.2,
    "auxiliary-text": 0.07,
    "auxiliary-repeating": 0.02,
    "auxiliary": 0.06,
    "joint": 0.08,
    "polished": 0.04,
    "sharpened": 0.13,
}


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a model is taught, one after another.

    Args:
        suffix: of the folder of the model that has had it.
        rows: file of the rows, in the recipe's folder.
        batch_size: in multiples of the recipe's.
        short: the share of the steps that are taken on halved rows.
    """

    suffix: str
    rows: str
    learning_rate: float
    batch_size: int = 1
    short: float = SHORT_SHARE


@dataclasses.dataclass(frozen=True)
class Stage:
    """A joint training, one after another.

    Args:
        weights: of the loss terms; None: the paper's.
        short: the share of the steps that are taken on halved rows.
    """

    name: str
    learning_rate: float
    short: float = SHORT_SHARE
    weights: LossWeights | None = None
    optimizer: str = "adamw"
    seed: int = 0


STAGES = (
    Stage("joint", 1e-3),
    Stage("polished", 5e-4, short=1),
    Stage("sharpened", 3e-3, weights=LossWeights(auxiliary=0.3, kv=0.3), optimizer="muon", seed=3),
)
LESSONS = (
    Lesson("-text", "text.npy", 0.01),
    Lesson("-repeating", "repeating.npy", 0.01, batch_size=4, short=0),
    Lesson("", "recall.npy", 0.006),
)


def nemotron(
    width: int, layers: int, heads: int, kv_heads: int, ffn: int, head_dim: int = 64
) -> dict[str, Any]:
    """A small Nemotron: its squared ReLU costs no exponentials, which are slow on MLX's x86 backend."""
    return {
        "model_type": "nemotron",
        "hidden_size": width,
        "hidden_act": "relu2",
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


CONFIGS = {"base": nemotron(256, 8, 2, 1, 1024, head_dim=128), "auxiliary": nemotron(160, 4, 2, 1, 640)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Where the steps leave their results, and how long the trainings may take.

    Args:
        folder: of all intermediate results.
        minutes: of training, altogether.
        iters: steps of each training, instead of what the minutes allow.
        batch_size: sequences a step.
    """

    folder: Path
    minutes: float
    iters: dict[str, int] = dataclasses.field(default_factory=dict)
    batch_size: int = 4

    def budget(self, training: str) -> Budget:
        """What one of the trainings gets."""
        return Budget(self.minutes * SHARES[training], self.iters.get(training))

    def corpus(self) -> None:
        """Corpus, tokenizer and rows."""
        if (self.folder / "recall.npy").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        corpus.write(self.folder)
        texts = corpus.read(self.folder / "train.jsonl")
        corpus.train_tokenizer(texts, self.folder / "tokenizer.model", VOCABULARY)
        convert_sentencepiece(self.folder / "tokenizer.model", self.folder / "tokenizer")
        tokenizer = mlx_lm.utils.load_tokenizer(self.folder / "tokenizer")
        text = corpus.text_rows(tokenizer, texts, TEXT_TOKENS, seed=0)
        repeating = corpus.repeating_rows(text, REPEATING_ROWS, REPEATING_TOKENS, seed=0)
        recall = corpus.recall_rows(tokenizer, texts, CONTEXT, seed=1)
        for name, rows in (("text", text), ("repeating", repeating), ("recall", recall)):
            np.save(self.folder / f"{name}.new.npy", rows.rows)
            (self.folder / f"{name}.new.npy").replace(self.folder / f"{name}.npy")

    def pretrain(self, role: str) -> None:
        """Base or auxiliary, one lesson after the other."""
        begin: Path | None = None
        for lesson in LESSONS:
            out = self.folder / f"{role}{lesson.suffix}"
            if not out.exists():
                self._teach(CONFIGS[role], lesson, begin, out)
            begin = out

    def _teach(self, config: dict[str, Any], lesson: Lesson, begin: Path | None, out: Path) -> None:
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
        fitted = fit(base.model, auxiliary.model, self._rows(), FitSettings())
        save(out, join(base, auxiliary, fitted.predictor), base.tokenizer)

    def train(self, stage: Stage, begin: str) -> None:
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
            run(trainer, self._rows(), self.budget(stage.name), settings, states, stage.short)
        alone(lambda: save(out, pair, tokenizer))

    def _rows(self) -> PackedSequences:
        return PackedSequences(np.load(self.folder / "recall.npy"))

    def figures(self, pair_folder: Path) -> list[Quality]:
        """Quality on the held-out modules, which no training has seen."""
        pair, tokenizer = load(pair_folder)
        mlx_lm.utils.dequantize_model(pair)  # the same weights: MLX's CPU backend is slow on quantized ones
        ids = encode(tokenizer, corpus.read(self.folder / "heldout.jsonl"))
        return [measure(pair, cut_windows(ids, n, SCORE_TOKENS, tokenizer)) for n in PROMPT_TOKENS]

    def finish(self) -> Path:
        """Quantize, measure, write the card; the pair is complete or not there."""
        out = self.folder / "pair"
        if out.exists():
            return out
        pair, tokenizer = load(self.folder / STAGES[-1].name)
        with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints
            mlx_lm.utils.quantize_model(pair, {}, group_size=GROUP_SIZE, bits=BITS)
        save(self.folder / "quantized", pair, tokenizer, overwrite=True)
        figures = self.figures(self.folder / "quantized")

        made = [*MADE, self._effort()]

        def extras(folder: Path) -> None:
            write_card(folder, CardFacts(NAME, made=made, licence="mit"), figures)
            shutil.copy(PROMPT, folder)

        save(out, pair, tokenizer, extras=extras)
        return out

    def _effort(self) -> str:
        """How long each training was."""
        steps = {
            t: json.loads((self.folder / f"{t}.state" / "plan.json").read_text())["iters"] for t in SHARES
        }
        said = ", ".join(f"{training} {count}" for training, count in steps.items())
        return f"Steps of {self.batch_size} rows of {CONTEXT} tokens, halved for the first part: {said}."


def alone(step: Callable[[], None]) -> None:
    """Run a step in the first process; the others of `mlx.launch` wait for it."""
    group = mx.distributed.init()
    if not group.rank():
        step()
    mx.eval(mx.distributed.all_sum(mx.array(0.0), group=group))


def main() -> None:
    """Run the steps that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo-pair"))
    parser.add_argument("--minutes", type=float, default=60, help="of training, altogether")
    parser.add_argument("--iters", help=f"steps instead, of {', '.join(SHARES)}")
    parser.add_argument("--batch-size", type=int, default=4)
    a = parser.parse_args()
    iters = dict(zip(SHARES, map(int, a.iters.split(",")), strict=True)) if a.iters else {}
    recipe = Recipe(a.folder, a.minutes, iters, a.batch_size)
    alone(recipe.corpus)
    recipe.pretrain("base")
    recipe.pretrain("auxiliary")
    alone(recipe.fit)
    begin = "fitted"
    for stage in STAGES:
        recipe.train(stage, begin)
        begin = stage.name
    alone(lambda: print(recipe.finish()))


if __name__ == "__main__":
    main()
