"""The evaluation: every item in every mode, each written down as soon as it is known."""

from __future__ import annotations

import os
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from kvpred_mlx.bench.common.pairs import dtype_name
from kvpred_mlx.bench.common.results import Results, begin
from kvpred_mlx.bench.evaluate import tasks
from kvpred_mlx.bench.evaluate.batches import Asked, Sampler, answer_all, seeded
from kvpred_mlx.bench.evaluate.journal import Journal, Record
from kvpred_mlx.bench.evaluate.modes import Sparse, SparseModel, begun, parse
from kvpred_mlx.bench.evaluate.scores import summarize
from kvpred_mlx.bench.evaluate.settings import EvaluationSettings
from kvpred_mlx.bench.evaluate.tasks import HUMANEVAL, PASS_K, TASKS, TRIVIAQA, Task
from kvpred_mlx.dial.rows import ExactRows
from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.generation.stream import stream_generate
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.progress import ProgressCallback, no_progress
from kvpred_mlx.taps.states import holds_states

SCHEMA = 1
WHOLE = "whole task"  # the id under which a task of lm-eval's is written down


class Evaluation:
    """One pair, its tokenizer, and the items that are done.

    Args:
        name: what the results call the pair.
        context: tokens of prompt and answer together (None: no limit).
        folder: where `items.jsonl` is, or will be.

    Raises:
        ValueError: a mode is not known, or not possible with this pair, or the folder is of a run with other
            settings.
        UnsupportedModelError: a model that is to answer in batches cannot.
    """

    def __init__(
        self,
        pair: KVPredictionModel,
        tokenizer: Any,
        name: str,
        settings: EvaluationSettings,
        folder: Path,
        context: int | None = None,
    ):
        self.pair, self.tokenizer, self.name, self.settings = pair, tokenizer, name, settings
        self.context = context
        self._modes = {mode: parse(mode) for mode in settings.modes}
        for called, mode in self._modes.items():
            if isinstance(mode, Sparse) and not TASKS.keys() >= set(settings.tasks):
                raise ValueError(f"mode {called!r}, expected another one for tasks of lm-eval's")
            if mode is None:
                _ = pair.auxiliary_model  # there may be none
            else:
                mode.check(pair)
        if self._batched and not TASKS.keys().isdisjoint(settings.tasks):
            self._check_batches()
        self._journal = Journal(folder / "items.jsonl", settings.same(name))

    def run(
        self,
        progress: ProgressCallback = no_progress,
        finished: Callable[[Results], None] = lambda results: None,
    ) -> Results:
        """Evaluate what is not done yet; `finished` is called with the results so far after each task.

        Raises:
            ValueError, OSError: the data of a task cannot be had (see `tasks.rows`).
            KeyboardInterrupt: passed on; finished items are written down.
        """
        results = begin(
            SCHEMA,
            {"name": self.name, "dtype": dtype_name(self.pair)},
            {
                **self.settings.same(self.name),
                "limit": self.settings.limit,
                "batch_size": self.settings.batch_size,
            },
            rows=[],
        )
        own = {name: self._rows(TASKS[name]) for name in self.settings.tasks if name in TASKS}
        before = self.pair.min_prompt_tokens
        self.pair.min_prompt_tokens = self.settings.min_prompt_tokens
        try:
            for name in self.settings.tasks:
                run = self._own if name in own else self._of_lm_eval
                records = run(name, own.get(name, {}), progress)
                results["rows"] += summarize(self.pair, name, records, self.settings.seed)
                finished(results)
        finally:
            self.pair.min_prompt_tokens = before
        results["complete"] = True
        finished(results)
        return results

    def has_items(self) -> bool:
        """Whether an item has been finished; if not, its journal is removed."""
        return self._journal.keep_or_remove()

    def _rows(self, task: Task) -> dict[str, dict[str, Any]]:
        found = tasks.rows(task, self.settings.data.get(task.name), self.settings.limit)
        return {tasks.row_id(task, row, i): row for i, row in enumerate(found)}

    @property
    def _batched(self) -> bool:
        return (self.settings.batch_size or 1) > 1

    def _check_batches(self) -> None:
        """Rows of a batch stand at different positions, as the dial's do; models with states are told by mlx-lm."""
        answering = [self.pair.base_taps] if any(self._modes.values()) else []
        answering += [self.pair.auxiliary_taps] if None in self._modes.values() else []
        if not all(
            holds_states(make_prompt_cache(taps.model)) or ExactRows(taps).supported for taps in answering
        ):
            raise UnsupportedModelError("a model of this pair cannot answer in batches: give --batch-size 1")

    def _own(self, name: str, rows: dict[str, Any], progress: ProgressCallback) -> dict[str, list[Record]]:
        task, total = TASKS[name], len(rows) * len(self._modes)
        (self._in_batches if self._batched else self._one_by_one)(task, rows, progress)
        progress(total, total, name)
        return {mode: [self._journal[name, mode, i] for i in rows] for mode in self._modes}

    def _one_by_one(self, task: Task, rows: dict[str, Any], progress: ProgressCallback) -> None:
        """Every mode of an item before the next item: their times are neighbours."""
        total = len(rows) * len(self._modes)
        for i, (row_id, row) in enumerate(rows.items()):
            for j, mode in enumerate(self._modes):
                if (task.name, mode, row_id) not in self._journal:
                    progress(i * len(self._modes) + j, total, f"{task.name}, {mode}")
                    with self._model(mode) as model:
                        item = self._item(model, task, row, row_id)
                    self._journal.add({"task": task.name, "mode": mode, "id": row_id} | item)

    def _in_batches(self, task: Task, rows: dict[str, Any], progress: ProgressCallback) -> None:
        """Mode by mode; answers are scored beside the generation, and written down even if that is interrupted."""
        total, waiting = len(rows) * len(self._modes), deque[Future[None]]()

        def score(mode: str, row_id: str, prompt: list[int], answers: list[str]) -> None:
            known = self._scored(task, rows[row_id], prompt, answers, [])
            self._journal.add({"task": task.name, "mode": mode, "id": row_id} | known)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for j, mode in enumerate(self._modes):
                left = {i: row for i, row in rows.items() if (task.name, mode, i) not in self._journal}
                done = (j + 1) * len(rows) - len(left)
                progress(done, total, f"{task.name}, {mode}")
                with self._model(mode) as model:
                    for n, answered in enumerate(self._items(model, task, left), 1):
                        waiting.append(pool.submit(score, mode, *answered))
                        while waiting and waiting[0].done():
                            waiting.popleft().result()  # a full disk, say, is told now
                        progress(done + n, total)
        for future in waiting:
            future.result()

    def _of_lm_eval(self, name: str, rows: Any, progress: ProgressCallback) -> dict[str, list[Record]]:
        from kvpred_mlx.bench.evaluate.lm_eval_model import evaluate

        for i, mode in enumerate(self._modes):
            if (name, mode, WHOLE) not in self._journal:
                progress(i, len(self._modes), f"{name}, {mode}")
                with self._model(mode) as model:
                    assert isinstance(model, nn.Module)  # sparse modes were refused
                    done = evaluate(model, self.tokenizer, name, self.settings, self.context)
                self._journal.add({"task": name, "mode": mode, "id": WHOLE} | done)
        progress(len(self._modes), len(self._modes), name)
        return {mode: [self._journal[name, mode, WHOLE]] for mode in self._modes}

    @contextmanager
    def _model(self, mode: str) -> Iterator[nn.Module | SparseModel]:
        """The model that answers in a mode."""
        parsed = self._modes[mode]
        if parsed is None:
            yield self.pair.auxiliary_model
        elif isinstance(parsed, Sparse):
            yield SparseModel(self.pair, parsed.positions)
        else:
            with parsed.applied(self.pair):
                yield self.pair

    def _item(self, model: nn.Module | SparseModel, task: Task, row: dict[str, Any], row_id: str) -> Record:
        """Answer one item and score the answers."""
        prompt = self.tokenizer.encode(tasks.prompt(task, row))
        answers, ttfts = [], []
        for sampler in self._draws(task, prompt, row_id):
            answer, ttft = self._answer(model, task, prompt, sampler)
            answers.append(answer)
            ttfts.append(ttft)
        return self._scored(task, row, prompt, answers, ttfts)

    def _answer(
        self, model: nn.Module | SparseModel, task: Task, prompt: list[int], sampler: Any
    ) -> tuple[str, float]:
        """An answer up to its stop, and the seconds until its first token."""
        text, ttft, room, started = "", 0.0, self._room(task, prompt), time.perf_counter()
        answering, rest, cache = begun(model, prompt)
        options = {"sampler": sampler} | ({} if cache is None else {"prompt_cache": cache})
        read = time.perf_counter() - started
        for n, response in enumerate(stream_generate(answering, self.tokenizer, rest, room, **options)):
            if n == 0 and response.finish_reason != "stop":
                text = tasks.beginning(self.tokenizer, prompt, response.token)
            text, ttft = text + response.text, read + response.ttft
            if tasks.cut(text, task.stops) != text:
                break
        return tasks.cut(text, task.stops), ttft

    def _items(
        self, model: nn.Module | SparseModel, task: Task, rows: dict[str, Any]
    ) -> Iterator[tuple[str, list[int], list[str]]]:
        """(id, prompt, answers) of all items, answered in batches, as they are finished."""
        prompts = {i: self.tokenizer.encode(tasks.prompt(task, row)) for i, row in rows.items()}
        asked = []
        for row_id, prompt in prompts.items():
            draws, room = self._draws(task, prompt, row_id), self._room(task, prompt)
            asked += [Asked((row_id, i), prompt, room, draw) for i, draw in enumerate(draws)]
            if not draws:
                yield row_id, prompt, []
        known, expected = defaultdict[str, dict[int, str]](dict), 1 + _samples(task, self.settings)
        size = self.settings.batch_size or 1
        for (row_id, i), answer in answer_all(model, self.tokenizer, asked, task.stops, size):
            known[row_id][i] = answer
            if len(known[row_id]) == expected:
                found = known.pop(row_id)
                yield row_id, prompts[row_id], [found[i] for i in range(expected)]

    def _room(self, task: Task, prompt: list[int]) -> int:
        """How many tokens an answer may have; none if the prompt fills the context."""
        most = self.settings.max_tokens or task.max_tokens
        return most if self.context is None else min(most, self.context - len(prompt))

    def _draws(self, task: Task, prompt: list[int], row_id: str) -> list[Sampler | None]:
        """The sampler of each answer to an item (None: greedy); none if there is no room for any."""
        if self._room(task, prompt) <= 0:
            return []
        sampler = make_sampler(self.settings.temp, self.settings.top_p)
        seeds = (f"{self.settings.seed} {row_id} {i + 1}" for i in range(_samples(task, self.settings)))
        return [None, *(seeded(sampler, zlib.crc32(seed.encode())) for seed in seeds)]

    def _scored(
        self, task: Task, row: dict[str, Any], prompt: list[int], answers: list[str], ttfts: list[float]
    ) -> Record:
        """Answers with their scores; without any, for a prompt that was too long, nothing is right."""
        if not answers:
            names = _metrics(task, self.settings.num_samples)
            return {"prompt_tokens": [], "ttfts": [], "answers": [], "scores": dict.fromkeys(names, 0.0)}
        return {"prompt_tokens": [len(prompt)], "ttfts": ttfts, **_scores(task, row, answers)}


def _scores(task: Task, row: dict[str, Any], answers: list[str]) -> Record:
    """Scores of the first answer (greedy), and of the others together (samples)."""
    if task is TRIVIAQA:
        right = tasks.matches(answers[0], row["answer"]["aliases"])
        return {"answers": answers, "scores": {"exact_match": float(right)}}
    outcomes = [tasks.check(row, answer) for answer in answers]
    scores = {"pass@1": float(outcomes[0].passed)}
    sampled = outcomes[1:]
    if sampled:
        passed = sum(o.passed for o in sampled)
        scores[f"pass@{PASS_K}"] = tasks.pass_at_k(len(sampled), passed, PASS_K)
    return {"answers": answers, "reasons": [o.reason for o in outcomes], "scores": scores}


def _metrics(task: Task, num_samples: int) -> list[str]:
    sampled = [f"pass@{PASS_K}"] if num_samples else []
    return ["exact_match"] if task is TRIVIAQA else ["pass@1", *sampled]


def _samples(task: Task, settings: EvaluationSettings) -> int:
    return settings.num_samples if task is HUMANEVAL else 0
