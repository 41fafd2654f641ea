"""The paper's tasks: what is asked, where an answer ends, and what is right.

lm-eval has both, and every other task is left to it.  These are here because an item is answered, timed and
written down by itself, so that modes are neighbours in time and a long run goes on where it stopped; because
their data may be a file; and because lm-eval adds a question mark to TriviaQA's questions, which have one,
and scores HumanEval at pass@1, or at 64 samples.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import comb
from pathlib import Path
from typing import Any

from kvpred_mlx.bench.evaluate.sandbox import Limits, Outcome, run

PASS_K = 10  # of HumanEval's sampled score


@dataclass(frozen=True)
class Task:
    """A task with data of its own; other tasks are lm-eval's.

    Args:
        dataset: path, name and split of the data on the Hugging Face hub.
        fields: of a row, that must be there.
        stops: where an answer ends, the first that comes.
        max_tokens: of an answer.
    """

    name: str
    dataset: tuple[str, str | None, str]
    fields: tuple[str, ...]
    stops: tuple[str, ...]
    max_tokens: int


TRIVIAQA = Task(
    "triviaqa",
    ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
    ("question", "answer"),
    ("\n", ".", ","),
    64,
)
HUMANEVAL = Task(
    "humaneval",
    ("openai/openai_humaneval", None, "test"),
    ("task_id", "prompt", "test", "entry_point"),
    ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    512,
)
TASKS = {task.name: task for task in (TRIVIAQA, HUMANEVAL)}


def rows(task: Task, data: Path | None, limit: int | None) -> list[dict[str, Any]]:
    """The task's data, from a file of JSON lines or from the hub.

    Raises:
        ValueError: the file is not JSON lines, has no rows, or a row lacks a field.
        OSError: the file cannot be read, or the hub has no answer.
    """
    found = list(islice(_from_hub(task) if data is None else _from_file(data), limit))
    source = str(data or task.dataset[0])
    if not found:
        raise ValueError(f"{source}: no rows")
    for i, row in enumerate(found):
        missing = [field for field in task.fields if field not in row]
        if missing:
            raise ValueError(f"{source}: row {i + 1} has no {', '.join(missing)}, as {task.name} needs")
        if task is TRIVIAQA and not isinstance(row["answer"].get("aliases"), list):
            raise ValueError(f"{source}: row {i + 1} has no list of answer.aliases")
    return found


def _from_file(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} is not a JSON object")
            yield row


def _from_hub(task: Task) -> Iterator[dict[str, Any]]:
    import datasets

    path, name, split = task.dataset
    try:
        yield from datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{path}: not to be had from the Hugging Face hub ({reason}); --data takes a file"
        ) from error


def row_id(task: Task, row: dict[str, Any], index: int) -> str:
    """What identifies a row among the task's."""
    return str(row["task_id"] if task is HUMANEVAL else row.get("question_id", index))


def prompt(task: Task, row: dict[str, Any]) -> str:
    """What the model is asked to continue."""
    return row["prompt"] if task is HUMANEVAL else f"Question: {row['question']}\nAnswer:"


def beginning(tokenizer: Any, prompt: Sequence[int], token: int) -> str:
    """The space that an answer begins with, if its first `token` brings one and mlx-lm's detokenizer drops it.

    It drops it as the first of a text.  A body that continues a function is then indented by three.
    """
    detokenizer = tokenizer.detokenizer
    detokenizer.add_token(token)
    detokenizer.finalize()
    before = tokenizer.decode([prompt[-1]])
    dropped = tokenizer.decode([prompt[-1], token]).startswith(f"{before} {detokenizer.text}")
    return " " if dropped else ""


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def matches(answer: str, aliases: Sequence[str]) -> bool:
    """Exact match with any alias, ignoring case, punctuation and spaces around, as lm-eval has it."""
    return _plain(answer) in {_plain(alias) for alias in aliases}


def check(row: dict[str, Any], completion: str, limits: Limits | None = None) -> Outcome:
    """Run HumanEval's tests on a completion, in a sandbox."""
    program = f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n"
    return run(program, limits)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k from `samples` samples (Chen et al., arXiv 2107.03374, section 2.1)."""
    if samples < k:
        raise ValueError(f"{samples} samples, expected at least {k} for pass@{k}")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def _plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).strip()
