"""A training's states on disk: written whole or not at all, the latest resumed, another training's refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

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

    Raises:
        ValueError: the state has another identity.
    """
    states = saved_states(folder)
    if not states:
        return 0
    facts = json.loads((states[-1] / "config.json").read_text())
    then = dict(tree_flatten({k: v for k, v in facts.items() if k != "step"}))
    now = dict(tree_flatten(identity))
    differ = [
        f"{k.rpartition('.')[2]} {then.get(k)!r}, now {now.get(k)!r}"
        for k in then | now
        if then.get(k) != now.get(k)
    ]
    if differ:
        raise ValueError(
            f"{states[-1]} was trained with {'; '.join(differ)}: give the same, or remove it to start anew"
        )
    model.update(_nested(mx.load(str(states[-1] / "trainable.safetensors"))))
    optimizer.state = _nested(mx.load(str(states[-1] / "optimizer.safetensors")))
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    return int(facts["step"])


def _flat(tree: Any) -> dict[str, mx.array]:
    return {k: v for k, v in dict(tree_flatten(tree)).items() if isinstance(v, mx.array)}


def _nested(flat: Any) -> Any:
    return tree_unflatten(list(flat.items()))
