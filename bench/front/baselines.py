"""The methods of the Pareto front: the dial at several settings, and what people use today.

Each method is a `Prefill` of `kvpred_mlx.making.quality` and the FLOPs of its first token.  A *budget* is the
share of the prompt that the base processes exactly, or of its layers that are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from kvpred_mlx.bench.common.flops import dial_flops, full_prefill_flops
from kvpred_mlx.bench.common.sparse import (
    at_random,
    attended,
    check_windows,
    drop_all_but,
    drop_all_but_last,
    sparse_flops,
)
from kvpred_mlx.dial.positions import ExactPositions
from kvpred_mlx.making.quality import Prefill, prefill_of
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.modes import Mode
from kvpred_mlx.taps.layers import layer_list_owners

SINKS = 4


@dataclass(frozen=True)
class Method:
    """One line of the front.

    Args:
        title: for tables and pictures.
        prefill: of a pair at a budget.
        flops: of a pair, a prompt of so many tokens, and a budget.
        budgets: whether the budget means anything.
        needs: what the pair's families must be able to do: `top` (choose tokens), `rows` (compute tokens
            anywhere), `drop` (leave some out).
        dial: whether it is the pair's own prediction at a setting of its dial, a line of every pair.
    """

    title: str
    prefill: Callable[[KVPredictionModel, float], Prefill]
    flops: Callable[[KVPredictionModel, int, float], int]
    budgets: bool = True
    needs: tuple[str, ...] = ()
    dial: bool = False


def dialled(pair: KVPredictionModel, dial: ExactPositions | None) -> Prefill:
    """The pair with its dial at `dial`, whatever its own setting is."""

    def prefill(prompt: mx.array) -> tuple[nn.Module, list[Any]]:
        cache = pair.make_cache()
        with Mode(positions=dial).applied(pair):
            pair(prompt[:, :-1], cache=cache)
        return pair.base, cache[:-1]

    return prefill


def pruned(model: nn.Module, share: float) -> nn.Module:
    """A model with `share` of the layers, spread evenly, first and last among them; weights are shared."""
    arrays = dict(tree_flatten(model.parameters())).values()
    made = copy.deepcopy(model, {id(array): array for array in arrays})
    count, total = max(2, ceil(share * len(model.layers))), len(model.layers)
    kept = sorted({round(i * (total - 1) / (count - 1)) for i in range(count)})
    for owner, name in layer_list_owners(made):
        owner[name] = [owner[name][i] for i in kept]
    return made


def _last(budget: float) -> ExactPositions:
    return ExactPositions(last=budget)


def _top(budget: float) -> ExactPositions:
    return ExactPositions(top=budget)


def _both(budget: float) -> ExactPositions:
    return ExactPositions(first=SINKS, last=budget / 2, top=budget / 2)


def _dial(title: str, dial: Callable[[float], ExactPositions]) -> Method:
    return Method(
        title, lambda pair, budget: dialled(pair, dial(budget)),
        lambda pair, n, budget: dial_flops(pair, dial(budget), n),
        needs=("top",) if dial(0.5).top else (), dial=True,
    )  # fmt: skip


def _sparse(title: str, dial: Callable[[float], ExactPositions]) -> Method:
    def prefill(pair: KVPredictionModel, budget: float) -> Prefill:
        return drop_all_but(pair, attended(pair, dial(budget)))

    return Method(
        title, prefill, lambda pair, n, budget: sparse_flops(pair, n, dial(budget)), needs=("top", "drop")
    )  # fmt: skip


def _kept(pair: KVPredictionModel, n: int, budget: float) -> int:
    return full_prefill_flops(pair.base, _last(budget).last_of(n - 1) + 1)


METHODS: dict[str, Method] = {
    "exact": Method(
        "base alone", lambda pair, budget: prefill_of(pair.base),
        lambda pair, n, budget: full_prefill_flops(pair.base, n), budgets=False,
    ),
    "predicted": Method(
        "KV prediction", lambda pair, budget: dialled(pair, None),
        lambda pair, n, budget: dial_flops(pair, ExactPositions(), n), budgets=False, dial=True,
    ),
    "auxiliary": Method(
        "auxiliary alone", lambda pair, budget: prefill_of(pair.auxiliary_model),
        lambda pair, n, budget: full_prefill_flops(pair.auxiliary_model, n), budgets=False, needs=("auxiliary",),
    ),
    "dial-last": _dial("dial: last", _last),
    "dial-top": _dial("dial: top", _top),
    "dial-both": _dial("dial: 4 first, last and top", _both),
    "sparse-top": _sparse("sparse prefill: top", _top),
    "sparse-both": _sparse("sparse prefill: 4 first, last and top", _both),
    "last-only": Method(
        "the last tokens only",
        lambda pair, budget: drop_all_but_last(pair.base, _last(budget).last_of), _kept, needs=("drop",),
    ),
    "random": Method(
        "random tokens only",
        lambda pair, budget: drop_all_but(pair, at_random(_last(budget).last_of, seed=0)), _kept,
        needs=("rows", "drop"),
    ),
    "pruned": Method(
        "base with that share of layers", lambda pair, budget: prefill_of(pruned(pair.base, budget)),
        lambda pair, n, budget: full_prefill_flops(pruned(pair.base, budget), n),
    ),
}  # fmt: skip


def usable(pair: KVPredictionModel, names: list[str]) -> dict[str, str]:
    """Which of the methods the pair's families cannot do, and why."""
    checks = {
        "rows": pair.rows.check,
        "top": pair.check_top,
        "drop": lambda: check_windows(pair.base),
        "auxiliary": lambda: pair.auxiliary_model,
    }
    reasons = {}
    for name in names:
        try:
            for need in METHODS[name].needs:
                checks[need]()
        except ValueError as error:
            reasons[name] = str(error)
    return reasons
