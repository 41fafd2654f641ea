"""The bench: every mode at every shape, trials interleaved, results as one JSON-ready dictionary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx

from kvpred_mlx.bench.common import machine
from kvpred_mlx.bench.common.flops import TTFT, prefill_bytes, ttft_flops
from kvpred_mlx.bench.common.pairs import computed_dtype, describe_pair
from kvpred_mlx.bench.common.results import Results, begin
from kvpred_mlx.bench.common.statistics import NOISY, paired_ratio, spread
from kvpred_mlx.bench.ttft.measure import Parts, Trial, generate, model_of, modes_of, parts
from kvpred_mlx.bench.ttft.settings import BenchSettings
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.progress import ProgressCallback, no_progress

SCHEMA = 1
BEST = "best step sizes"


def bench(
    pair: KVPredictionModel,
    name: str,
    settings: BenchSettings,
    prompt: list[int] | None = None,
    notes: Sequence[str] = (),
    progress: ProgressCallback = no_progress,
    finished: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure a pair; the schema of what is returned is in docs/benchmarking.md.

    Args:
        name: what the results call the pair.
        prompt: token ids to take prompts from (default: random ones).
        notes: warnings that the caller has.
        progress: called before each generation.
        finished: called with the results so far after each shape.

    Raises:
        KeyboardInterrupt: passed on; the shapes that were finished have been given to `finished`.
    """
    busy = machine.busy_share()
    results = begin(
        SCHEMA,
        describe_pair(pair, name),
        dataclasses.asdict(settings) | {"prompt": "random" if prompt is None else "given"},
        matrix_product_flops_per_second=machine.matrix_product_peak(computed_dtype(pair)),
        warnings=[*notes, *machine.warnings(busy)],
        shapes=[],
        skipped=[],
    )
    shapes = [(n, b) for b in settings.batch_sizes for n in settings.prompt_lens]
    rounds = settings.trials + 1
    for i, (n, b) in enumerate(shapes):
        report = partial(_report, progress, i * rounds, len(shapes) * rounds, f"{n} tokens x {b}")
        measured, skipped = _measure(pair, prompt, n, b, settings, report)
        results["shapes"] += [measured] if measured else []
        results["skipped"] += [skipped] if skipped else []
        results["complete"] = i + 1 == len(shapes)
        finished(results)
    return results


def _measure(
    pair: KVPredictionModel,
    prompt: list[int] | None,
    n: int,
    b: int,
    settings: BenchSettings,
    report: Callable[[int, str], None],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """A shape's measurement, or why it does not fit."""
    step_sizes = _distinct(settings.prefill_step_sizes, n)
    memory = _memory(pair, n, b, step_sizes)
    try:
        if memory["estimated_bytes"] > memory["available_bytes"]:
            raise MemoryError("it is estimated not to fit")
        return _shape(pair, _tokens(pair, prompt, n, b, settings), step_sizes, settings, report), None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error).lower():
            raise
        return None, {"prompt_tokens": n, "batch_size": b, **memory, "reason": str(error)}


def _shape(
    pair: KVPredictionModel,
    tokens: mx.array,
    step_sizes: list[int],
    settings: BenchSettings,
    report: Callable[[int, str], None],
) -> dict[str, Any]:
    """One warm-up and then the trials of all modes, one after the other in every round."""
    b, n = tokens.shape
    runs: dict[tuple[str, int], list[Trial]] = {(m, s): [] for s in step_sizes for m in modes_of(pair)}
    apart: list[Parts] = []
    apart_too = n > pair.min_prompt_tokens and not pair.exact_positions
    for trial in range(-1, settings.trials):
        for (mode, step_size), trials in runs.items():
            report(trial + 1, f"{'warm-up' if trial < 0 else f'trial {trial + 1}'}, {mode}")
            made = generate(model_of(pair, mode), tokens, step_size, settings.max_tokens if trial >= 0 else 2)
            trials += [made] if trial >= 0 else []
        if apart_too:
            made_apart = parts(pair, tokens, step_sizes[0])
            apart += [made_apart] if trial >= 0 else []
    flops = ttft_flops(pair, n)
    shape: dict[str, Any] = {
        "prompt_tokens": n,
        "batch_size": b,
        "flops": {mode: b * getattr(flops, mode) for mode in modes_of(pair)},
        "flops_ratio": flops.ratio,
        "runs": [_run(mode, step, trials, b, flops) for (mode, step), trials in runs.items()],
        "parts": [dataclasses.asdict(p) for p in apart],
        "parts_prefill_step_size": step_sizes[0],
    }
    shape["ratios"] = _ratios(shape, settings.seed)
    shape["warnings"] = [
        f"{run['mode']} at step size {run['prefill_step_size']}: TTFT spread {run['ttft_spread']:.0%}"
        for run in shape["runs"]
        if run["ttft_spread"] > NOISY
    ]
    return shape


def _run(mode: str, step_size: int, trials: list[Trial], batch_size: int, flops: TTFT) -> dict[str, Any]:
    ttft = median(t.ttft for t in trials)
    return {
        "mode": mode,
        "prefill_step_size": step_size,
        "ttft": ttft,
        "ttft_spread": spread([t.ttft for t in trials]),
        "flops_per_second": batch_size * getattr(flops, mode) / ttft,
        "trials": [dataclasses.asdict(t) for t in trials],
    }


def _ratios(shape: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """How many times sooner the first token comes: at the first step size, and best against best."""
    by_mode = {mode: [r for r in shape["runs"] if r["mode"] == mode] for mode in ("exact", "predicted")}
    choices = {"same step size": {mode: runs[0] for mode, runs in by_mode.items()}}
    if len(by_mode["exact"]) > 1:
        choices[BEST] = {m: min(runs, key=lambda r: r["ttft"]) for m, runs in by_mode.items()}
    found = []
    for name, chosen in choices.items():
        seconds = {mode: [t["ttft"] for t in run["trials"]] for mode, run in chosen.items()}
        ratio = paired_ratio(seconds["exact"], seconds["predicted"], seed)
        steps = {f"{mode}_step_size": run["prefill_step_size"] for mode, run in chosen.items()}
        quotient = {"quotient": ratio.median / shape["flops_ratio"]}
        found.append({"compared": name, **steps, **ratio.as_dict(), **quotient})
    return found


def _distinct(step_sizes: list[int], prompt_tokens: int) -> list[int]:
    """The step sizes that cut the prompt differently; all that hold it whole are one."""
    whole = [s for s in step_sizes if s >= prompt_tokens - 1][:1]
    return [s for s in step_sizes if s < prompt_tokens - 1 or s in whole]


def _memory(
    pair: KVPredictionModel, prompt_tokens: int, batch_size: int, step_sizes: list[int]
) -> dict[str, int]:
    """Bytes that a full prefill needs beside the weights, and bytes that there are."""
    mx.clear_cache()
    needed = max(prefill_bytes(pair.base, batch_size, prompt_tokens, s) for s in step_sizes)
    return {"estimated_bytes": needed, "available_bytes": machine.available_bytes()}


def _report(progress: ProgressCallback, before: int, total: int, shape: str, done: int, what: str) -> None:
    progress(before + done, total, f"{shape}: {what}")


def _tokens(
    pair: KVPredictionModel, prompt: list[int] | None, n: int, batch_size: int, settings: BenchSettings
) -> mx.array:
    if prompt is None:
        key = mx.random.key(settings.seed)
        tokens = mx.random.randint(0, pair.vocab_size, (batch_size, n), key=key)
    else:
        tokens = mx.array([prompt[:n]] * batch_size)
    mx.eval(tokens)
    return tokens
