"""Pairs of a base's own first layers: quality by depth and by tokens, then by training.

`python -m kvpred_mlx.bench.studies.first_layers --base BASE --depths 7,10,14,21 --data TRAIN --held-out HELD \
--folder FOLDER` records windows of real text and of planted facts once, fits closed forms on growing parts of them,
scores every depth, and trains as the cache is used.  Every step is kept in FOLDER and passed over if it is there.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer

from kvpred_mlx.bench.common import command, machine
from kvpred_mlx.bench.common.results import machine_text
from kvpred_mlx.bench.front.recall_score import questions
from kvpred_mlx.bench.ttft.run import bench
from kvpred_mlx.bench.ttft.settings import BenchSettings
from kvpred_mlx.console import numbers, progress_bar
from kvpred_mlx.dial.positions import ExactPositions
from kvpred_mlx.files import write_file
from kvpred_mlx.making.as_used import as_used_trainer
from kvpred_mlx.making.data import encode, read_documents
from kvpred_mlx.making.fit import fit_recorded
from kvpred_mlx.making.pairing import LoadedModel, join_first_layers, load_part
from kvpred_mlx.making.recorded_quality import Scores, estimates, score
from kvpred_mlx.making.recording import Recording, record
from kvpred_mlx.making.settings import TrainingSettings
from kvpred_mlx.making.windows import Windows, cut_windows
from kvpred_mlx.pair.loading import save
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.taps.kv_taps import KVTaps

METRICS = ("retention", "agreement", "first_token_agreement", "divergence")
SCORED = 64


def main(
    base: Annotated[str, typer.Option(help="Any mlx-lm model: a directory or a Hugging Face repo.")],
    depths: Annotated[str, typer.Option(help="How many layers read, 7,10,14.")],
    data: Annotated[Path, typer.Option(help="Text to fit on.")],
    held_out: Annotated[Path, typer.Option(help="Other text, to measure on.")],
    folder: Annotated[Path, typer.Option(help="Recordings, states and results.")],
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to fit on.")] = 96,
    counts: Annotated[str, typer.Option(help="Closed forms on so many of them.")] = "6,24,96",
    prompt_lens: Annotated[str, typer.Option(help="Prompt lengths, in tokens.")] = "448",
    held_windows: Annotated[str, typer.Option(help="Windows to measure on, at each length.")] = "24",
    recall: Annotated[
        str, typer.Option(help="Questions of each kind at each of five depths, at each length.")
    ] = "2",
    iters: Annotated[int, typer.Option(min=0, help="Training steps of each depth.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-4,
    trained: Annotated[str, typer.Option(help="The depths to train (default: all).")] = "",
    as_recorded: Annotated[
        bool, typer.Option("--as-recorded", help="Record no more windows to fit on than there are.")
    ] = False,
    bench_lens: Annotated[
        list[str] | None, typer.Option(help="Prompt lengths to time the first token at, 512,2048.")
    ] = None,
    timed: Annotated[str, typer.Option(help="The depths to time (default: all).")] = "",
    trials: Annotated[int, typer.Option(min=1, help="Of each, interleaved with full prefills.")] = 3,
    every: Annotated[int, typer.Option(min=1, help="Steps between scores.")] = 20,
    saved: Annotated[str, typer.Option(help="Depths of the linked pair to save in FOLDER/pair.")] = "",
) -> None:
    """Quality of pairs that read with their base's first layers."""
    study = Study(load_part(base), _numbers(depths), folder)
    lengths = _numbers(prompt_lens)
    if as_recorded:
        study.open("train")
    else:
        study.record_text("train", data, 448, windows)
    for n, count in zip(lengths, _numbers(held_windows), strict=True):
        study.record_text(f"held-{n}", held_out, n, count)
    for n, count in zip(lengths, _numbers(recall), strict=True):
        if count:
            study.record_recall(f"recall-{n}", held_out, n, count)
    study.closed_forms(_numbers(counts))
    for depth in _numbers(trained) if trained else _numbers(depths):
        if iters:
            settings = TrainingSettings(
                iters, batch_size, learning_rate, warmup=min(10, iters // 5), weight_decay=0.0, save_every=every,
                steps_per_report=5,
            )  # fmt: skip
            study.train(depth, settings, every)
    if bench_lens:
        lengths = numbers("--bench-lens", bench_lens, 64)
        study.time(_numbers(timed) if timed else _numbers(depths), lengths, trials)
    if saved:
        study.save_pair(_numbers(saved))
    print(study.write_tables())


class Study:
    """A folder of recordings and results of one base.

    Args:
        base: the model.
        depths: of the maps.
        folder: made by the first recording if it is not there.
    """

    def __init__(self, base: LoadedModel, depths: Sequence[int], folder: Path):
        self._base, self._taps, self._depths, self._folder = base, KVTaps(base.model), list(depths), folder
        self._place = folder / "results.json"
        name = Path(base.name).name
        begun: dict[str, Any] = {"base": name, "machine": machine.describe(), "rows": [], "seconds": {}}
        self.results = json.loads(self._place.read_text()) if self._place.exists() else begun
        dtype = str(base.model(mx.array([[0]])).dtype).rpartition(".")[2]
        self.results.setdefault("pair", {"dtype": dtype})
        self._recordings: dict[str, Recording] = {}

    def open(self, name: str) -> None:
        """What is recorded under a name, whole or not."""
        self._recordings[name] = Recording(self._folder / name)

    def record_text(self, name: str, data: Path, prompt: int, count: int) -> None:
        """Windows of real text."""
        ids = encode(self._base.tokenizer, list(read_documents(data)))
        per_document = 1 if name == "train" else 2
        cut = cut_windows(ids, prompt, SCORED, most=count, per_document=per_document)
        order = np.random.default_rng(0).permutation(len(cut)) if name == "train" else np.arange(len(cut))
        self._record(name, cut.take(order))

    def record_recall(self, name: str, data: Path, prompt: int, count: int) -> None:
        """Prompts with facts planted, and the answers to a question about one of them."""
        texts = list(read_documents(data))
        asked = questions(self._base.tokenizer, texts, prompt, count, seed=0)
        most = max(len(q.answer) for q in asked)
        kept = [q for q in asked if len(q.answer) == most]
        self._record(name, Windows.of(np.array([q.prompt for q in kept]), np.array([q.answer for q in kept])))

    def closed_forms(self, counts: Sequence[int]) -> None:
        """Fit on growing numbers of windows, and score each."""
        missing = [
            c for c in counts if any(self._unscored(k, f"closed form, {c} windows") for k in self._depths)
        ]
        train = self._recordings["train"]
        counts = [min(c, len(train)) for c in missing]
        began = time.perf_counter()
        for count, fitted in zip(counts, fit_recorded(self._taps, self._depths, train, counts), strict=False):
            assert isinstance(fitted.predictor, FirstLayersPredictor)
            weights = dict(fitted.predictor.parameters())
            mx.save_safetensors(str(self._folder / f"closed-form-{count}.safetensors"), _flat(weights))
            pair = KVPredictionModel(self._taps, None, fitted.predictor)
            for depth in self._depths:
                self._score(pair, depth, f"closed form, {count} windows", fitted.tokens)
        self.results["seconds"]["closed forms"] = time.perf_counter() - began
        self._save()

    def train(self, depth: int, settings: TrainingSettings, every: int) -> None:
        """Train one depth from the last closed form, scoring now and then."""
        predictor = self._last_closed_form()
        pair = KVPredictionModel(self._taps, None, predictor)
        train = self._recordings["train"]
        states = self._folder / f"training-{depth}"
        trainer = as_used_trainer(pair, train, settings, state_folder=states, depth=depth)
        began = time.perf_counter()
        while trainer.step < settings.iters:
            trainer.run(command.tell, until=min(trainer.step + every, settings.iters))
            seconds = time.perf_counter() - began
            tokens = trainer.step * settings.batch_size * train.tokens_per_row
            self._score(pair, depth, f"trained, {trainer.step} steps", tokens, seconds)
        mx.save_safetensors(
            str(self._folder / f"trained-{depth}.safetensors"), _flat(dict(predictor.at(depth).parameters()))
        )

    def save_pair(self, depths: Sequence[int]) -> None:
        """Save the maps of some depths, trained or else fitted on the most windows, as a pair linked to the base."""
        fitted = self._last_closed_form()
        predictor = FirstLayersPredictor(depths, self._taps.input_widths, self._taps.widths)
        for depth in depths:
            trained = self._folder / f"trained-{depth}.safetensors"
            weights = (
                mx.load(str(trained)) if trained.exists() else _flat(dict(fitted.at(depth).parameters()))
            )
            predictor.at(depth).load_weights(list(weights.items()))  # type: ignore[union-attr]
        save(self._folder / "pair", join_first_layers(self._base, predictor, linked=True), overwrite=True)

    def _last_closed_form(self) -> FirstLayersPredictor:
        kept = self._folder.glob("closed-form-*.safetensors")
        predictor = FirstLayersPredictor(self._depths, self._taps.input_widths, self._taps.widths)
        predictor.load_weights(str(max(kept, key=lambda p: int(p.stem.rpartition("-")[2]))))
        return predictor

    def time(self, depths: Sequence[int], lengths: Sequence[int], trials: int) -> None:
        """Times to the first token at some depths against full prefills, side by side, and what the FLOPs allow."""
        predictor = FirstLayersPredictor(self._depths, self._taps.input_widths, self._taps.widths)
        mx.eval(predictor.parameters())  # random maps take as long as fitted ones
        pair = KVPredictionModel(self._taps, None, predictor)
        for depth in depths:
            pair.exact_positions = ExactPositions(depth=((depth, 1.0),))
            with progress_bar(f"depth {depth}") as progress:
                settings = BenchSettings(list(lengths), trials=trials, max_tokens=2)
                shapes = bench(pair, self._base.name, settings, progress=progress)["shapes"]
            self.results.setdefault("times", {})[str(depth)] = [
                {"prompt_tokens": s["prompt_tokens"], "flops_ratio": s["flops_ratio"], **s["ratios"][0]}
                for s in shapes
            ]
            self._save()

    def write_tables(self) -> str:
        """The results as Markdown, also beside them."""
        text = "\n\n".join(tables(self.results))
        write_file(self._folder / "tables.md", lambda beside: beside.write_text(text + "\n"))
        return text

    def _record(self, name: str, windows: Windows) -> None:
        predictor = FirstLayersPredictor(self._depths, self._taps.input_widths, self._taps.widths)
        pair = KVPredictionModel(self._taps, None, predictor)
        began = time.perf_counter()
        self._recordings[name] = record(
            pair, windows, self._folder / name,
            progress=lambda done, total, what=None: print(f"{name}: {done} of {total} windows", flush=True),
        )  # fmt: skip
        self.results["seconds"].setdefault(f"recording {name}", time.perf_counter() - began)
        self._save()

    def _row(self, depth: int, way: str) -> dict[str, Any]:
        """What is known of maps; nothing if they were not scored yet."""
        found = (row for row in self.results["rows"] if row["depth"] == depth and row["way"] == way)
        return next(found, {})

    def _unscored(self, depth: int, way: str) -> list[str]:
        """The recordings that maps have not been scored on."""
        row = self._row(depth, way)
        return [name for name in self._recordings if name != "train" and name not in row]

    def _score(
        self, pair: KVPredictionModel, depth: int, way: str, tokens: int, seconds: float = 0.0
    ) -> None:
        row = self._row(depth, way)
        found = {}
        for name in self._unscored(depth, way):
            scores = score(pair, self._recordings[name], depth)
            found[name] = _figures(self._recordings[name], scores, name.startswith("recall"))
        if not row:
            row = {"depth": depth, "way": way, "tokens": tokens, "seconds": seconds}
            self.results["rows"].append(row)
        row.update(found)
        self._save()
        print(json.dumps(row), flush=True)

    def _save(self) -> None:
        write_file(self._place, lambda beside: beside.write_text(json.dumps(self.results, indent=1)))


def tables(results: dict[str, Any]) -> list[str]:
    """Quality by depth and way, and times, as Markdown."""
    rows = results["rows"]
    held = sorted({name for row in rows for name in row if "-" in name}, key=_order)
    heads = [f"{name.replace('-', ' ')}: {m.replace('_', ' ')}" for name in held for m in _shown(name)]
    lines = ["| layers | maps | tokens | " + " | ".join(heads) + " |", "| --- " * (3 + len(heads)) + "|"]
    for row in sorted(rows, key=lambda row: row["depth"]):
        cells = [_cell(row[name][m]) if name in row else "" for name in held for m in _shown(name)]
        lines.append(f"| {row['depth']} | {row['way']} | {row['tokens']:,} | " + " | ".join(cells) + " |")
    found = [f"Base: {results['base'].rpartition('/')[2]}.", "\n".join(lines)]
    if "times" in results:
        lines = ["| layers | prompt | times sooner (95 %) | FLOPs allow | quotient |", "| --- " * 5 + "|"]
        lines += [
            f"| {depth} | {t['prompt_tokens']} | {t['median']:.2f} ({t['low']:.2f} to {t['high']:.2f}) "
            f"| {t['flops_ratio']:.2f} | {t['quotient']:.2f} |"
            for depth, times in results["times"].items()
            for t in times
        ]
        found.append("\n".join(lines))
    return [*found, machine_text(results)]


def _shown(recording: str) -> tuple[str, ...]:
    return ("recalled",) if recording.startswith("recall") else METRICS[:3]


def _order(name: str) -> tuple[str, int]:
    kind, _, tokens = name.partition("-")
    return kind, int(tokens)


def _cell(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.3f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def _figures(recording: Recording, scores: Scores, recall: bool) -> dict[str, Any]:
    found = estimates(recording, scores)
    metrics = ("recalled", "agreement", "divergence") if recall else METRICS
    return {m: dataclasses.asdict(found[m]) for m in metrics}


def _flat(parameters: dict[str, Any]) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(parameters))


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    command.run(main)
