"""The Pareto front: quality of every method at every budget against FLOPs and measured TTFT, resumable.

A *cell* is a method at a budget and a prompt length.  For each length the cells are scored on real text, then on
recall, then timed, trials interleaved; the results are complete after each of these steps, so that an interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.bench.common import machine
from kvpred_mlx.bench.common.statistics import paired_ratio, paired_shares
from kvpred_mlx.bench.front import recall_score
from kvpred_mlx.bench.front.baselines import METHODS, usable
from kvpred_mlx.bench.ttft.run import describe_pair
from kvpred_mlx.making import quality
from kvpred_mlx.making.quality import Prefill
from kvpred_mlx.making.windows import Windows, cut_windows
from kvpred_mlx.pair.model import KVPredictionModel

SCHEMA = 2
KIND = "pareto"
SHOWN = ("agreement", "first_token_agreement", "retention", "cross_entropy")
OVER = "predicted"  # what gains are over
BUDGETS = [0.05, 0.1, 0.2, 0.4]
Results = dict[str, Any]
Cell = dict[str, Any]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        prompt_lens: prompt lengths, in tokens.
        methods: of `METHODS`; `exact` is always among them.
        budgets: shares of the prompt (or of the layers) for the methods that have a budget.
        windows: prompts of real text at most, and how many tokens are scored after each.
        score_tokens: see `windows`.
        questions: recall questions of each kind at each depth; 0 leaves recall out.
        trials: timed first tokens of each cell.
        seed: of questions, random prompts and bootstraps.
    """

    prompt_lens: list[int]
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    budgets: list[float] = field(default_factory=lambda: list(BUDGETS))
    windows: int = 160
    score_tokens: int = 64
    questions: int = 10
    trials: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Held-out text: token ids for scoring, the text itself for recall."""

    tokenizer: Any
    documents: Sequence[str]
    ids: Sequence[Sequence[int]]

    def windows(self, settings: Settings) -> dict[int, Windows]:
        """Prompts of real text, by their length."""
        return {
            n: cut_windows(self.ids, n, settings.score_tokens, self.tokenizer, settings.windows)
            for n in settings.prompt_lens
        }

    def describe(self, windows: dict[int, Windows]) -> dict[str, Any]:
        """What tells this text from another, and how much of it is scored."""
        checksum = 0
        for ids in self.ids:
            checksum = crc32(np.asarray(ids, np.int64).tobytes(), checksum)
        return {
            "checksum": checksum,
            "windows": {str(n): len(cut) for n, cut in windows.items()},
            "documents": {str(n): len(set(cut.documents)) for n, cut in windows.items()},
        }


def pareto(
    pair: KVPredictionModel,
    name: str,
    settings: Settings,
    data: Data | None = None,
    before: Results | None = None,
    progress: Progress = lambda done, total, what: None,
    finished: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure the front of a pair; the schema of what is returned is in docs/dial.md.

    Args:
        data: without it (random weights) only FLOPs and times are measured.
        before: results of an interrupted run with the same settings.
        progress: called with what is done, and how far it is.
        finished: called with the results so far after every step.

    Raises:
        ValueError: a prompt is too short to be predicted; `before` is of another pair, other settings or another
            text; or no document is long enough.
        KeyboardInterrupt: passed on.
    """
    short = [n for n in settings.prompt_lens if n <= pair.min_prompt_tokens]
    if short:
        raise ValueError(
            f"prompt lengths {short}, expected more than {pair.min_prompt_tokens} tokens: "
            "this pair runs its base alone for shorter prompts"
        )
    windows = {} if data is None else data.windows(settings)
    results = _begin(pair, name, settings, data.describe(windows) if data else None)
    if before is not None:
        _check_same(before, results)
        results = before
    finished(results)  # a folder that cannot be written is found out now

    def warn(note: str) -> None:
        results["warnings"] += [note] if note not in results["warnings"] else []

    for n in settings.prompt_lens:
        cells = [c for c in results["cells"] if c["prompt_tokens"] == n and c["skipped"] is None]
        if data is not None:
            _score(pair, windows[n], cells, settings, n, progress, lambda: finished(results))
            _recall(pair, data, cells, settings, n, progress, lambda: finished(results), warn)
        _time(pair, cells, settings, n, progress, lambda: finished(results))
    results["complete"] = True
    finished(results)
    return results


def prefills(pair: KVPredictionModel, cells: Sequence[Cell]) -> dict[str, Prefill]:
    """How every cell reads a prompt, by its label."""
    return {label(c): METHODS[c["method"]].prefill(pair, c["budget"]) for c in cells}


def label(cell: Cell) -> str:
    """`dial-last 0.1`, or `exact`."""
    return cell["method"] if cell["budget"] is None else f"{cell['method']} {cell['budget']:g}"


def _begin(pair: KVPredictionModel, name: str, settings: Settings, data: dict[str, Any] | None) -> Results:
    names = ["exact", *(m for m in settings.methods if m != "exact")]
    reasons = usable(pair, names)
    cells = [
        _cell(pair, n, method, budget, reasons.get(method))
        for n in settings.prompt_lens
        for method in names
        for budget in (settings.budgets if METHODS[method].budgets else [None])
    ]
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["kvpred-mlx", *sys.argv[1:]],
        "machine": machine.describe(),
        "pair": describe_pair(pair, name),
        "settings": dataclasses.asdict(settings),
        "data": data,
        "warnings": machine.warnings(machine.busy_share()),
        "cells": cells,
        "complete": False,
    }


def _cell(
    pair: KVPredictionModel, n: int, method: str, budget: float | None, reason: str | None
) -> dict[str, Any]:
    flops = None if reason else METHODS[method].flops(pair, n, budget or 0.0)
    return {
        "prompt_tokens": n,
        "method": method,
        "budget": budget,
        "flops": flops,
        "quality": None,
        "recall": None,
        "gain": None,
        "ttft": None,
        "sooner": None,
        "trials": [],
        "skipped": reason,
    }


def _check_same(before: Results, now: Results) -> None:
    for part in ("pair", "settings", "data"):
        then, here = before[part] or {}, now[part] or {}
        differ = [k for k in then | here if then.get(k) != here.get(k)]
        if differ:
            given = ", ".join(f"{k} {then.get(k)!r}, now {here.get(k)!r}" for k in differ)
            raise ValueError(f"the {part} of the results there and now differ: {given}")


def _score(
    pair: KVPredictionModel, cut: Windows, cells: list[Cell], settings: Settings, n: int,
    progress: Progress, finished: Callable[[], None],
) -> None:  # fmt: skip
    """Quality on real text, all cells of a length at once: they are compared with one exact run."""
    if all(c["quality"] is not None for c in cells):
        return
    without: Prefill = lambda prompt: (pair.base, make_prompt_cache(pair.base))
    found = quality.measure(
        pair, cut, {"exact": METHODS["exact"].prefill(pair, 0.0), "no prompt": without} | prefills(pair, cells),
        over=OVER if any(c["method"] == OVER for c in cells) else None, seed=settings.seed,
        progress=lambda done, total, what=None: progress(done, total, f"{n} tokens: text"),
    )  # fmt: skip
    for cell in cells:
        figures = found.modes[label(cell)]
        cell["quality"] = {m: dataclasses.asdict(figures[m]) for m in SHOWN}
        if found.gains:
            cell["gain"] = {m: dataclasses.asdict(found.gains[label(cell)][m]) for m in SHOWN}
    finished()


def _recall(
    pair: KVPredictionModel, data: Data, cells: list[Cell], settings: Settings, n: int,
    progress: Progress, finished: Callable[[], None], warn: Callable[[str], None],
) -> None:  # fmt: skip
    if not settings.questions:
        return
    missing = [c for c in cells if c["recall"] is None]
    if missing:
        try:
            asked = recall_score.questions(
                data.tokenizer, data.documents, n, settings.questions, settings.seed
            )
        except ValueError as error:  # the facts alone are longer than the prompt
            warn(f"no recall at {n} tokens: {error}")
            return
        for cell in missing:
            prefill = METHODS[cell["method"]].prefill(pair, cell["budget"] or 0.0)
            right = recall_score.recalled(
                prefill, asked,
                progress=lambda done, total, cell=cell: progress(done, total, f"{n} tokens: recall, {label(cell)}"),
            )  # fmt: skip
            cell["recall"] = recall_score.summary(asked, right)
            finished()
    for cell in cells:
        if cell["gain"]:
            over = next(c for c in cells if c["method"] == OVER)
            answers = ([r == "1" for r in c["recall"]["right"]] for c in (cell, over))
            cell["gain"]["recall"] = paired_shares(*answers)
    finished()


def _time(
    pair: KVPredictionModel, cells: list[Cell], settings: Settings, n: int,
    progress: Progress, finished: Callable[[], None],
) -> None:  # fmt: skip
    """TTFT of every cell that has none, and of `exact` beside them; one untimed round first."""
    if all(c["ttft"] is not None for c in cells):
        return
    timed = [c for c in cells if c["ttft"] is None or c["method"] == "exact"]
    tokens = mx.random.randint(0, pair.vocab_size, (1, n), key=mx.random.key(settings.seed))
    made = prefills(pair, timed)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for trial in range(settings.trials + 1):
        for i, (name, prefill) in enumerate(made.items()):
            progress(trial * len(made) + i, (settings.trials + 1) * len(made), f"{n} tokens: TTFT, {name}")
            spent = first_token_seconds(prefill, tokens)
            if trial:
                seconds[name].append(spent)
    for cell in timed:
        cell["trials"] = seconds[label(cell)]
        cell["ttft"] = median(cell["trials"])
        cell["sooner"] = paired_ratio(seconds["exact"], cell["trials"], settings.seed).as_dict()
    finished()


def first_token_seconds(prefill: Prefill, tokens: mx.array) -> float:
    """Seconds until the value of the first token after `tokens` [1, n] is on the host."""
    mx.clear_cache()
    start = time.perf_counter()
    model, cache = prefill(tokens)
    mx.eval([c.state for c in cache])
    mx.argmax(_last_step(model, tokens, cache)).item()
    return time.perf_counter() - start


def _last_step(model: nn.Module, tokens: mx.array, cache: list[Any]) -> mx.array:
    return model(tokens[:, -1:], cache=cache)[:, -1]
