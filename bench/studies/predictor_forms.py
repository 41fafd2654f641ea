"""Forms of a predictor, compared on what a study of first layers has recorded.

`python -m kvpred_mlx.bench.studies.predictor_forms --base BASE --folder FOLDER --depth 14 --joined 7,10`, with the
folder of `kvpred_mlx.bench.studies.first_layers`: the linear map, features of several layers joined, regression
weighted by the attention that the base pays to each token, both of these, low-rank maps, a small gated MLP beside the
linear map; and the linear map, the joined one, or the linear one with low-rank adapters on the layers that read,
trained as the cache is used, `--iters` steps on the windows that they were fitted on.  Differences from the linear map
are paired, window by window.  With `--auxiliary SMALL` in the place of `--depth` the same for a pair of two models,
whose even map joins each layer with those so many layers before it; with both, what the second model reads is joined to
what layer `--depth` reads.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.studies.forms import FITTED, HELD_OUT, KINDS, TRAINED, BothForms, Forms, TwoModelForms
from kvpred_mlx.console import numbers, progress_bar
from kvpred_mlx.files import write_file
from kvpred_mlx.making.pairing import load_part
from kvpred_mlx.making.recorded_quality import Scores, estimates
from kvpred_mlx.making.recording import FACTS, Recording, write_json
from kvpred_mlx.making.settings import TrainingSettings
from kvpred_mlx.pair import sources
from kvpred_mlx.taps.kv_taps import KVTaps

SHOWN = ("retention", "agreement", "first_token_agreement", "divergence")


def main(
    base: Annotated[str, typer.Option(help="The model of the study.")],
    folder: Annotated[Path, typer.Option(help="Of the study.")],
    joined: Annotated[
        list[str],
        typer.Option(help="Recorded layers to join, 7,10; with --auxiliary, how many layers before, 0,4."),
    ],
    depth: Annotated[int | None, typer.Option(help="How many layers read.")] = None,
    auxiliary: Annotated[str | None, typer.Option(help="A second model that reads instead, or too.")] = None,
    windows: Annotated[
        int | None, typer.Option(min=HELD_OUT, help="To fit on. Default: all recorded.")
    ] = None,
    kinds: Annotated[str, typer.Option(help=f"Beside the linear map: {', '.join(KINDS)}.")] = ",".join(
        FITTED
    ),
    ranks: Annotated[list[str] | None, typer.Option(help="Of low-rank maps.")] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Width of each gated MLP.")] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="Of their training.")] = 8,
    iters: Annotated[int, typer.Option(min=1, help="Steps of the kinds that are trained.")] = 48,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 3e-4,
    adapter_rank: Annotated[int, typer.Option(min=1, help="Of adapters on the layers that read.")] = 16,
    held_out: Annotated[str, typer.Option(help="The recording to measure on.")] = "held-448",
) -> None:
    """Compare forms of the predictor, at equal or nearly equal TTFT."""
    if depth is None and auxiliary is None:
        raise typer.BadParameter("expected one of the two or both", param_hint="--depth / --auxiliary")
    distances, chosen = numbers("--joined", joined, 0), kinds.split(",")
    if not set(chosen) <= set(KINDS):
        raise typer.BadParameter(f"{kinds!r}, expected some of {', '.join(KINDS)}", param_hint="--kinds")
    if auxiliary is not None and "adapted-trained" in chosen:
        raise typer.BadParameter(
            "given with --kinds adapted-trained, expected --depth alone", param_hint="--auxiliary"
        )
    taps = KVTaps(load_part(base).model)
    train, held = Recording(folder / "train"), Recording(folder / held_out)
    study: Forms
    if auxiliary is None:
        train.done = min(windows or len(train), len(train))
        study, name = Forms(taps, depth or 1, train, held), f"{depth}-{len(train)}"
    else:
        small, name = KVTaps(load_part(auxiliary).model), Path(auxiliary).name
        train = read_by(small, train, folder / f"train-{name}", windows)
        held = read_by(small, held, folder / f"{held_out}-{name}", None)
        if depth is None:
            study, name = TwoModelForms(taps, len(small), train, held), f"{name}-{len(train)}"
        else:
            study, name = BothForms(taps, depth, len(small), train, held), f"{depth}-{name}-{len(train)}"
    rows: dict[str, Any] = {}
    linear: Scores | None = None
    given = numbers("--ranks", ranks or ["64,256"], 1)
    training = TrainingSettings(
        iters, batch_size, learning_rate, warmup=min(10, iters // 5), weight_decay=0.0, steps_per_report=4
    )
    for form_name, form in study.forms(chosen, distances, given, hidden, epochs, training, adapter_rank):
        scores = study.score(form)
        linear = linear or scores
        found = {
            "itself": estimates(study.held, scores),
            "over linear": estimates(study.held, scores, over=linear),
        }
        rows[form_name] = {
            which: {m: dataclasses.asdict(values[m]) for m in SHOWN} for which, values in found.items()
        }
        print(form_name, json.dumps(rows[form_name]["over linear"]), flush=True)
        facts = {"base": Path(base).name, "read by": name, "windows": len(study.train), "forms": rows}
        if {*TRAINED} & {*chosen}:
            facts["training"] = dataclasses.asdict(training)
        text = json.dumps(facts, indent=1)
        write_file(folder / f"forms-{name}.json", lambda beside, text=text: beside.write_text(text))  # type: ignore[misc]


def read_by(auxiliary: KVTaps, recording: Recording, folder: Path, windows: int | None) -> Recording:
    """The same windows, less than all of them if `windows` says so, with what a second model's layers read of them.

    Goes on where it was stopped, or with more windows than were read before.
    """
    count = min(windows or len(recording), len(recording))
    read = Recording(folder).done if (folder / FACTS).is_file() else 0
    if read < count:
        folder.mkdir(parents=True, exist_ok=True)
        facts = json.loads((recording.folder / FACTS).read_text())
        for name in facts["arrays"]:
            link = folder / f"{name}.npy"
            link.unlink(missing_ok=True)
            link.symlink_to((recording.folder / link.name).resolve())
        rows = len(np.load(recording.folder / "prompts.npy", mmap_mode="r"))
        with progress_bar("reading") as progress:
            for i in range(read, count):
                tokens = recording.rows([i], features=[])["prompts"][:, :-1]
                features: dict[str, int] = {}
                for j, (array,) in enumerate(sources.record("hidden", auxiliary, tokens)[0]):
                    place, shape = folder / f"auxiliary_{j}.npy", (rows, *array.shape[1:])
                    if i == 0:
                        np.lib.format.open_memmap(place, "w+", np.float16, shape).flush()
                    np.load(place, mmap_mode="r+")[i] = np.array(array.astype(mx.float32))[0]
                    features[place.stem] = array.shape[-1]
                now = {
                    "features": facts["features"] | features,
                    "arrays": [*facts["arrays"], *features],
                    "done": i + 1,
                }
                write_json(folder / FACTS, facts | now)
                progress(i + 1, count)
    found = Recording(folder)
    found.done = min(found.done, count)
    return found


if __name__ == "__main__":
    command.run(main)
