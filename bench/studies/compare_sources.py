"""What to predict from, with which map: `python -m kvpred_mlx.bench.studies.compare_sources`.

Works in the folder of `make demo-pair`, on its base, auxiliary, training rows and held-out modules.  Every
variant is fitted on the same tokens and, where it is trained, trained on the same batches; times are taken
side by side.  Fitted and trained variants are kept in the folder, so an interrupted comparison goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.common.flops import ttft_flops
from kvpred_mlx.bench.common.formats import markdown_table
from kvpred_mlx.bench.common.results import Results, begin, write_json
from kvpred_mlx.bench.common.statistics import paired_ratio
from kvpred_mlx.bench.recipe import corpus
from kvpred_mlx.bench.recipe.pretrain import Curriculum
from kvpred_mlx.bench.recipe.steps import Recipe
from kvpred_mlx.bench.ttft.measure import generate
from kvpred_mlx.console import progress_bar
from kvpred_mlx.making.data import encode
from kvpred_mlx.making.fit import fit
from kvpred_mlx.making.joint import default_dtype, joint_trainer, restored_types
from kvpred_mlx.making.pairing import join, load_part
from kvpred_mlx.making.quality import SCORE_TOKENS, measure, modes_of
from kvpred_mlx.making.settings import FitSettings, TrainingSettings
from kvpred_mlx.making.windows import Windows, cut_windows
from kvpred_mlx.pair.loading import load, save
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.sources import SOURCES
from kvpred_mlx.progress import ProgressCallback, no_progress

SCHEMA = 1
COMMAND = ("python", "-m", "kvpred_mlx.bench.studies.compare_sources")
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
        rows = Recipe(folder, minutes=0).rows()
        settings = FitSettings(FIT_TOKENS, source=variant.source, layer_map=variant.layer_map)
        pair = join(base, auxiliary, fit(base.model, auxiliary.model, rows, settings).predictor)
        if variant.steps:
            training = TrainingSettings(variant.steps, 4, 1e-3, 0.02, warmup=20, dtype=default_dtype())
            halves = Curriculum(rows.rows, variant.steps)
            with restored_types(pair):
                joint_trainer(pair, halves, training, state_folder=path.with_suffix(".state")).run(
                    command.tell
                )
        save(path, pair, base.tokenizer)
    return load(path)[0]


def compare(folder: Path, steps: int, progress: ProgressCallback = no_progress) -> Results:
    """All figures of all variants."""
    settings = {"steps": steps, "windows": WINDOWS, "trials": TRIALS}
    results = begin(SCHEMA, None, settings, command=COMMAND, fit_tokens=FIT_TOKENS)
    tokenizer = load_part(str(folder / "base")).tokenizer
    ids = encode(tokenizer, corpus.read(folder / "heldout.jsonl"))
    asked = list(variants(steps))
    made: dict[Variant, KVPredictionModel] = {}
    for i, variant in enumerate(asked):
        progress(i, len(asked), f"making {variant.name}")
        made[variant] = make(folder, variant)
    found: dict[Variant, dict[str, Any]] = {v: dataclasses.asdict(v) | {"lengths": {}} for v in made}
    for i, n in enumerate(LENGTHS):
        progress(i, len(LENGTHS), f"measuring at {n} tokens")
        windows = cut_windows(ids, n, SCORE_TOKENS, tokenizer, WINDOWS)
        for variant, figures in _measure(made, windows).items():
            found[variant]["lengths"][n] = figures
    return results | {"variants": list(found.values()), "complete": True}


def _measure(made: dict[Variant, KVPredictionModel], windows: Windows) -> dict[Variant, dict[str, Any]]:
    """Quality, FLOPs and times of every variant at one prompt length."""
    first = next(iter(made.values()))
    alone = {name: mode for name, mode in modes_of(first).items() if name in ("exact", "no prompt")}
    predicted = {variant.name: modes_of(pair)["predicted"] for variant, pair in made.items()}
    quality = measure(first, windows, alone | predicted)
    times = _times(made, mx.array(windows.prompts[:1]))
    return {
        variant: {
            "quality": {m: dataclasses.asdict(e) for m, e in quality.modes[variant.name].items()},
            "flops_ratio": ttft_flops(pair, windows.prompts.shape[1]).ratio,
            "times_sooner": times[variant],
        }
        for variant, pair in made.items()
    }


def _times(made: dict[Variant, KVPredictionModel], tokens: mx.array) -> dict[Variant, dict[str, float]]:
    """For each variant, how many times sooner than its base: trials interleaved, ratios trial by trial."""
    seconds: dict[Variant, list[tuple[float, float]]] = {variant: [] for variant in made}
    for _ in range(TRIALS + 1):
        for variant, pair in made.items():
            pairwise = tuple(generate(model, tokens, 2048, 1).ttft for model in (pair.base, pair))
            seconds[variant].append((pairwise[0], pairwise[1]))
    found = {}
    for variant, trials in seconds.items():
        base, predicted = [b for b, _ in trials[1:]], [p for _, p in trials[1:]]
        found[variant] = paired_ratio(base, predicted).as_dict() | {"ttft": median(predicted)}
    return found


def markdown(results: Results) -> str:
    """The table of docs/making-pairs.md."""
    names = ["source", "map", "trained", "prompt", "retention (95 %)", "agreement", "first token"]
    rows = [row for entry in results["variants"] for row in _rows(entry)]
    return markdown_table([*names, "FLOPs ratio", "times sooner (95 %)"], rows)


def _rows(entry: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    for n, figures in entry["lengths"].items():
        quality, sooner = figures["quality"], figures["times_sooner"]
        kept = quality["retention"]
        yield (
            entry["source"],
            entry["layer_map"],
            entry["steps"] or "no",
            n,
            f"{kept['mean']:.3f} ({kept['low']:.3f} to {kept['high']:.3f})",
            f"{quality['agreement']['mean']:.3f}",
            f"{quality['first_token_agreement']['mean']:.3f}",
            f"{figures['flops_ratio']:.2f}",
            f"{sooner['median']:.2f} ({sooner['low']:.2f} to {sooner['high']:.2f})",
        )


def main(
    folder: Annotated[Path, typer.Option(help="Folder of make demo-pair.")] = Path("demo-pair"),
    steps: Annotated[int, typer.Option(min=1, help="Of joint training.")] = 150,
    output: Annotated[Path, typer.Option(help="File for the results.")] = Path("sources.json"),
) -> None:
    """Compare what a pair may be predicted from: closed form and trained, quality and times."""
    with progress_bar("making") as progress:
        results = compare(folder, steps, progress)
    write_json(output, results)
    print(markdown(results))


if __name__ == "__main__":
    command.run(main)
