"""What prediction saves on models with recurrent and convolutional states, beside what FLOPs allow.

`python -m kvpred_mlx.bench.studies.hybrids --prompt-lens 512,2048` builds the three families of `scans` with random
weights and times, side by side, a full prefill, the same caches made from given keys, values and places (nothing
predicted: the scans are what is left), and a prefill by half of the base's own layers with the others predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.common.flops import ttft_flops
from kvpred_mlx.bench.common.statistics import Interval, paired_ratio
from kvpred_mlx.bench.studies.scans import (
    FAMILIES,
    VOCABULARY,
    Layers,
    PromptLens,
    Trials,
    Width,
    begin,
    build,
    time_filling,
)
from kvpred_mlx.console import numbers, progress_bar
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.progress import ProgressCallback, no_progress
from kvpred_mlx.taps.kv_taps import KVTaps


@dataclass(frozen=True)
class Row:
    """What was found of a model and a prompt's length.

    Args:
        family: mlx-lm's name of the model.
        prompt_tokens: length.
        injected: share of a full prefill's time that making the caches from given arrays takes.
        sooner: how many times sooner the caches are filled by half of the layers and the maps.
        allowed: what FLOPs allow; scans, convolutions and gates count nothing.
    """

    family: str
    prompt_tokens: int
    injected: Interval
    sooner: Interval
    allowed: float


def main(
    prompt_lens: PromptLens = None,
    layers: Layers = 8,
    width: Width = 1024,
    trials: Trials = 5,
) -> None:
    """Full, injected and half-predicted prefill of models with states."""
    lengths = numbers("--prompt-lens", prompt_lens or ["512,2048"], 33)
    begin(layers, width)
    for family in FAMILIES:
        with progress_bar(family) as progress:
            for row in measure(family, layers, width, lengths, trials, progress):
                print(text(row), flush=True)


def text(row: Row) -> str:
    """One line."""
    quotient = row.sooner.median / row.allowed
    return (
        f"{row.family}, {row.prompt_tokens} tokens: injected {row.injected} of a full prefill's time; half of the "
        f"layers {row.sooner} times sooner, FLOPs allow {row.allowed:.2f}, quotient {quotient:.2f}"
    )


def measure(
    family: str,
    layers: int,
    width: int,
    prompt_lens: list[int],
    trials: int,
    progress: ProgressCallback = no_progress,
) -> Iterator[Row]:
    """A row for each length; the three ways in turn, one round not counted."""
    taps = KVTaps(build(family, layers, width))
    predictor = FirstLayersPredictor([layers // 2], taps.input_widths, taps.widths)
    pair = KVPredictionModel(taps, None, predictor)
    mx.eval(pair.parameters())
    for n in prompt_lens:
        tokens = mx.random.randint(0, VOCABULARY, (1, n - 1), key=mx.random.key(n))
        kv, _ = taps.record(tokens, make_prompt_cache(taps.model))
        mx.eval(kv)

        def inject(tokens: mx.array, cache: list[Any], kv: Any = kv) -> None:
            taps.inject(kv, tokens, cache, logits=False)

        ways: dict[str, Callable[..., Any]] = {
            "full": taps.model,
            "injected": inject,
            "half": lambda tokens, cache: pair(tokens, cache=[*cache, pair.make_cache()[-1]]),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for trial in range(trials + 1):
            progress(trial, trials + 1, f"{n} tokens")
            for name, way in ways.items():
                seconds[name].append(time_filling(way, tokens, make_prompt_cache(taps.model)))
        full, injected, half = (times[1:] for times in seconds.values())
        allowed = ttft_flops(pair, n).ratio
        yield Row(family, n, paired_ratio(injected, full), paired_ratio(full, half), allowed)


if __name__ == "__main__":
    command.run(main)
