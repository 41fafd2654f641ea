"""What reading a prompt in pieces gives on MLX's CPU backend: `python -m kvpred_mlx.bench.studies.pieces 512`.

Times how long a model takes to read a prompt up to its last keys and values: whole, in pieces one after the
other, and in pieces on several streams (`kvpred_mlx.pair.cpu_prefill`), for the auxiliary, which the engine reads that
way, and for the base, which it leaves to mlx-lm.  `MLX_BFS_MAX_WIDTH=20` shows the last with MLX's own order of
evaluation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.bench.common.presets import build_preset
from kvpred_mlx.pair import cpu_prefill
from kvpred_mlx.pair.sources import Features
from kvpred_mlx.taps.kv_taps import KVTaps

PRESET = "openelm-1_1b:openelm-270m"
TRIALS = 3
Read = Callable[[Callable[[mx.array], Sequence[Features]], mx.array], Sequence[Features]]


def main(prompt_lens: list[int]) -> None:
    """Print the median seconds of each way at each length."""
    ways: dict[str, Read] = {
        "whole": lambda record, tokens: record(tokens),
        "pieces": partial(cpu_prefill.read, streams=[]),
        "pieces on streams": cpu_prefill.read,
    }
    pair = build_preset(PRESET, mx.float32, seed=0)
    for name, model in (("auxiliary", pair.auxiliary), ("base", pair.base)):
        taps = KVTaps(model)
        for n in prompt_lens:
            tokens = mx.random.randint(0, pair.vocab_size, (1, n - 1))
            seconds = {way: [_seconds(taps, model, read, tokens)] for way, read in ways.items()}
            for _ in range(TRIALS):
                for way, read in ways.items():
                    seconds[way].append(_seconds(taps, model, read, tokens))
            found = ", ".join(f"{way} {median(s[1:]):.2f} s" for way, s in seconds.items())
            print(f"{name}, {n - 1} tokens: {found}", flush=True)


def _seconds(taps: KVTaps, model: nn.Module, read: Read, tokens: mx.array) -> float:
    cache = make_prompt_cache(model)
    mx.clear_cache()
    start = time.perf_counter()
    mx.eval(read(lambda piece: taps.record(piece, cache)[0], tokens))
    return time.perf_counter() - start


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [512])
