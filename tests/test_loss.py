"""The training loss against CoreNet's own numbers, its gradients, and gradient checkpointing."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import DATA
from mlx.utils import tree_flatten, tree_unflatten
from pairs import make_pair, tokens

from kvpred_mlx import load_model
from kvpred_mlx.making.loss import KVPredictionLoss, LossWeights
from kvpred_mlx.pair.sources import SOURCES

FAMILIES = [
    ("openelm", "openelm"),
    ("llama", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma3_text", "llama"),
    ("olmoe", "qwen3"),
]


@pytest.fixture(scope="module")
def golden():
    return mx.load(str(DATA / "golden_tiny/golden.safetensors"))


def trainable(pair):
    pair.freeze()
    pair.auxiliary.unfreeze()
    pair.predictor.unfreeze()
    return pair


def gradient(pair, loss, batch):
    value, gradients = nn.value_and_grad(pair, lambda model: loss(model, batch)[0])(pair)
    return value, dict(tree_flatten(gradients))


def test_every_term_is_corenets(golden_pair, golden):
    pair = load_model(golden_pair)
    ids, targets = golden["input_ids"], golden["target"]
    loss = KVPredictionLoss(pair, LossWeights(z=1e-4), ignore_index=255)
    total, terms = loss.of(pair, ids, targets)
    expected = {
        "base": "loss.base_loss",
        "auxiliary": "loss.auxiliary_loss",
        "keys": "loss.k_loss/total",
        "values": "loss.v_loss/total",
    }
    for ours, theirs in expected.items():
        assert abs(terms[ours].item() - golden[theirs].item()) < 1e-4, ours
    # CoreNet's z-loss counts ignored rows as logits of zero, each (log V)^2: the quirk put back.
    ignored, count = int((targets == 255).sum()), targets.size
    quirk = terms["z"].item() + 2 * ignored * math.log(256) ** 2 / (count - ignored)
    theirs = golden["loss.z_loss_base"] + golden["loss.z_loss_auxiliary"]
    assert abs(1e-4 * quirk - theirs.item()) < 1e-6
    without_z = total.item() - 1e-4 * terms["z"].item()
    assert abs(without_z + theirs.item() - golden["loss.total_loss"].item()) < 1e-4


def test_padding_counts_nowhere(golden_pair, golden):
    pair = load_model(golden_pair)
    loss = KVPredictionLoss(pair, LossWeights(z=1e-4), ignore_index=255)
    ids, targets = golden["input_ids"], golden["target"]
    alone = loss.of(pair, ids[:, :-1], targets[:, :-1])[1]
    padded = loss.of(pair, ids, targets)[1]
    for name, term in alone.items():
        assert abs(term.item() - padded[name].item()) < 1e-5, name


def test_weights_weigh():
    pair = make_pair("llama", "qwen2")
    batch = tokens(13, batch=2)
    total, terms = KVPredictionLoss(pair, LossWeights(auxiliary=0.5, kv=2.0))(pair, batch)
    expected = terms["base"] + 0.5 * terms["auxiliary"] + 2 * (terms["keys"] + terms["values"])
    assert mx.allclose(total, expected)
    with pytest.raises(ValueError, match="kv is -1"):
        LossWeights(kv=-1)


@pytest.mark.variations
@pytest.mark.parametrize("source", SOURCES)
def test_gradients_against_finite_differences(source):
    pair = trainable(make_pair("qwen3", "qwen2", source=source))
    loss = KVPredictionLoss(pair, LossWeights(z=1e-4))
    batch = tokens(11, batch=2)
    _, gradients = gradient(pair, loss, batch)
    assert {name.partition(".")[0] for name in gradients} == {"auxiliary", "predictor"}
    start = dict(tree_flatten(pair.trainable_parameters()))
    for part in ("auxiliary", "predictor"):
        along = {n: g for n, g in gradients.items() if n.startswith(part)}
        noise = {n: mx.random.normal(g.shape, key=mx.random.key(g.size)) for n, g in along.items()}
        along = {n: g / norm(along) + noise[n] / norm(noise) for n, g in along.items()}
        values = []
        for step in (1e-3, -1e-3):
            moved = {n: p + step * along[n] if n in along else p for n, p in start.items()}
            pair.update(tree_unflatten(list(moved.items())))
            values.append(loss(pair, batch)[0].item())
        pair.update(tree_unflatten(list(start.items())))
        expected = sum((gradients[n] * d).sum() for n, d in along.items()).item()
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=0.01), part


def norm(arrays) -> float:
    return sum((a * a).sum() for a in arrays.values()).item() ** 0.5


@pytest.mark.variations
@pytest.mark.parametrize(("base", "auxiliary"), FAMILIES)
@pytest.mark.parametrize("source", ["kv", "hidden"])
def test_checkpointed_gradients_are_the_same(base, auxiliary, source):
    pair = trainable(make_pair(base, auxiliary, source=source))
    loss = KVPredictionLoss(pair, LossWeights())
    batch = tokens(12, batch=2)
    value, plain = gradient(pair, loss, batch)
    pair.base_taps.checkpointed = pair.auxiliary_taps.checkpointed = True
    again, checkpointed = gradient(pair, loss, batch)
    assert value.item() == pytest.approx(again.item(), rel=1e-6)
    for name, g in plain.items():
        assert mx.allclose(g, checkpointed[name], rtol=1e-4, atol=1e-5), name
    assert all(mx.any(g != 0) for name, g in plain.items() if name.startswith("predictor"))


@pytest.mark.slow
def test_checkpointing_saves_memory():
    pair = trainable(make_pair("llama", "llama"))
    loss = KVPredictionLoss(pair, LossWeights())
    batch = tokens(385, batch=4)
    peaks = []
    for checkpointed in (False, True):
        pair.base_taps.checkpointed = pair.auxiliary_taps.checkpointed = checkpointed
        mx.reset_peak_memory()
        mx.eval(gradient(pair, loss, batch))
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 0.8 * peaks[0]
