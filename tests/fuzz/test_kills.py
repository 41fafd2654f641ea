"""Commands killed at random moments: what they make is whole or absent, and run again they end as if nothing had been.

Half of the kills come at a moment of the time that an uninterrupted run takes, half at a change of a file.
KVPRED_MLX_FUZZ_EXAMPLES sets how many: fifty of each command in `make fuzz`, two in `make test`.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backend
import mlx.core as mx
import pytest
from checkpoints import pair_state, pair_yaml
from checkpoints import save as save_checkpoint
from conftest import DATA
from killing import Commands, commands
from odd import EXAMPLES
from test_making import TEXT, write_model

from kvpred_mlx.bench.front import files as front_files
from kvpred_mlx.pair.locating import DEMO_PAIR

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or not backend.ON_CPU, reason="a GPU's context does not stand forks"
    ),
]
KILLS = min(50, max(2, EXAMPLES // 30))
Result = dict[str, Any]


def raw(array: mx.array) -> tuple[Any, ...]:
    """An array to the last bit."""
    return (
        array.shape,
        str(array.dtype),
        bytes(memoryview(array.reshape(-1).view(mx.uint8))) if array.size else b"",
    )


def weights(folder: Path) -> Result:
    """Weights and config of a model's directory, all of them."""
    arrays = {}
    for file in sorted(folder.glob("model*.safetensors")):
        arrays |= mx.load(str(file))
    assert arrays, folder
    mx.eval(arrays)
    config = json.loads((folder / "config.json").read_text())
    return {name: raw(array) for name, array in arrays.items()} | {"config": config}


def cached(file: Path) -> Result:
    """Arrays and notes of a prompt cache."""
    arrays, notes = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    return {name: raw(array) for name, array in arrays.items()} | {"notes": notes}


def answers(folder: Path) -> Result:
    """What an evaluation found, without times."""
    results = json.loads((folder / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()[1:]]
    rows = [{n: r[n] for n in ("task", "metric", "mode", "items", "score")} for r in results["rows"]]
    items = {f"{r['task']} {r['mode']} {r['id']}": (r["answers"], r["scores"]) for r in lines}
    return {"complete": results["complete"], "rows": rows, "items": items}


def front(folder: Path) -> Result:
    """What a front found, without times."""
    results = front_files.read(folder / "results.json")
    names = ("prompt_tokens", "method", "budget", "flops", "quality", "recall", "gain")
    return {"complete": results["complete"], "cells": [{n: c[n] for n in names} for c in results["cells"]]}


def whole_weights(place: Path, expected: Result) -> None:
    assert weights(place) == expected


def whole_cache(place: Path, expected: Result) -> None:
    assert cached(place) == expected


def readable(place: Path, expected: Result) -> None:
    """Results so far: whole JSON."""
    file = place / "results.json"
    if file.exists():
        found = json.loads(file.read_text())
        assert found["complete"] in (True, False)
        assert not found["complete"] or READ[place.name](place) == expected


READ: dict[str, Callable[[Path], Result]] = {
    "pair": weights, "cache.safetensors": cached, "answers": answers, "front": front,
}  # fmt: skip
CHECK: dict[str, Callable[[Path, Result], None]] = {
    "pair": whole_weights, "cache.safetensors": whole_cache, "answers": readable, "front": readable,
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory, demo_pair):
    """Two tiny models, a checkpoint, and text."""
    root = tmp_path_factory.mktemp("material")
    write_model(root / "base", "qwen3", demo_pair[1])
    write_model(root / "small", "llama", demo_pair[1])
    (root / "text.txt").write_text(TEXT[:60_000])
    save_checkpoint(pair_state(), root / "model.pt")
    pair_yaml(root / "model.yaml")
    return root


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with commands(tmp_path_factory.mktemp("commands")) as run:
        yield run


def made(material: Path, name: str, *options: Any) -> list[Any]:
    text = ["--data", material / "text.txt", "--max-seq-length", 96]
    two = ["--base", material / "base", "--auxiliary", material / "small"]
    return [name, *two, *text, "--mlx-path", "pair", "--overwrite", *options]


COMMANDS: dict[str, tuple[str, Callable[[Path], list[Any]]]] = {
    "fit": ("pair", lambda m: made(m, "fit", "--tokens", 3000, "--batch-size", 4, "--windows", 2)),
    "train": ("pair", lambda m: made(
        m, "train", "--fit-tokens", 2000, "--iters", 8, "--batch-size", 2, "--save-every", 1)),
    "train --as-used": ("pair", lambda m: made(
        m, "train", "--as-used", "--fit-tokens", 2000, "--iters", 6, "--batch-size", 2, "--save-every", 1,
        "--windows", 8)),
    "convert": ("pair", lambda m: [
        "convert", "--checkpoint", m / "model.pt", "--config", m / "model.yaml", "--mlx-path", "pair", "--overwrite"]),
    "pareto": ("front", lambda m: [
        "pareto", DEMO_PAIR, "--data", m / "text.txt", "--all-documents", "--prompt-lens", "96,128", "--methods",
        "predicted", "--windows", 2, "--score-tokens", 8, "--questions", 1, "--trials", 1, "--dequantize", "--no-plot",
        "--output-dir", "front"]),
    "eval": ("answers", lambda m: [
        "eval", DEMO_PAIR, "--tasks", "triviaqa", "--data", DATA / "eval/triviaqa.jsonl", "-m", 4, "--no-plot",
        "--output-dir", "answers"]),
    "cache_prompt": ("cache.safetensors", lambda m: [
        "cache_prompt", "--model", DEMO_PAIR, "--prompt", "def f(x):\n    return x\n" * 9, "--prompt-cache-file",
        "cache.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_killed(name, material, running: Commands, tmp_path):
    target, arguments_of = COMMANDS[name]

    def arguments(folder: Path) -> list[Any]:
        folder.mkdir(exist_ok=True)
        return [folder / word if word == target else word for word in arguments_of(material)]

    running(*arguments(tmp_path / "first"))  # with all that there is to import
    whole = running(*arguments(tmp_path / "whole"))
    assert whole.code == 0 and whole.operations > 0, whole
    expected, rng = READ[target](tmp_path / "whole" / target), random.Random(name)
    visible = {p.name for p in (tmp_path / "whole").iterdir()}
    killed = 0
    for i in range(KILLS):
        folder = tmp_path / str(i)
        operation = rng.randint(1, whole.operations) if i % 2 else None
        seconds = None if i % 2 else rng.uniform(0.05, 1) * whole.seconds
        ended = running(*arguments(folder), seconds=seconds, operation=operation)
        where = f"killed {f'before change {operation}' if i % 2 else f'after {seconds:.3f} s'}"
        assert ended.code in (-9, 0) and (ended.code or not i % 2), (where, ended)
        killed += ended.code == -9
        if (folder / target).exists():
            CHECK[target](folder / target, expected)
        again = running(*arguments(folder))
        assert again.code == 0, (where, again)
        assert READ[target](folder / target) == expected, where
        assert {p.name for p in folder.iterdir() if p.name[0] != "."} == visible, where
    print(
        f"{name}: {killed} killed of {KILLS}; a whole run {whole.seconds:.1f} s, {whole.operations} changes"
    )
    assert killed >= KILLS / 2
