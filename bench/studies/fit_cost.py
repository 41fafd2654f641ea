"""What a closed-form fit costs beside the forward passes that it cannot do without.

`python -m kvpred_mlx.bench.studies.fit_cost --base BASE --auxiliary SMALL --data TEXT`, or without `--auxiliary` for a
base and its own first half.  The forward passes over the same batches are timed before and after the fit.  Solving
takes as long for many tokens as for few, so it stands apart from reading.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer

from kvpred_mlx.bench.common import command, machine
from kvpred_mlx.console import progress_bar
from kvpred_mlx.making.data import PackedSequences, encode, read_documents
from kvpred_mlx.making.fit import fit, fit_first_layers
from kvpred_mlx.making.layer_maps import first_layers
from kvpred_mlx.making.pairing import load_part
from kvpred_mlx.making.regression import FirstLayers, Recorder, TwoModels
from kvpred_mlx.making.settings import FitSettings
from kvpred_mlx.pair.description import weight_bytes
from kvpred_mlx.taps.kv_taps import KVTaps


def main(
    base: Annotated[str, typer.Option(help="Any mlx-lm model.")],
    data: Annotated[Path, typer.Option(help="Text to fit on.")],
    auxiliary: Annotated[str | None, typer.Option(help="A second model that reads.")] = None,
    layers: Annotated[str, typer.Option(help="Without it: the base's own layers.")] = "first:0.5",
    tokens: Annotated[int, typer.Option(min=2048, help="Tokens of the fit.")] = 16_384,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 4,
    layer_map: Annotated[str, typer.Option(help="As fit's.")] = "auto",
) -> None:
    """Time a fit against its forward passes, and find the most memory that it takes."""
    loaded = load_part(base)
    taps = KVTaps(loaded.model)
    small = None if auxiliary is None else KVTaps(load_part(auxiliary).model)
    held = weight_bytes(taps.model) + (0 if small is None else weight_bytes(small.model))
    resident = _resident()
    length, documents = 512, list(read_documents(data))
    packed = PackedSequences.of(encode(loaded.tokenizer, documents), length, loaded.tokenizer.eos_token_id)  # type: ignore[union-attr]
    settings = FitSettings(tokens, batch_size, layer_map=layer_map)
    batches = min(tokens // length, len(packed)) // batch_size
    depths = first_layers(layers, len(taps))
    recorder: Recorder = (
        FirstLayers(taps, depths) if small is None else TwoModels(taps, small, settings.source)
    )
    before = _forward(recorder, packed, settings, batches)
    times: dict[str | None, list[float]] = {}
    began = time.perf_counter()
    with progress_bar("fitting") as progress:

        def timed(done: int, total: int, what: str | None = None) -> None:
            times.setdefault(what, []).append(time.perf_counter())
            progress(done, total, what)

        if small is None:
            fitted: Any = fit_first_layers(taps, depths, packed, settings, timed)
        else:
            fitted = fit(taps, small, packed, settings, timed)
    seconds = time.perf_counter() - began
    reading = sum(marks[-1] - marks[0] for marks in times.values())
    after = _forward(recorder, packed, settings, batches)
    forward = (before + after) / 2
    found = {
        "base": Path(base).name,
        "read by": layers if auxiliary is None else Path(auxiliary).name,
        "tokens": fitted.tokens,
        "fit_seconds": seconds,
        "forward_seconds": [before, after],
        "reading_seconds": reading,
        "solving_seconds": seconds - reading,
        "reading_over_forward": reading / forward,
        "fit_over_forward": seconds / forward,
        "tokens_per_second": fitted.tokens / seconds,
        "weight_bytes": held,
        "peak_resident_bytes": _resident(),
        "resident_bytes_before": resident,
        "peak_over_weights_bytes": _resident() - held,
        "machine": machine.describe(),
    }
    print(json.dumps(found, indent=1))


def _forward(recorder: Recorder, packed: PackedSequences, settings: FitSettings, batches: int) -> float:
    """Seconds of the forward passes over all batches."""
    began = time.perf_counter()
    for i in range(batches):
        features, targets, _ = recorder.record(packed.batch(i, settings.batch_size, settings.seed)[:, :-1])
        mx.eval(features, targets)
    return time.perf_counter() - began


def _resident() -> int:
    return machine.peak_resident_bytes(resource.getrusage(resource.RUSAGE_SELF))


if __name__ == "__main__":
    command.run(main)
