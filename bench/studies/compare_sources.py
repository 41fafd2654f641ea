"""What to predict from, with which layer map, fitted or trained: `python -m kvpred_mlx.bench.studies.compare_sources DEMO_PAIR_FOLDER`.

Works in the folder of `make demo-pair`, on its base, auxiliary, training rows and held-out modules.  Every variant is
fitted on the same tokens and, where it is trained, trained on the same batches; times are taken side by side.  Fitted and
trained variants are kept in the folder, so an interrupted comparison goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from kvpred_mlx.bench.common import machine
from kvpred_mlx.bench.common.flops import ttft_flops
from kvpred_mlx.bench.common.statistics import paired_ratio
from kvpred_mlx.bench.recipe import corpus
from kvpred_mlx.bench.recipe.pretrain import Curriculum, show
from kvpred_mlx.bench.ttft.measure import generate
from kvpred_mlx.making.data import PackedSequences, encode
from kvpred_mlx.making.fit import fit
from kvpred_mlx.making.joint import default_dtype, joint_trainer, restored_types
from kvpred_mlx.making.pairing import join, load_part
from kvpred_mlx.making.quality import SCORE_TOKENS, measure, modes_of
from kvpred_mlx.making.settings import FitSettings, TrainingSettings
from kvpred_mlx.making.windows import cut_windows
from kvpred_mlx.pair.loading import load, save
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.sources import SOURCES

LENGTHS = (192, 448)
TRIALS = 7
WINDOWS = 100
FIT_TOKENS = 100_000


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to make a predictor; `steps` of joint training, 0 for the closed form alone."""

    source: str
    layer_map: str
    steps: int = 0

    @property
    def name(self) -> str:
        return f"{self.source}-{self.layer_map}-{self.steps}"


def variants(steps: int) -> Iterator[Variant]:
    """Every source and map in closed form; every source trained."""
    for source in SOURCES:
        yield from (Variant(source, layer_map) for layer_map in ("even", "auto"))
    yield from (Variant(source, "even", steps) for source in SOURCES)


def make(folder: Path, variant: Variant) -> KVPredictionModel:
    """Fit, and train if asked; what is already in the folder is loaded."""
    path = folder / "sources" / variant.name
    if not path.exists():
        base, auxiliary = (load_part(str(folder / role)) for role in ("base", "auxiliary"))
        rows = PackedSequences(np.load(folder / "rows.npy"))
        settings = FitSettings(FIT_TOKENS, source=variant.source, layer_map=variant.layer_map)
        pair = join(base, auxiliary, fit(base.model, auxiliary.model, rows, settings).predictor)
        if variant.steps:
            training = TrainingSettings(variant.steps, 4, 1e-3, 0.02, warmup=20, dtype=default_dtype())
            halves = Curriculum(rows.rows, variant.steps)
            with restored_types(pair):
                joint_trainer(pair, halves, training, state_folder=path.with_suffix(".state")).run(show)
        save(path, pair, base.tokenizer)
    return load(path)[0]


def compare(folder: Path, steps: int) -> dict[str, Any]:
    """All figures of all variants."""
    tokenizer = load_part(str(folder / "base")).tokenizer
    ids = encode(tokenizer, corpus.read(folder / "heldout.jsonl"))
    made = {variant: make(folder, variant) for variant in variants(steps)}
    first = next(iter(made.values()))
    alone = {name: mode for name, mode in modes_of(first).items() if name in ("exact", "no prompt")}
    predicted = {variant.name: modes_of(pair)["predicted"] for variant, pair in made.items()}
    found: dict[Variant, dict[str, Any]] = {v: dataclasses.asdict(v) | {"lengths": {}} for v in made}
    for n in LENGTHS:
        windows = cut_windows(ids, n, SCORE_TOKENS, tokenizer, WINDOWS)
        quality = measure(first, windows, alone | predicted)
        times = _times(made, mx.array(windows.prompts[:1]))
        for variant, pair in made.items():
            figures = {name: dataclasses.asdict(e) for name, e in quality.modes[variant.name].items()}
            found[variant]["lengths"][n] = {
                "quality": figures, "flops_ratio": ttft_flops(pair, n).ratio, "times_sooner": times[variant],
            }  # fmt: skip
    return {
        "schema": 1,
        "fit_tokens": FIT_TOKENS,
        "machine": machine.describe(),
        "variants": list(found.values()),
    }


def _times(made: dict[Variant, KVPredictionModel], tokens: mx.array) -> dict[Variant, dict[str, float]]:
    """For each variant, how many times sooner than its base: trials interleaved, ratios trial by trial."""
    seconds: dict[Variant, list[tuple[float, float]]] = {variant: [] for variant in made}
    for _ in range(TRIALS + 1):
        for variant, pair in made.items():
            pairwise = tuple(generate(model, tokens, 2048, 1).ttft for model in (pair.base, pair))
            seconds[variant].append((pairwise[0], pairwise[1]))
    return {
        variant: paired_ratio(*zip(*trials[1:], strict=True)).as_dict()
        | {"ttft": median(b for _, b in trials[1:])}
        for variant, trials in seconds.items()
    }


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/making-pairs.md."""
    lines = [
        "| source | map | trained | prompt | retention (95 %) | agreement | first token | FLOPs ratio | times sooner (95 %) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(_row(entry) for entry in results["variants"])])


def _row(entry: dict[str, Any]) -> str:
    rows = []
    for n, figures in entry["lengths"].items():
        predicted, sooner = figures["quality"], figures["times_sooner"]
        retention = predicted["retention"]
        rows.append(
            f"| {entry['source']} | {entry['layer_map']} | {entry['steps'] or 'no'} | {n} "
            f"| {retention['mean']:.3f} ({retention['low']:.3f} to {retention['high']:.3f}) "
            f"| {predicted['agreement']['mean']:.3f} | {predicted['first_token_agreement']['mean']:.3f} "
            f"| {figures['flops_ratio']:.2f} | {sooner['median']:.2f} ({sooner['low']:.2f} to {sooner['high']:.2f}) |"
        )
    return "\n".join(rows)


def main() -> None:
    """Compare, and write `results.json` beside the variants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path, default=Path("sources.json"))
    a = parser.parse_args()
    results = compare(a.folder, a.steps)
    a.output.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
