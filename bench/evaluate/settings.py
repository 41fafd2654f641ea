"""What an evaluation measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvpred_mlx.bench.evaluate.journal import Record
from kvpred_mlx.bench.evaluate.modes import AUXILIARY
from kvpred_mlx.bench.evaluate.tasks import PASS_K
from kvpred_mlx.errors import check_ranges

LM_EVAL_BATCH = 8  # items, where nothing else is given


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate.  A run may be resumed with other tasks, modes and limits; the rest must be the same.

    Args:
        tasks: triviaqa, humaneval, or names of lm-eval's tasks.
        modes: exact, predicted, auxiliary, settings of the dial, or sparse-top=0.2 (see `modes.parse`).
        data: files of JSON lines, by task; the hub's data without.
        limit: items of each task (None: all).
        num_samples: of each HumanEval problem, for pass@10 (0: pass@1 only).
        temp: sampling temperature of the samples.
        top_p: of the samples.
        max_tokens: of an answer (None: the task's own).
        min_prompt_tokens: prompts of fewer tokens are not predicted; 1 predicts all, as in the paper.
        batch_size: items that are answered together (None: `LM_EVAL_BATCH` of lm-eval's tasks; those of `TASKS` one by
            one, so that each has a time to its first token, as with 1).
        include_path: a folder with more of lm-eval's tasks.
        seed: of the samples and of the intervals.

    Raises:
        ValueError: naming what was given and what was expected.
    """

    tasks: list[str]
    modes: list[str] = field(default_factory=lambda: ["exact", "predicted", AUXILIARY])
    data: dict[str, Path] = field(default_factory=dict)
    limit: int | None = None
    num_samples: int = PASS_K
    temp: float = 0.8
    top_p: float = 0.95
    max_tokens: int | None = None
    min_prompt_tokens: int = 1
    batch_size: int | None = None
    include_path: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or not self.modes:
            raise ValueError(
                f"tasks are {self.tasks!r} and modes {self.modes!r}, expected at least one of each"
            )
        if 0 < self.num_samples < PASS_K:
            raise ValueError(f"num_samples is {self.num_samples!r}, expected 0, or at least {PASS_K}")
        counts = {
            "num_samples": 0,
            "limit": 1,
            "max_tokens": 1,
            "min_prompt_tokens": 1,
            "batch_size": 1,
            "seed": 0,
        }
        check_ranges(vars(self), counts | {"temp": 0, "top_p": 0}, {"top_p": 1}, counts)

    def same(self, pair: str) -> Record:
        """What must be the same for items to stand in one table."""
        names = ("num_samples", "temp", "top_p", "max_tokens", "min_prompt_tokens", "seed")
        data = {name: str(path) for name, path in self.data.items()}
        return {"pair": pair, "data": data} | {name: getattr(self, name) for name in names}
