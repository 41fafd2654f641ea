"""The evaluation: every item in every mode, one after the other, each written down as soon as it is known."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import make_sampler

from kvpred_mlx.bench.common.pairs import dtype_name
from kvpred_mlx.bench.common.results import Results, begin
from kvpred_mlx.bench.evaluate import tasks
from kvpred_mlx.bench.evaluate.journal import Journal, Record
from kvpred_mlx.bench.evaluate.scores import AUXILIARY, summarize
from kvpred_mlx.bench.evaluate.settings import EvaluationSettings
from kvpred_mlx.bench.evaluate.tasks import HUMANEVAL, PASS_K, TASKS, TRIVIAQA, Task
from kvpred_mlx.generation.stream import stream_generate
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.modes import Mode
from kvpred_mlx.progress import ProgressCallback, no_progress

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
        self._modes = {mode: _parse(mode) for mode in settings.modes}
        for mode in self._modes.values():
            if mode is not None:
                mode.check(pair)
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
            {**self.settings.same(self.name), "limit": self.settings.limit},
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

    def _rows(self, task: Task) -> dict[str, dict[str, Any]]:
        found = tasks.rows(task, self.settings.data.get(task.name), self.settings.limit)
        return {tasks.row_id(task, row, i): row for i, row in enumerate(found)}

    def _own(self, name: str, rows: dict[str, Any], progress: ProgressCallback) -> dict[str, list[Record]]:
        task, total = TASKS[name], len(rows) * len(self._modes)
        for i, (row_id, row) in enumerate(rows.items()):
            for j, mode in enumerate(self._modes):
                if (name, mode, row_id) not in self._journal:
                    progress(i * len(self._modes) + j, total, f"{name}, {mode}")
                    with self._model(mode) as model:
                        self._journal.add(
                            {"task": name, "mode": mode, "id": row_id} | self._item(model, task, row, row_id)
                        )
        progress(total, total, name)
        return {mode: [self._journal[name, mode, i] for i in rows] for mode in self._modes}

    def _of_lm_eval(self, name: str, rows: Any, progress: ProgressCallback) -> dict[str, list[Record]]:
        from kvpred_mlx.bench.evaluate.lm_eval_model import evaluate

        for i, mode in enumerate(self._modes):
            if (name, mode, WHOLE) not in self._journal:
                progress(i, len(self._modes), f"{name}, {mode}")
                with self._model(mode) as model:
                    done = evaluate(model, self.tokenizer, name, self.settings, self.context)
                self._journal.add({"task": name, "mode": mode, "id": WHOLE} | done)
        progress(len(self._modes), len(self._modes), name)
        return {mode: [self._journal[name, mode, WHOLE]] for mode in self._modes}

    @contextmanager
    def _model(self, mode: str) -> Iterator[nn.Module]:
        """The model that answers in a mode."""
        parsed = self._modes[mode]
        if parsed is None:
            yield self.pair.auxiliary_model
        else:
            with parsed.applied(self.pair):
                yield self.pair

    def _item(self, model: nn.Module, task: Task, row: dict[str, Any], row_id: str) -> Record:
        """Answer one item and score the answers."""
        prompt = self.tokenizer.encode(tasks.prompt(task, row))
        if self.context is not None and len(prompt) >= self.context:
            names = _metrics(task, self.settings.num_samples)
            return {"prompt_tokens": [], "ttfts": [], "answers": [], "scores": dict.fromkeys(names, 0.0)}
        answers, ttfts = [], []
        samplers = [None] + [make_sampler(self.settings.temp, self.settings.top_p)] * _samples(
            task, self.settings
        )
        for i, sampler in enumerate(samplers):
            mx.random.seed(zlib.crc32(f"{self.settings.seed} {row_id} {i}".encode()))
            answer, ttft = self._answer(model, task, prompt, sampler)
            answers.append(answer)
            ttfts.append(ttft)
        return {"prompt_tokens": [len(prompt)], "ttfts": ttfts, **_scored(task, row, answers)}

    def _answer(self, model: nn.Module, task: Task, prompt: list[int], sampler: Any) -> tuple[str, float]:
        """An answer up to its stop, and the seconds until its first token."""
        most = self.settings.max_tokens or task.max_tokens
        room = most if self.context is None else min(most, self.context - len(prompt))
        text, ttft = "", 0.0
        for response in stream_generate(model, self.tokenizer, prompt, room, sampler=sampler):
            text, ttft = text + response.text, response.ttft
            if tasks.cut(text, task.stops) != text:
                break
        return tasks.cut(text, task.stops), ttft


def _scored(task: Task, row: dict[str, Any], answers: list[str]) -> Record:
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


def _parse(mode: str) -> Mode | None:
    return None if mode == AUXILIARY else Mode.parse(mode)
