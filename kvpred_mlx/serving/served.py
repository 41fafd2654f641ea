"""A pair that is served: by its name, in modes that share neither batches nor caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.modes import Mode

BASE = ":base"  # after a pair's name: the base alone


@dataclass(eq=False)
class ServedPair:
    """A pair under the name that requests call it by.

    Args:
        name: the pair's; with `BASE` behind it, the base alone.
        context: tokens of prompt and answer together (None: no limit).
    """

    name: str
    pair: KVPredictionModel
    tokenizer: Any
    context: int | None = None
    default_mode: Mode = field(init=False)

    def __post_init__(self) -> None:
        self.default_mode = Mode.of(self.pair)

    @property
    def names(self) -> tuple[str, str]:
        """All that requests may call it."""
        return self.name, self.name + BASE

    def model_name(self, mode: Mode) -> str:
        """What mlx-lm's server takes for a model's name: it keeps apart what has different ones."""
        return f"{self.name}\n{mode}"
