"""A training's states on disk: written whole or not at all, the latest resumed, another training's refused."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from kvpred_mlx.errors import changes, one_line
from kvpred_mlx.files import new_directory

KEPT_STATES = 2


def saved_states(folder: Path) -> list[Path]:
    """The states in `folder`, the latest last."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def save_state(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, identity: dict[str, Any]
) -> None:
    """Save the state after `step` steps beside and rename it; older states but the last are removed.

    Args:
        identity: what must be the same for the state to be resumed, as JSON.
    """
    with new_directory(folder / f"step-{step:08d}", overwrite=True) as directory:
        mx.save_safetensors(str(directory / "trainable.safetensors"), _flat(model.trainable_parameters()))
        mx.save_safetensors(str(directory / "optimizer.safetensors"), _flat(optimizer.state))
        (directory / "config.json").write_text(json.dumps({"step": step, **identity}))
    for old in saved_states(folder)[:-KEPT_STATES]:
        shutil.rmtree(old, ignore_errors=True)


def resume(folder: Path, model: nn.Module, optimizer: Optimizer, identity: dict[str, Any]) -> int:
    """Take up the latest state, if there is one; returns the steps that are done.

    A damaged state is named on standard error, and the one before it taken up.

    Raises:
        ValueError: the state has another identity, or all states are damaged.
    """
    states, damaged = saved_states(folder), list[Path]()
    for state in reversed(states):
        try:
            facts, step = _facts(state / "config.json")
            _check_same(state, facts, identity)
            weights = _read(state / "trainable.safetensors")
            if _shapes(weights) != _shapes(_flat(model.trainable_parameters())):
                raise _DamagedError("trainable.safetensors holds other weights")
            optimized = _read(state / "optimizer.safetensors")
        except (OSError, _DamagedError) as error:
            print(f"{state}: damaged ({one_line(error)}), the state before it is tried", file=sys.stderr)
            damaged.append(state)
            continue
        for other in damaged:  # out of the way of the state that will be saved there, and not lost
            with contextlib.suppress(FileNotFoundError):  # another process of this training was sooner
                other.rename(other.with_name(f"damaged-{other.name}.{secrets.token_hex(4)}"))
        model.update(_nested(weights))
        optimizer.state = _nested(optimized)
        optimizer.init(model.trainable_parameters())
        mx.eval(model.parameters(), optimizer.state)
        return step
    if states:
        raise ValueError(f"{folder}: every saved state is damaged, remove it to start anew")
    return 0


class _DamagedError(Exception):
    """What is on disk is not what was saved."""


def _facts(path: Path) -> tuple[dict[str, Any], int]:
    """What a state says of itself, and its step."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return facts, int(facts.pop("step"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"{path.name}: {one_line(error)}") from error


def _check_same(state: Path, facts: dict[str, Any], identity: dict[str, Any]) -> None:
    differ = changes(dict(tree_flatten(facts)), dict(tree_flatten(identity)))
    if differ:
        raise ValueError(
            f"{state} was trained with {'; '.join(differ)}: give the same, or remove it to start anew"
        )


def _read(path: Path) -> dict[str, mx.array]:
    """Arrays by name, all of them from disk: a file that ends early is found out now."""
    try:
        arrays: Any = mx.load(str(path))
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise _DamagedError(f"{path.name}: {one_line(error)}") from error
    return arrays


def _shapes(arrays: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _flat(tree: Any) -> dict[str, mx.array]:
    return {k: v for k, v in dict(tree_flatten(tree)).items() if isinstance(v, mx.array)}


def _nested(flat: Any) -> Any:
    return tree_unflatten(list(flat.items()))
