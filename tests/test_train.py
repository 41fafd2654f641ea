"""The training loop: resuming, interruption, several processes, divergence; joint training of several families."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from pairs import make_pair, tokens

from kvpred_mlx import load, save
from kvpred_mlx.making.data import PackedSequences
from kvpred_mlx.making.joint import joint_trainer, restored_types
from kvpred_mlx.making.loop import DivergedError, Trainer
from kvpred_mlx.making.loss import LossWeights
from kvpred_mlx.making.optimizers import make_optimizer, schedule
from kvpred_mlx.making.settings import TrainingSettings
from kvpred_mlx.making.states import saved_states
from kvpred_mlx.pair.sources import SOURCES

FAMILIES = [
    ("openelm", "openelm"),
    ("llama", "qwen2"),
    ("qwen3", "llama"),
    ("gemma3_text", "qwen3"),
    ("olmoe", "qwen2"),
]
SETTINGS = TrainingSettings(
    iters=6, batch_size=4, learning_rate=3e-3, warmup=2, save_every=2, steps_per_report=1
)


def data(rows=24, length=16) -> PackedSequences:
    return PackedSequences(np.array(tokens(length + 1, 0, rows)))


def weights(pair) -> dict[str, mx.array]:
    return {k: mx.array(v) for k, v in tree_flatten(pair.parameters())}


def same(a, b) -> bool:
    return all(mx.array_equal(a[k], b[k]).item() for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("base", "auxiliary"), FAMILIES)
def test_trained_pairs_are_saved_loaded_and_generate(base, auxiliary, source, tmp_path):
    pair = make_pair(base, auxiliary, source=source)
    before = weights(pair)
    reports = []
    with restored_types(pair):
        joint_trainer(pair, data(), SETTINGS).run(reports.append)
    after = weights(pair)
    assert [r.step for r in reports] == [1, 2, 3, 4, 5, 6]
    assert min(r.loss for r in reports[1:]) < reports[0].loss
    assert set(reports[0].terms) == {"base", "auxiliary", "keys", "values"}
    changed = {k.partition(".")[0] for k in before if not mx.array_equal(before[k], after[k])}
    assert changed == {"auxiliary", "predictor"}
    save(tmp_path / "pair", pair)
    again, _ = load(tmp_path / "pair")
    prompt = tokens(50, seed=3)
    assert mx.allclose(again(prompt), pair(prompt), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("base", "auxiliary"), FAMILIES)
def test_a_step_can_be_compiled(base, auxiliary, source, compiling):
    """Traced, that is; on the CPU the kernels of all these would take minutes."""
    trainer = joint_trainer(make_pair(base, auxiliary, source=source), data(), SETTINGS)
    loss, terms = trainer._take_step._take(trainer._batches())
    assert loss.shape == () and set(terms) == {"base", "auxiliary", "keys", "values"}


def test_frozen_auxiliary():
    pair = make_pair()
    before = weights(pair)
    with restored_types(pair):
        joint_trainer(pair, data(), SETTINGS, freeze_auxiliary=True).run()
    after = weights(pair)
    changed = {k.partition(".")[0] for k in before if not mx.array_equal(before[k], after[k])}
    assert changed == {"predictor"}


def test_types_are_given_back():
    pair = make_pair()
    pair.set_dtype(mx.bfloat16)
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16", iters=2)
    with restored_types(pair):
        joint_trainer(pair, data(), settings).run()
        assert pair.predictor.key_maps[0].weight.dtype == mx.float32
    assert {a.dtype for _, a in tree_flatten(pair.parameters())} == {mx.bfloat16}


def test_quantized_parts():
    pair = make_pair("llama", "llama")
    nn.quantize(pair.auxiliary, 32, 8)
    with pytest.raises(
        ValueError,
        match="the auxiliary is quantized, expected float weights to train: --dequantize, or --freeze",
    ):
        joint_trainer(pair, data(), SETTINGS)
    nn.quantize(pair.base, 32, 4)
    before = weights(pair.predictor)
    with restored_types(pair):
        joint_trainer(pair, data(), SETTINGS, freeze_auxiliary=True).run()
    assert not same(before, weights(pair.predictor))


@pytest.mark.variations
@pytest.mark.parametrize(("base", "auxiliary"), FAMILIES)
def test_muon_takes_matrices_but_no_embeddings_heads_and_experts(base, auxiliary):
    pair = make_pair(base, auxiliary)
    pair.freeze()
    pair.auxiliary.unfreeze()
    pair.predictor.unfreeze()
    made = make_optimizer(dataclasses.replace(SETTINGS, optimizer="muon"))
    made.init(pair.trainable_parameters())
    of_muon, rest = (dict(tree_flatten(o.state)) for o in made.optimizers)
    taken = {k.removesuffix(".v") for k in of_muon if k.endswith(".v")} - {""}
    left = {k.removesuffix(".v") for k in rest if k.endswith(".v")}
    assert taken | left == {k for k, _ in tree_flatten(pair.trainable_parameters())} and not taken & left
    assert any(k.startswith("predictor.") for k in taken) and any("mlp" in k or "ffn" in k for k in taken)
    for name, array in tree_flatten(pair.trainable_parameters()):
        plain = array.ndim == 2 and not any(part in name for part in ("embed", "lm_head"))
        assert (name in taken) == plain


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_training_gives_the_same_weights(tmp_path, optimizer, compiled, compiling):
    straight, resumed, last = (make_pair() for _ in range(3))
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer)
    joint_trainer(straight, data(), settings, compiled=compiled).run()
    first = joint_trainer(resumed, data(), settings, state_folder=tmp_path, compiled=compiled)
    first.run(until=5)  # states are saved at 2 and 4: what comes after is lost, as when it is killed
    assert [p.name for p in saved_states(tmp_path)] == ["step-00000002", "step-00000004"]
    second = joint_trainer(last, data(), settings, state_folder=tmp_path, compiled=compiled)
    assert second.step == 4
    second.run()
    assert same(weights(straight), weights(last))


def test_other_settings_do_not_resume(tmp_path):
    joint_trainer(make_pair(), data(), SETTINGS, state_folder=tmp_path).run(until=3)
    other = dataclasses.replace(SETTINGS, learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"was trained with learning_rate 0.003, now 0.001: give the same"):
        joint_trainer(make_pair(), data(), other, state_folder=tmp_path)
    other = dataclasses.replace(SETTINGS, optimizer="muon")
    with pytest.raises(ValueError, match=r"was trained with optimizer 'adamw', now 'muon'"):
        joint_trainer(make_pair(), data(), other, state_folder=tmp_path)
    with pytest.raises(ValueError, match=r"was trained with kv 1.0, now 2.0"):
        joint_trainer(make_pair(), data(), SETTINGS, LossWeights(kv=2.0), tmp_path)
    with pytest.raises(ValueError, match=r"was trained with data \d+, now \d+"):
        joint_trainer(make_pair(), data(23), SETTINGS, state_folder=tmp_path)


@pytest.fixture(scope="module")
def trained_straight():
    """The weights of a training that was never interrupted."""
    pair = make_pair()
    joint_trainer(pair, data(), SETTINGS).run()
    return weights(pair)


@pytest.fixture(scope="module")
def states_of_four_steps(tmp_path_factory):
    """The folder of a training that ended after four of its six steps; to be copied."""
    folder = tmp_path_factory.mktemp("states")
    joint_trainer(make_pair(), data(), SETTINGS, state_folder=folder).run(until=4)
    return folder


@pytest.mark.variations(3)
@pytest.mark.parametrize("file", ["config.json", "trainable.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_state_is_named_and_the_older_one_used(
    states_of_four_steps, trained_straight, tmp_path, capsys, file, damage
):
    shutil.copytree(states_of_four_steps, tmp_path, dirs_exist_ok=True)
    latest = saved_states(tmp_path)[-1]
    place = latest / file
    if damage == "cut":
        place.write_bytes(place.read_bytes()[: place.stat().st_size // 2])
    elif damage == "gone":
        place.unlink()
    elif file == "config.json":
        place.write_bytes(b"\xff\xfe[]")
    else:
        mx.save_safetensors(str(place), {"other": mx.zeros(3)})
    if (file, damage) == ("optimizer.safetensors", "other"):
        return  # whole, and of any shape: mlx's optimizer begins anew with what it lacks
    resumed = make_pair()
    trainer = joint_trainer(resumed, data(), SETTINGS, state_folder=tmp_path)
    assert trainer.step == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"{latest}: damaged (")
    assert [path.is_dir() for path in tmp_path.glob("damaged-step-00000004.*")] == [True]
    trainer.run()
    assert same(trained_straight, weights(resumed))
    for state in saved_states(tmp_path):
        (state / file).write_bytes(b"")
    with pytest.raises(ValueError, match="every saved state is damaged"):
        joint_trainer(make_pair(), data(), SETTINGS, state_folder=tmp_path)


@pytest.mark.slow
def test_ctrl_c_saves(tmp_path, trained_straight):
    pair = make_pair()
    trainer = joint_trainer(pair, data(), SETTINGS, state_folder=tmp_path)

    def interrupt(report):
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer.run(interrupt)
    assert saved_states(tmp_path)[-1].name == "step-00000003"
    again = make_pair()
    joint_trainer(again, data(), SETTINGS, state_folder=tmp_path).run()
    assert same(trained_straight, weights(again))


def test_divergence_keeps_the_last_good_state(tmp_path):
    def loss(model, batch):
        value = nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:], reduction="mean")
        return value * mx.where(trainer_step() < 3, 1.0, float("nan")), {}

    pair = make_pair()
    steps = iter(range(100))
    trainer_step = lambda: mx.array(next(steps))
    trainer = Trainer(pair.auxiliary, loss, data(), SETTINGS, tmp_path, compiled=False)
    with pytest.raises(DivergedError, match=r"the loss of step 4 is nan: .*last good state is in"):
        trainer.run()
    states = saved_states(tmp_path)
    assert states[-1].name == "step-00000002"
    kept = mx.load(str(states[-1] / "trainable.safetensors"))
    assert all(mx.isfinite(a).all().item() for a in kept.values())


def test_a_full_disk_leaves_the_older_state(tmp_path, monkeypatch):
    trainer = joint_trainer(make_pair(), data(), SETTINGS, state_folder=tmp_path)
    trainer.run(until=3)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_accumulated_batches_are_one_large_batch():
    rows = data(32)
    halves = dataclasses.replace(SETTINGS, batch_size=4, grad_accumulation_steps=2, iters=1, grad_clip=0)
    whole = dataclasses.replace(SETTINGS, batch_size=8, iters=1, grad_clip=0)
    results = []
    for settings in (halves, whole):
        pair, seen = make_pair(), []
        joint_trainer(pair, rows, settings).run(seen.append)
        results.append((seen[0].loss, weights(pair)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert all(mx.allclose(a, results[1][1][k], atol=1e-4) for k, a in results[0][1].items())


def test_every_row_once_an_epoch():
    rows = data(10)
    seen = np.concatenate([np.array(rows.batch(i, 4, seed=1)) for i in range(5)])
    for epoch in (seen[:10], seen[10:]):
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, rows.rows))
    assert not np.array_equal(seen[:10], seen[10:])


def test_schedule_warms_up_and_decays():
    settings = TrainingSettings(iters=100, warmup=10, learning_rate=1.0, end_learning_rate=0.1)
    rate = schedule(settings)
    rates = [rate(mx.array(i)).item() for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10) and rates[-1] == pytest.approx(0.1, abs=0.01)


def test_settings_refused():
    with pytest.raises(ValueError, match="iters is 0, expected at least 1; learning_rate is nan"):
        TrainingSettings(iters=0, learning_rate=float("nan"))
    with pytest.raises(ValueError, match="optimizer 'sgd', expected adamw or muon"):
        joint_trainer(make_pair(), data(), dataclasses.replace(SETTINGS, optimizer="sgd"))


WORKER = """
import json, sys
sys.path[:0] = [{tests!r}, {root!r}]
import without_torch, quick_transformers
import kvpred_mlx, mlx.core as mx
from test_train import SETTINGS, data
from pairs import make_pair
from kvpred_mlx.making.joint import joint_trainer
seen = []
joint_trainer(make_pair(), data(), SETTINGS).run(seen.append)
if mx.distributed.init().rank() == 0:
    open({out!r}, "w").write(json.dumps([mx.distributed.init().size(), [r.loss for r in seen]]))
"""


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path):
    tests = Path(__file__).parent
    out, script = tmp_path / "losses.json", tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(tests), root=str(tests.parent), out=str(out)))
    launch = Path(sys.executable).with_name("mlx.launch")
    ports = ["--starting-port", str(40000 + os.getpid() % 20000)]
    done = subprocess.run(
        [str(launch), "-n", "2", *ports, "--", sys.executable, str(script)],
        check=False, capture_output=True, text=True, timeout=180, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert out.exists(), done.stdout + done.stderr
    size, losses = json.loads(out.read_text())
    seen = []
    joint_trainer(make_pair(), data(), SETTINGS).run(seen.append)
    assert size == 2
    assert losses == pytest.approx([r.loss for r in seen], rel=1e-4)


def test_batch_that_cannot_be_shared():
    class Three:
        def size(self):
            return 3

        def rank(self):
            return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.distributed, "init", lambda: Three())
        with pytest.raises(ValueError, match="batch size 4, expected a multiple of the 3 processes"):
            joint_trainer(make_pair(), data(), SETTINGS, LossWeights())
