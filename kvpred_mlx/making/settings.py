"""How to fit and how to train."""

from __future__ import annotations

from dataclasses import dataclass

from kvpred_mlx.errors import check_ranges
from kvpred_mlx.pair import sources


@dataclass(frozen=True)
class FitSettings:
    """How to fit.

    Args:
        tokens: how many tokens to read, at most.
        batch_size: sequences at a time.
        source: what to predict from, one of `kvpred_mlx.pair.sources.SOURCES`.
        layer_map: auto, even, or a list such as 0,0,1,1.
        ridge: of standardized features; None chooses on held-out batches, for each layer, keys and values apart.
        seed: of the choice of sequences.
        weighted: tokens count by the attention that the base pays to them (`AttentionWeights`), not all alike.

    Raises:
        ValueError: naming what was given and what was expected.
    """

    tokens: int = 200_000
    batch_size: int = 8
    source: str = sources.DEFAULT
    layer_map: str = "auto"
    ridge: float | None = None
    seed: int = 0
    weighted: bool = True

    def __post_init__(self) -> None:
        sources.check_source(self.source)
        counts = {"tokens": 1, "batch_size": 1, "seed": 0}
        check_ranges(vars(self), counts | {"ridge": 0}, whole=counts)


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the names are mlx-lm's.

    Args:
        iters: optimizer steps.
        batch_size: sequences of one step and one accumulation, over all processes together.
        learning_rate: the highest, at the end of the warm-up.
        end_learning_rate: the share of it that the cosine ends on.
        warmup: steps over which the learning rate rises from zero.
        optimizer: `adamw` or `muon` (see `make_optimizer`).
        weight_decay: of AdamW's matrices; norms and biases have none.
        grad_clip: the gradient's largest norm, 0 for no limit.
        grad_accumulation_steps: batches whose gradients are averaged for one step.
        save_every: steps between saved states.
        steps_per_report: steps between reports.
        seed: of the order of the data.
        dtype: what to compute in; weights are kept and updated in float32.

    Raises:
        ValueError: naming what was given and what was expected.
    """

    iters: int = 1000
    batch_size: int = 4
    learning_rate: float = 1e-3
    end_learning_rate: float = 0.1
    warmup: int = 100
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    grad_accumulation_steps: int = 1
    save_every: int = 100
    steps_per_report: int = 10
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        counts = ("iters", "batch_size", "grad_accumulation_steps", "save_every", "steps_per_report")
        whole = dict.fromkeys(counts, 1) | {"warmup": 0, "seed": 0}
        amounts = dict.fromkeys(("learning_rate", "end_learning_rate", "weight_decay", "grad_clip"), 0)
        check_ranges(vars(self), whole | amounts, {"end_learning_rate": 1}, whole)
