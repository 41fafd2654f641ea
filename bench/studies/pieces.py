"""What reading a prompt in pieces gives on MLX's CPU backend: `python -m kvpred_mlx.bench.studies.pieces`.

Times how long a model takes to read a prompt up to its last keys and values: whole, in pieces one after the
other, and in pieces on several streams (`kvpred_mlx.pair.cpu_prefill`), for the auxiliary, which the engine
reads that way, and for the base, which it leaves to mlx-lm.  `MLX_BFS_MAX_WIDTH=20` shows the last with MLX's
own order of evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.common.presets import build_preset, find_preset
from kvpred_mlx.console import numbers, progress_bar
from kvpred_mlx.pair import cpu_prefill
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.sources import Features
from kvpred_mlx.progress import ProgressCallback, no_progress
from kvpred_mlx.taps.kv_taps import KVTaps

PRESET = "openelm-1_1b:openelm-270m"
TRIALS = 3
Read = Callable[[Callable[[mx.array], Sequence[Features]], mx.array], Sequence[Features]]


def _known(preset: str) -> str:
    try:
        return find_preset(preset).name
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def main(
    prompt_lens: Annotated[list[str] | None, typer.Option(help="Prompt lengths in tokens, 512,2048.")] = None,
    preset: Annotated[
        str, typer.Option(help="A published pair's shapes with random weights.", callback=_known)
    ] = PRESET,
) -> None:
    """Time reading a prompt whole, in pieces, and in pieces on several streams."""
    lengths = numbers("--prompt-lens", prompt_lens or ["512"], 2)
    pair = build_preset(preset, mx.float32, seed=0)
    with progress_bar("reading") as progress:
        for name, tokens, seconds in measure(pair, lengths, progress):
            found = ", ".join(f"{way} {spent:.2f} s" for way, spent in seconds.items())
            print(f"{name}, {tokens} tokens: {found}", flush=True)


def measure(
    pair: KVPredictionModel, prompt_lens: list[int], progress: ProgressCallback = no_progress
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Which model, how many tokens it read, and the median seconds of each way; one round is not counted."""
    ways: dict[str, Read] = {
        "whole": lambda record, tokens: record(tokens),
        "pieces": partial(cpu_prefill.read, streams=[]),
        "pieces on streams": cpu_prefill.read,
    }
    for name, model in (("auxiliary", pair.auxiliary_model), ("base", pair.base)):
        taps = KVTaps(model)
        for n in prompt_lens:
            tokens = mx.random.randint(0, pair.vocab_size, (1, n - 1))
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for trial in range(TRIALS + 1):
                progress(trial, TRIALS + 1, f"{name}, {n - 1} tokens")
                for way, read in ways.items():
                    seconds[way].append(_seconds(taps, model, read, tokens))
            yield name, n - 1, {way: median(spent[1:]) for way, spent in seconds.items()}


def _seconds(taps: KVTaps, model: nn.Module, read: Read, tokens: mx.array) -> float:
    cache = make_prompt_cache(model)
    mx.clear_cache()
    start = time.perf_counter()
    mx.eval(read(lambda piece: taps.record(piece, cache)[0], tokens))
    return time.perf_counter() - start


if __name__ == "__main__":
    command.run(main)
