"""The Pareto front: quality of every method at every budget against FLOPs and measured TTFT, resumable.

A *cell* is a method at a budget and a prompt length.  For each length the cells are scored on real text, then
on recall, then timed, trials interleaved; the results are complete after each of these steps, so that an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.bench.common import machine
from kvpred_mlx.bench.common.pairs import describe_pair
from kvpred_mlx.bench.common.results import Results, begin
from kvpred_mlx.bench.common.statistics import paired_ratio, paired_shares
from kvpred_mlx.bench.front import recall_score
from kvpred_mlx.bench.front.baselines import METHODS
from kvpred_mlx.bench.front.cells import SHOWN, Cell, label, make_cells
from kvpred_mlx.bench.front.settings import FrontSettings
from kvpred_mlx.bench.front.text import Data
from kvpred_mlx.errors import changes
from kvpred_mlx.making import quality
from kvpred_mlx.making.quality import Prefill
from kvpred_mlx.making.windows import Windows, prompts_at_once
from kvpred_mlx.pair.description import weights_checksum
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.progress import ProgressCallback, no_progress

SCHEMA = 2
KIND = "pareto"
OVER = "predicted"  # what gains are over


def pareto(
    pair: KVPredictionModel,
    name: str,
    settings: FrontSettings,
    data: Data | None = None,
    before: Results | None = None,
    progress: ProgressCallback = no_progress,
    finished: Callable[[Results], None] = lambda results: None,
    beside: Mapping[str, KVPredictionModel] | None = None,
) -> Results:
    """Measure the front of a pair; the schema of what is returned is in docs/front.md.

    Args:
        data: without it (random weights) only FLOPs and times are measured.
        before: results of an interrupted run with the same settings.
        progress: called with what is done, and how far it is.
        finished: called with the results so far after every step.
        beside: the pairs of `settings.beside`, by name.

    Raises:
        ValueError: a prompt is too short to be predicted; `before` is of another pair, other settings or
            another text; or no document is long enough.
        KeyboardInterrupt: passed on.
    """
    pairs: dict[str | None, KVPredictionModel] = {None: pair}
    pairs.update(beside or {})
    for one in pairs.values():
        _check_lengths(one, settings.prompt_lens)
    windows = {} if data is None else data.windows(settings)
    results = begin(
        SCHEMA,
        describe_pair(pair, name),
        dataclasses.asdict(settings),
        kind=KIND,
        data=None if data is None else data.describe(windows),
        warnings=machine.warnings(machine.busy_share()),
        cells=make_cells(pair, settings, beside or {}),
        beside={called: weights_checksum(other.predictor) for called, other in (beside or {}).items()},
    )
    if before is not None:
        _check_same(before, results)
        results = before
    finished(results)  # a folder that cannot be written is found out now
    front = _Front(pairs, settings, results, progress, finished)
    for n in settings.prompt_lens:
        if data is not None:
            front.score(n, windows[n])
            front.recall(n, data)
        front.time(n)
    results["complete"] = True
    finished(results)
    return results


def first_token_seconds(prefill: Prefill, tokens: mx.array) -> float:
    """Seconds until the value of the first token after `tokens` [1, n] is on the host."""
    mx.clear_cache()
    start = time.perf_counter()
    model, cache = prefill(tokens)
    mx.eval([c.state for c in cache])
    mx.argmax(_last_step(model, tokens, cache)).item()
    return time.perf_counter() - start


@dataclass(frozen=True)
class _Front:
    """The steps of a front, each for all cells of a prompt length; what has been measured is passed over."""

    pairs: Mapping[str | None, KVPredictionModel]
    settings: FrontSettings
    results: Results
    progress: ProgressCallback
    finished: Callable[[Results], None]

    def score(self, n: int, windows: Windows) -> None:
        """Quality on real text, all cells of a length at once: they are compared with one exact run."""
        cells = self._cells(n)
        if all(c["quality"] is not None for c in cells):
            return
        pair = self.pairs[None]
        ends = {name: quality.modes_of(pair)[name] for name in ("exact", "no prompt")}
        begun = self.results.setdefault("scoring", {}).setdefault(str(n), {})
        try:
            found = quality.measure(
                pair,
                windows,
                ends | {label(c): self._prefill(c) for c in cells},
                over=OVER if any(label(c) == OVER for c in cells) else None,
                seed=self.settings.seed,
                progress=self._telling(f"{n} tokens: text"),
                begun=begun,
            )
        except BaseException:  # Ctrl-C, too: only the windows under way are lost
            self.finished(self.results)
            raise
        del self.results["scoring"]
        for cell in cells:
            figures = found.modes[label(cell)]
            cell["quality"] = {m: dataclasses.asdict(figures[m]) for m in SHOWN}
            if found.gains:
                cell["gain"] = {m: dataclasses.asdict(found.gains[label(cell)][m]) for m in SHOWN}
        self.finished(self.results)

    def recall(self, n: int, data: Data) -> None:
        """Recall of facts planted in the text, cell by cell; a warning where prompts are too short for it."""
        settings, cells = self.settings, self._cells(n)
        if not settings.questions:
            return
        missing = [c for c in cells if c["recall"] is None]
        if missing:
            try:
                asked = recall_score.questions(
                    data.tokenizer, data.documents, n, settings.questions, settings.seed
                )
            except ValueError as error:  # the facts alone are longer than the prompt
                self._warn(f"no recall at {n} tokens: {error}")
                return
        for cell in missing:
            prefill = self._prefill(cell)
            telling = self._telling(f"{n} tokens: recall, {label(cell)}")
            cell["recall"] = recall_score.summary(
                asked, recall_score.recalled(prefill, asked, prompts_at_once(n), progress=telling)
            )
            self.finished(self.results)
        for cell in cells:
            if cell["gain"]:
                over = next(c for c in cells if label(c) == OVER)
                right, others = ([r == "1" for r in c["recall"]["right"]] for c in (cell, over))
                cell["gain"]["recall"] = paired_shares(right, others)
        self.finished(self.results)

    def time(self, n: int) -> None:
        """TTFT of every cell that has none, and of `exact` beside them; one untimed round first."""
        cells, rounds = self._cells(n), self.settings.trials + 1
        if all(c["ttft"] is not None for c in cells):
            return
        timed = [c for c in cells if c["ttft"] is None or c["method"] == "exact"]
        tokens = mx.random.randint(
            0, self.pairs[None].vocab_size, (1, n), key=mx.random.key(self.settings.seed)
        )
        made = {label(c): self._prefill(c) for c in timed}
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for trial in range(rounds):
            for i, (name, prefill) in enumerate(made.items()):
                self.progress(trial * len(made) + i, rounds * len(made), f"{n} tokens: TTFT, {name}")
                spent = first_token_seconds(prefill, tokens)
                if trial:
                    seconds[name].append(spent)
        for cell in timed:
            cell["trials"] = seconds[label(cell)]
            cell["ttft"] = median(cell["trials"])
            cell["sooner"] = paired_ratio(seconds["exact"], cell["trials"], self.settings.seed).as_dict()
        self.finished(self.results)

    def _prefill(self, cell: Cell) -> Prefill:
        """How a cell reads a prompt."""
        return METHODS[cell["method"]].prefill(self.pairs[cell.get("pair")], cell["budget"] or 0.0)

    def _cells(self, n: int) -> list[Cell]:
        return [c for c in self.results["cells"] if c["prompt_tokens"] == n and c["skipped"] is None]

    def _telling(self, what: str) -> ProgressCallback:
        """Says what is going on, for work that only counts."""
        return lambda done, total, what=what: self.progress(done, total, what)

    def _warn(self, note: str) -> None:
        warnings = self.results["warnings"]
        warnings += [note] if note not in warnings else []


def _check_lengths(pair: KVPredictionModel, prompt_lens: Sequence[int]) -> None:
    short = [n for n in prompt_lens if n <= pair.min_prompt_tokens]
    if short:
        raise ValueError(
            f"prompt lengths {short}, expected more than {pair.min_prompt_tokens} tokens: "
            "this pair runs its base alone for shorter prompts"
        )


def _check_same(before: Results, now: Results) -> None:
    for part in ("pair", "settings", "data", "beside"):
        then, here = before.get(part) or {}, now[part] or {}
        then = {"beside": []} | then if part == "settings" else then  # an older run had none
        if differ := changes(then, here):
            raise ValueError(f"the {part} of the results there and now differ: {', '.join(differ)}")


def _last_step(model: nn.Module, tokens: mx.array, cache: list[Any]) -> mx.array:
    return model(tokens[:, -1:], cache=cache)[:, -1]
