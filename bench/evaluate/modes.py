"""Who answers in a mode of an evaluation: a pair, its auxiliary alone, or its base behind a sparse prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.bench.common.flops import full_prefill_flops
from kvpred_mlx.bench.common.sparse import (
    attended,
    check_windows,
    drop_all_but,
    make_sparse_cache,
    sparse_flops,
)
from kvpred_mlx.dial.positions import ExactPositions
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.modes import Mode

AUXILIARY = "auxiliary"  # the mode in which the auxiliary answers by itself
SPARSE = "sparse-"


@dataclass(frozen=True)
class Sparse:
    """Sparse prefill: the base processes the positions that the dial would make exact, and drops the others."""

    positions: ExactPositions

    def check(self, pair: KVPredictionModel) -> None:
        """Make sure that tokens can be chosen by the pair's reader and left out of its base's cache.

        Raises:
            ValueError: they cannot.
        """
        pair.check_top()
        check_windows(pair.base)


@dataclass(frozen=True)
class SparseModel:
    """A pair's base, and how it reads a prompt sparsely."""

    pair: KVPredictionModel
    positions: ExactPositions

    @property
    def base(self) -> nn.Module:
        """The model that answers."""
        return self.pair.base

    def read(self, prompt: list[int]) -> list[Any]:
        """The base's cache of all of `prompt` but its last token; what a pair would not predict is read exactly."""
        tokens = mx.array(prompt)[None]
        if self.pair.predicts(len(prompt)):
            return drop_all_but(self.pair, attended(self.pair, self.positions))(tokens)[1]
        cache = make_sparse_cache(self.base)
        if len(prompt) > 1:
            self.base(tokens[:, :-1], cache=cache)
        return cache

    def flops(self, prompt_tokens: int) -> int:
        """FLOPs until the first token behind a prompt."""
        if self.pair.predicts(prompt_tokens):
            return sparse_flops(self.pair, prompt_tokens, self.positions)
        return full_prefill_flops(self.base, prompt_tokens)


def begun(model: nn.Module | SparseModel, prompt: list[int]) -> tuple[nn.Module, list[int], list[Any] | None]:
    """Who goes on, with which tokens of `prompt`, and from which cache (None: from its own, empty)."""
    if isinstance(model, SparseModel):
        return model.base, prompt[-1:], model.read(prompt)
    return model, prompt, None


def parse(name: str) -> Mode | Sparse | None:
    """The mode called `name`: as in `Mode.parse`; sparse-top=0.2, a dial with the other prefix; or `AUXILIARY`, None.

    Raises:
        ValueError: naming what is not known, or out of range.
    """
    if name == AUXILIARY:
        return None
    parts = name.split("+")
    if not any(part.startswith(SPARSE) for part in parts):
        return Mode.parse(name)
    expected = f"mode {name!r}, expected a share to choose, sparse-top=0.2, and beside it sparse-first and sparse-last"
    if not all(part.startswith(SPARSE) for part in parts):
        raise ValueError(expected)
    try:
        positions = Mode.parse(name.replace(SPARSE, "exact-")).positions
    except ValueError as error:
        raise ValueError(expected) from error
    if not positions or not positions.top or positions.depth:
        raise ValueError(expected)
    return Sparse(positions)
