"""One timed generation, and the parts of a predicted one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.generation.chunks import announce_prompt
from kvpred_mlx.pair import cpu_prefill
from kvpred_mlx.pair.description import weight_bytes
from kvpred_mlx.pair.model import KVPredictionModel

MODES = ("exact", "predicted", "auxiliary")
PARTS = {"auxiliary": "auxiliary", "projection": "projection and cache", "base_step": "base step"}


@dataclass(frozen=True)
class Trial:
    """One generation.

    Args:
        started: when, in seconds of `time.perf_counter`.
        ttft: seconds until the first token's value was on the host.
        decode_tokens_per_second: of all rows together, after the first token; None if there was one token.
        peak_bytes: the largest memory until the first token, as if only this mode's models were loaded.
        cache_bytes: of the prompt cache at the first token.
    """

    started: float
    ttft: float
    decode_tokens_per_second: float | None
    peak_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class Parts:
    """Seconds of the parts of a predicted TTFT, each evaluated by itself.

    Together they take longer than the TTFT: MLX is lazy, and left alone it overlaps and fuses across them.
    """

    started: float
    auxiliary: float  # or the base's first layers
    projection: float
    base_step: float


def modes_of(pair: KVPredictionModel) -> tuple[str, ...]:
    """The modes that a pair can be measured in."""
    return MODES if pair.auxiliary is not None else MODES[:2]


def model_of(pair: KVPredictionModel, mode: str) -> nn.Module:
    """The model that a mode generates with."""
    return pair.auxiliary_model if mode == "auxiliary" else {"exact": pair.base, "predicted": pair}[mode]


def generate(model: nn.Module, tokens: mx.array, step_size: int, max_tokens: int) -> Trial:
    """Generate greedily from `tokens` [B, n] as mlx-lm does: `generate_step` for one row, or its batches."""
    resident = mx.get_active_memory()
    mx.reset_peak_memory()
    clock = _Clock()
    started = time.perf_counter()
    run = _one_row if tokens.shape[0] == 1 else _rows
    steps = run(model, tokens, step_size, max_tokens, clock)
    rate = tokens.shape[0] * (len(steps) - 1) / (steps[-1] - steps[0]) if len(steps) > 1 else None
    peak = clock.peak_bytes - resident + weight_bytes(model)
    return Trial(started, clock.first - started, rate, peak, clock.cache_bytes)


def parts(pair: KVPredictionModel, tokens: mx.array, step_size: int) -> Parts:
    """The parts of a predicted TTFT for `tokens` [B, n]."""
    started = before = time.perf_counter()
    spent = dict.fromkeys(PARTS, 0.0)

    def lap(name: str, *arrays: Any) -> None:
        nonlocal before
        mx.eval(*arrays)
        now = time.perf_counter()
        spent[name] += now - before
        before = now

    reader, (*base_cache, entry) = pair.first_layers_reader, pair.make_cache()
    prompt, last = tokens[:, :-1], tokens[:, -1:]
    for first in range(0, prompt.shape[1], step_size):
        chunk = prompt[:, first : first + step_size]
        if reader is not None:  # the first layers read; what the others keep follows from them
            reader.fill(chunk, base_cache)
            lap("auxiliary", [c.state for c in base_cache[: reader.depth + 1]])
            lap("projection", [c.state for c in base_cache])
            continue
        recorded = cpu_prefill.read(partial(pair.auxiliary_features, caches=entry.auxiliary), chunk)
        lap("auxiliary", recorded, [c.state for c in entry.auxiliary])
        pair.fill(pair.predictor(recorded), chunk, base_cache)
        lap("projection", [c.state for c in base_cache])
    lap("base_step", mx.argmax(pair.base(last, cache=base_cache)[:, -1], axis=-1))
    return Parts(started, **spent)


class _Clock:
    """A greedy sampler that waits for the first token's value and notes when it came."""

    def __init__(self) -> None:
        self.first, self.peak_bytes, self.cache_bytes = 0.0, 0, 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        token = mx.argmax(logprobs, axis=-1)
        if not self.first:
            token.tolist()
            self.first = time.perf_counter()
            self.peak_bytes = mx.get_peak_memory()
        return token


def _one_row(
    model: nn.Module, tokens: mx.array, step_size: int, max_tokens: int, clock: _Clock
) -> list[float]:
    options: dict[str, Any] = {"prefill_step_size": step_size}
    if isinstance(model, KVPredictionModel):
        announce_prompt(model, tokens.shape[1], options)
    cache = options.setdefault("prompt_cache", make_prompt_cache(model))
    steps = []
    for _ in generate_step(tokens[0], model, max_tokens=max_tokens, sampler=clock, **options):
        steps.append(time.perf_counter())
        clock.cache_bytes = clock.cache_bytes or sum(c.nbytes for c in cache)
    return steps


def _rows(model: nn.Module, tokens: mx.array, step_size: int, max_tokens: int, clock: _Clock) -> list[float]:
    rows = tokens.shape[0]
    sizes: Any = {"completion_batch_size": rows, "prefill_batch_size": rows, "prefill_step_size": step_size}
    batch = BatchGenerator(model, max_tokens=max_tokens, sampler=clock, **sizes)
    prompts: Any = tokens.tolist()
    batch.insert(prompts)
    steps = []
    while batch.next_generated():
        steps.append(time.perf_counter())
        clock.cache_bytes = clock.cache_bytes or batch.prompt_cache_nbytes
    batch.close()
    return steps
