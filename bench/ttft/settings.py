"""What a bench measures."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpred_mlx.errors import check_list, check_ranges


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Args:
        prompt_lens: prompt lengths, in tokens.
        batch_sizes: prompts side by side.
        trials: timed generations of each mode at each shape.
        max_tokens: tokens of each generation.
        prefill_step_sizes: prompt tokens that mlx-lm processes at a time; the first is the default, and with
            several, best is compared with best too.
        seed: of the random prompts and of the bootstrap.

    Raises:
        ValueError: naming what was given and what was expected.
    """

    prompt_lens: list[int]
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    trials: int = 5
    max_tokens: int = 16
    prefill_step_sizes: list[int] = field(default_factory=lambda: [2048])
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompt_lens", 2), ("batch_sizes", 1), ("prefill_step_sizes", 1)):
            check_list(name, getattr(self, name), least, whole=True)
        counts = {"trials": 1, "max_tokens": 1, "seed": 0}
        check_ranges(vars(self), counts, whole=counts)
