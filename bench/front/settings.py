"""What a front measures."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpred_mlx.bench.front.baselines import METHODS
from kvpred_mlx.errors import check_list, check_ranges

BUDGETS = [0.05, 0.1, 0.2, 0.4]


@dataclass(frozen=True)
class FrontSettings:
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
        beside: names of other pairs of the same base, whose predictions and dials are further lines.

    Raises:
        ValueError: naming what was given and what was expected.
    """

    prompt_lens: list[int]
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    budgets: list[float] = field(default_factory=lambda: list(BUDGETS))
    windows: int = 160
    score_tokens: int = 64
    questions: int = 10
    trials: int = 5
    seed: int = 0
    beside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_list("prompt_lens", self.prompt_lens, 2, whole=True)
        check_list("budgets", self.budgets, 0, 1)
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"methods {unknown!r}, expected some of {', '.join(METHODS)}")
        counts = {"windows": 1, "score_tokens": 1, "questions": 0, "trials": 1, "seed": 0}
        check_ranges(vars(self), counts, whole=counts)
