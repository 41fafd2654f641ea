"""Recording windows, and training as a cache is used."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from pairs import make_first_layers_pair, make_pair, tokens

from kvpred_mlx.making.as_used import AsUsedLoss, AsUsedWeights, as_used_trainer, divergence
from kvpred_mlx.making.fresh_windows import FreshWindows
from kvpred_mlx.making.in_turn import InTurn
from kvpred_mlx.making.recording import FACTS, Recording, record
from kvpred_mlx.making.settings import TrainingSettings
from kvpred_mlx.making.windows import Windows

pytestmark = pytest.mark.variations  # the first kind of pair

SETTINGS = TrainingSettings(
    iters=6, batch_size=2, learning_rate=1e-2, warmup=0, save_every=2, steps_per_report=2
)


def windows(count=6, prompt=40, scored=8, seed=0) -> Windows:
    rows = np.array(tokens(prompt + scored, seed, count))
    return Windows(rows[:, :prompt], rows[:, prompt:], np.arange(count), np.full(count, np.nan))


@pytest.fixture(params=["first layers", "hidden", "kv"])
def pair(request):
    if request.param == "first layers":
        return make_first_layers_pair("qwen3", [1, 2])
    return make_pair("qwen3", "qwen2", source=request.param)


def whole_logits(pair, rows):
    """The base over the prompt as the pair fills its cache, then over the answer: nothing recorded."""
    prompts, continuations = mx.array(rows.prompts), mx.array(rows.continuations)
    cache = pair.make_cache()
    pair(prompts[:, :-1], cache=cache)
    return pair.base(mx.concatenate([prompts[:, -1:], continuations[:, :-1]], axis=1), cache=cache[:-1])


def exact_logits(pair, rows):
    prompts, continuations = mx.array(rows.prompts), mx.array(rows.continuations)
    cache = make_prompt_cache(pair.base)
    pair.base(prompts[:, :-1], cache=cache)
    return pair.base(mx.concatenate([prompts[:, -1:], continuations[:, :-1]], axis=1), cache=cache)


def test_a_recording_gives_what_the_models_give(pair, tmp_path):
    rows = windows()
    recording = record(pair, rows, tmp_path / "recorded", batch_size=4)
    assert len(recording) == 6 and recording.tokens_per_row == 48
    batch = Recording(tmp_path / "recorded").rows(slice(None))
    assert mx.allclose(AsUsedLoss(recording).logits(pair, batch), whole_logits(pair, rows), atol=2e-2)
    exact = exact_logits(pair, rows)
    logprobs = exact - mx.logsumexp(exact, axis=-1, keepdims=True)
    assert mx.array_equal(batch["top_ids"][..., 0], mx.argmax(exact, axis=-1))
    found = mx.take_along_axis(logprobs, batch["top_ids"], axis=-1)
    assert mx.allclose(found, batch["top_logprobs"], atol=1e-4)


def test_fresh_windows_are_what_a_recording_holds(pair, tmp_path):
    rows = windows(count=5)
    recording, fresh = record(pair, rows, tmp_path / "recorded", batch_size=2), FreshWindows(pair, rows)
    assert (len(fresh), fresh.tokens_per_row, fresh.checksum()) == (5, 48, recording.checksum())
    for index in range(4):  # beyond the first epoch
        mine, theirs = fresh.batch(index, 2, seed=3), recording.batch(index, 2, seed=3)
        for name, array in mine.items():
            atol = 1e-4 if name.startswith("top") else 2e-2  # half precision on disk
            assert mx.allclose(array, theirs[name], atol=atol), name


def test_training_on_fresh_windows(pair, tmp_path):
    losses = []
    fresh = FreshWindows(pair, windows())
    as_used_trainer(pair, fresh, replace(SETTINGS, iters=12)).run(lambda report: losses.append(report.loss))
    assert losses[-1] < losses[0]


def test_windows_of_several_lengths_take_turns(pair, tmp_path):
    short, long = (FreshWindows(pair, windows(prompt=n)) for n in (20, 40))
    both = InTurn([short, long])
    assert both.checksum() not in (short.checksum(), long.checksum(), InTurn([long, short]).checksum())
    assert both.tokens_per_row == 38
    for index, (part, turn) in enumerate([(short, 0), (long, 0), (short, 1), (long, 1)]):
        assert mx.array_equal(both.batch(index, 2, 3)["kv"], part.batch(turn, 2, 3)["kv"])
    losses = []
    as_used_trainer(pair, both, replace(SETTINGS, iters=12)).run(lambda report: losses.append(report.loss))
    assert losses[-1] < losses[0]


def test_a_recording_is_gone_on_with(pair, tmp_path, monkeypatch):
    rows, seen = windows(), []

    def stop(done, total, what=None):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(pair, rows, tmp_path / "recorded", batch_size=2, progress=stop)
    assert Recording(tmp_path / "recorded").done == 4
    original = type(pair.base).__call__
    monkeypatch.setattr(
        type(pair.base),
        "__call__",
        lambda self, x, *a, **k: seen.append(x.shape) or original(self, x, *a, **k),
    )
    recording = record(pair, rows, tmp_path / "recorded", batch_size=2)
    assert {shape[0] for shape in seen} == {2} and sum(n == 39 for _, n in seen) >= 1
    again = record(pair, rows, tmp_path / "whole", batch_size=2)
    for name in ("kv", "top_ids", *recording.layout.features):
        assert np.array_equal(recording._arrays[name], again._arrays[name]), name


def test_other_windows_and_damage_are_refused(pair, tmp_path):
    folder = tmp_path / "recorded"
    record(pair, windows(), folder)
    with pytest.raises(ValueError, match="with other windows"):
        record(pair, windows(seed=1), folder)
    (folder / "kv.npy").write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged recording"):
        Recording(folder)
    with pytest.raises(FileNotFoundError, match="not a recording"):
        Recording(tmp_path)


def test_the_gradient_is_the_whole_graphs(pair, tmp_path):
    rows = windows()
    recording = record(pair, rows, tmp_path / "recorded")
    batch = recording.rows(slice(None))
    pair.freeze()
    pair.predictor.unfreeze()

    def whole(pair):
        return divergence(whole_logits(pair, rows), batch["top_ids"], batch["top_logprobs"])

    loss, gradient = nn.value_and_grad(pair, lambda pair: AsUsedLoss(recording)(pair, batch)[0])(pair)
    expected, other = nn.value_and_grad(pair, whole)(pair)
    assert abs(loss.item() - expected.item()) < 0.02 * abs(expected.item())
    for (name, a), (_, b) in zip(tree_flatten(gradient), tree_flatten(other), strict=True):
        assert mx.linalg.norm(a - b) <= 0.02 * mx.linalg.norm(b) + 1e-6, name


def test_the_gradient_is_that_of_finite_differences(pair, tmp_path):
    recording = record(pair, windows(), tmp_path / "recorded")
    batch, loss = recording.rows(slice(None)), AsUsedLoss(recording, AsUsedWeights(cross_entropy=0.5, kv=0.1))
    pair.freeze()
    pair.predictor.unfreeze()
    _, gradient = nn.value_and_grad(pair, lambda pair: loss(pair, batch)[0])(pair)
    flat = dict(tree_flatten(gradient))
    before = dict(tree_flatten(pair.predictor.parameters()))
    step = {n: mx.random.normal(a.shape, key=mx.random.key(1)) * 1e-3 for n, a in before.items()}

    def at(scale):
        pair.predictor.load_weights([(n, a + scale * step[n]) for n, a in before.items()], strict=False)
        return loss(pair, batch)[0].item()

    numeric = (at(1.0) - at(-1.0)) / 2
    analytic = sum(
        (flat[f"predictor.{n}"] * s).sum().item() for n, s in step.items() if f"predictor.{n}" in flat
    )
    assert numeric == pytest.approx(analytic, rel=0.05)


def test_divergence_is_zero_for_the_same_and_counts_the_rest():
    logits = mx.random.normal((2, 3, 50), key=mx.random.key(0))
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.argsort(-logprobs, axis=-1)
    for kept in (50, 10):
        top = mx.take_along_axis(logprobs, ids[..., :kept], axis=-1)
        assert abs(divergence(logits, ids[..., :kept], top).item()) < 1e-6
    other = mx.random.normal((2, 3, 50), key=mx.random.key(1))
    logq = other - mx.logsumexp(other, axis=-1, keepdims=True)
    expected = (mx.exp(logprobs) * (logprobs - logq)).sum(-1).mean()
    whole = divergence(other, ids, mx.take_along_axis(logprobs, ids, axis=-1))
    assert whole.item() == pytest.approx(expected.item(), rel=1e-4)
    some = divergence(other, ids[..., :10], mx.take_along_axis(logprobs, ids[..., :10], axis=-1))
    assert 0 < some.item() < expected.item()


def test_training_lowers_the_loss_and_touches_nothing_else(pair, tmp_path):
    recording = record(pair, windows(), tmp_path / "recorded")
    before = dict(tree_flatten(pair.parameters()))
    loss = AsUsedLoss(recording)
    batch = recording.rows(slice(None))
    first = loss(pair, batch)[0].item()
    as_used_trainer(pair, recording, SETTINGS).run()
    assert loss(pair, batch)[0].item() < first
    changed = {n for n, a in tree_flatten(pair.parameters()) if not mx.array_equal(a, before[n])}
    assert changed and all(name.startswith("predictor.") for name in changed)
    if hasattr(pair.predictor, "depths"):
        assert all(name.startswith("predictor.first_2.") for name in changed)


def test_training_resumes_to_the_same_weights(pair, tmp_path):
    recording = record(pair, windows(), tmp_path / "recorded")
    start = list(tree_flatten(pair.parameters()))
    as_used_trainer(pair, recording, SETTINGS).run()
    expected = dict(tree_flatten(pair.predictor.parameters()))
    pair.load_weights(start)
    as_used_trainer(pair, recording, SETTINGS, state_folder=tmp_path / "states").run(until=4)
    pair.load_weights(start)
    trainer = as_used_trainer(pair, recording, SETTINGS, state_folder=tmp_path / "states")
    assert trainer.step == 4
    trainer.run()
    for name, array in tree_flatten(pair.predictor.parameters()):
        assert mx.array_equal(array, expected[name]), name


def test_recordings_of_other_pairs_are_refused(tmp_path):
    recording = record(make_first_layers_pair("qwen3", [1]), windows(), tmp_path / "recorded")
    with pytest.raises(ValueError, match="lacks the features layer_2"):
        as_used_trainer(make_first_layers_pair("qwen3", [2]), recording, SETTINGS)
    with pytest.raises(ValueError, match="with another base"):
        as_used_trainer(make_first_layers_pair("openelm", [1]), recording, SETTINGS)
    with pytest.raises(ValueError, match="with other models of the same shapes"):
        other = make_first_layers_pair("qwen3", [1])
        other.base.model.norm.weight = other.base.model.norm.weight + 1
        as_used_trainer(other, recording, SETTINGS)
    facts = json.loads((tmp_path / "recorded" / FACTS).read_text())
    assert facts["done"] == 6
