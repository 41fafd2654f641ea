"""The recipe of the bundled pair in miniature: every step, what is done already, what it trains on."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from kvpred_mlx import load
from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.recipe import corpus, demo_pair, plan, pretrain, steps
from kvpred_mlx.bench.recipe.plan import lfm2, nemotron, qwen3_5
from kvpred_mlx.bench.recipe.steps import Recipe
from kvpred_mlx.bench.studies import compare_sources
from kvpred_mlx.making.data import PackedSequences
from kvpred_mlx.making.pairing import load_part
from kvpred_mlx.pair.sources import SOURCES

MODULES = {
    f"module{i}.py": "".join(f"def function_{i}_{j}(a, b):\n    return a * {j} + b\n\n\n" for j in range(40))
    for i in range(30)
}


@pytest.fixture
def small(monkeypatch):
    """Sizes that take seconds; the models that trainings began with."""
    monkeypatch.setattr(corpus, "modules", lambda: MODULES)
    monkeypatch.setattr(plan, "VOCABULARY", 300)
    configs = {
        "attention": {"base": nemotron(64, 2, 2, 1, 64, 32), "auxiliary": nemotron(32, 1, 1, 1, 32, 32)},
        "lfm2": {"base": lfm2(64, 6, 2, 64), "auxiliary": lfm2(32, 4, 2, 32)},
        "qwen3.5": {"base": qwen3_5(32, 4, 1, 64, 32, 1), "auxiliary": qwen3_5(32, 4, 1, 32, 32, 1)},
    }
    monkeypatch.setattr(plan, "CONFIGS", configs)
    for name, value in {
        "CONTEXT": 128,
        "TEXT_TOKENS": 32,
        "REPEATING_ROWS": 20,
        "REPEATING_TOKENS": 24,
    }.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(plan, "PROMPT_TOKENS", (40,))
    begun = []

    def recorded(config, rows, budget, settings, folder, begin, short):
        begun.append(begin and begin.name)
        return pretrain.pretrain(config, rows, budget, settings, folder, begin, short)

    monkeypatch.setattr(steps, "pretrain", recorded)
    return begun


def run_recipe():
    with pytest.raises(SystemExit) as stop:
        command.run(demo_pair.main)
    assert stop.value.code == 0


def test_every_step(small, tmp_path, monkeypatch):
    iters = ",".join("2" * len(plan.SHARES))
    monkeypatch.setattr(sys, "argv", ["demo_pair", "--folder", str(tmp_path), "--iters", iters])
    run_recipe()
    assert small == [None, "base-text", "base-repeating", None, "auxiliary-text", "auxiliary-repeating"]
    pair, tokenizer = load(tmp_path / "pair")
    ids = tokenizer.encode("return a\n", add_special_tokens=False)
    assert tokenizer.decode(ids) == "return a\n" and len(pair.base.layers) == 2
    card = (tmp_path / "pair" / "README.md").read_text()
    assert "base-text 2, base-repeating 2, base 2, auxiliary-text 2" in card and "Prompt 40 tokens" in card
    trained = corpus.read(tmp_path / "train.jsonl")
    held_out = corpus.read(tmp_path / "heldout.jsonl")
    assert held_out and not set(trained) & set(held_out) and len(trained) + len(held_out) == len(MODULES)
    before = (tmp_path / "pair" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["demo_pair", "--folder", str(tmp_path), "--iters", iters])
    run_recipe()
    assert len(small) == 6 and (tmp_path / "pair" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "said", "depth"), [("lfm2", "short convolutions", 3), ("qwen3.5", "gated delta nets", 2)]
)
def test_a_hybrid_pair(layout, said, depth, small, tmp_path, monkeypatch):
    iters = ",".join("1" * len(plan.SHARES))
    argv = ["demo_pair", "--folder", str(tmp_path), "--iters", iters, "--layout", layout]
    monkeypatch.setattr(sys, "argv", argv)
    run_recipe()
    pair, _ = load(tmp_path / "pair")
    assert pair.base.model_type == layout.replace(".", "_")
    assert said in (tmp_path / "pair" / "README.md").read_text()
    alone, _ = load(tmp_path / "first-layers")
    assert alone.predictor.depths == (depth,)
    monkeypatch.setattr(sys, "argv", [*argv[:-1], "mamba"])
    with pytest.raises(SystemExit) as stop:
        command.run(demo_pair.main)
    assert stop.value.code == 2


def test_a_lesson_begins_with_the_weights_of_the_one_before(small, tmp_path):
    recipe = Recipe(tmp_path, minutes=0, iters=dict.fromkeys(plan.SHARES, 1))
    recipe.corpus()
    recipe.pretrain("auxiliary")
    before, after = (
        np.array(load_part(str(tmp_path / name)).model.model.embed_tokens.weight)
        for name in ("auxiliary-text", "auxiliary")
    )
    assert 0 < np.abs(before - after).max() < 0.01 < np.abs(before).max()


@pytest.mark.slow
def test_sources_are_compared_in_the_recipe_s_folder(small, tmp_path, monkeypatch):
    for name, value in {"LENGTHS": (40,), "WINDOWS": 4, "TRIALS": 2, "FIT_TOKENS": 2000}.items():
        monkeypatch.setattr(compare_sources, name, value)
    recipe = Recipe(tmp_path, minutes=0, iters=dict.fromkeys(plan.SHARES, 1))
    recipe.corpus()
    recipe.pretrain("base")
    recipe.pretrain("auxiliary")
    told = []
    found = compare_sources.compare(tmp_path, 1, lambda done, total, what=None: told.append(what))
    assert found["schema"] == 1 and found["complete"] and json.loads(json.dumps(found))["variants"]
    assert (
        len(found["variants"]) == len(told) - 1 == 3 * len(SOURCES) and told[-1] == "measuring at 40 tokens"
    )
    for variant in found["variants"]:
        figures = variant["lengths"][40]
        assert figures["flops_ratio"] > 1 and figures["times_sooner"]["ttft"] > 0
        assert figures["quality"]["agreement"]["low"] <= figures["quality"]["agreement"]["high"]
    table = compare_sources.markdown(found).splitlines()
    assert len(table) == 2 + 3 * len(SOURCES) and {line.count("|") for line in table} == {10}
    kept = [load(tmp_path / "sources" / v.name)[0] for v in compare_sources.variants(1)]
    assert [pair.predictor.source for pair in kept[::2][: len(SOURCES)]] == list(SOURCES)


def test_repeating_rows_begin_again():
    text = PackedSequences(np.arange(3, 403).reshape(10, 40))
    rows = corpus.repeating_rows(text, 50, 32, seed=0).rows
    assert rows.shape == (50, 33) and rows.min() >= 3
    periods = {next(p for p in range(1, 33) if (row[p:] == row[:-p]).all()) for row in rows}
    assert min(periods) >= 8 and max(periods) < 16 and len(periods) > 3


def test_short_rows_come_first():
    rows = pretrain.Curriculum(np.arange(8 * 9).reshape(8, 9), short=1)
    halves, whole = rows.batch(0, 2, seed=0), rows.batch(1, 2, seed=0)
    assert halves.shape == (4, 5) and whole.shape == (2, 9)
    assert halves[0, -1].item() == halves[2, 0].item()  # a half's last target is the next half's first input
