"""`fit`, `train` and `quality` from the command line: from two models to figures, and what is refused."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from conftest import fails
from families import OVERRIDES, build
from mlx.utils import tree_flatten

from kvpred_mlx import Predictor, load, load_model, save
from kvpred_mlx.making.data import read_documents
from kvpred_mlx.making.pairing import join, keep_layers, load_part
from kvpred_mlx.making.regression import Sums
from kvpred_mlx.pair.description import weight_bytes
from kvpred_mlx.pair.locating import DEMO_PAIR
from kvpred_mlx.taps.kv_taps import KVTaps

TEXT = "".join(f"def function_{i}(a, b):\n    return a * {i} + b  # line {i}\n\n\n" for i in range(3000))


def write_model(folder, family, tokenizer, **overrides):
    model = build(family, {**OVERRIDES.get(family, {}), "vocab_size": 4096, **overrides})
    folder.mkdir(parents=True)
    mlx_lm.utils.save_model(folder, model)
    from dataclasses import asdict

    mlx_lm.utils.save_config(asdict(model.args), folder / "config.json")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, demo_pair):
    """Two tiny random models with the bundled tokenizer, and text to read."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "base", "qwen3", demo_pair[1])
    write_model(root / "small", "llama", demo_pair[1])
    (root / "text.txt").write_text(TEXT)
    return root


def arguments(models, out, *more):
    parts = ["--base", models / "base", "--auxiliary", models / "small", "--data", models / "text.txt"]
    return [*parts, "--mlx-path", out, "--max-seq-length", 96, *more]


def test_fit_makes_a_pair_with_a_card(models, tmp_path, run):
    out = tmp_path / "pair"
    code, printed, err = run("fit", *arguments(models, out, "--tokens", 4000))
    assert code == 0, err
    assert "retention" in printed and str(out) in printed.replace("\n", "")
    card = (out / "README.md").read_text()
    assert "source hidden" in card and "| predicted |" in card
    pair, tokenizer = load(out)
    assert pair.predictor.source == "hidden" and tokenizer is not None
    assert run("generate", "--model", out, "--prompt", "def f(x):\n" * 20, "-m", 3)[0] == 0
    assert (
        run(
            "bench",
            "--model",
            out,
            "--prompt-lens",
            64,
            "--trials",
            1,
            "-m",
            2,
            "--no-plot",
            "--output-dir",
            tmp_path / "b",
        )[0]
        == 0
    )
    fails(run("fit", *arguments(models, out)), 1, "exists already")


@pytest.mark.variations
@pytest.mark.parametrize("source", ["kv", "kv-joint"])
def test_fit_from_the_bases_own_layers(models, tmp_path, run, source):
    out = tmp_path / "pair"
    parts = [
        "--base",
        models / "base",
        "--auxiliary-layers",
        "0.5",
        "--data",
        models / "text.txt",
        "--mlx-path",
        out,
    ]
    code, _, err = run(
        "fit", *parts, "--source", source, "--layer-map", "even", "--max-seq-length", 96, "--tokens", 3000
    )
    assert code == 0, err
    pair, _ = load(out)
    assert len(pair.auxiliary.layers) == 2 and pair.predictor.layer_map == (0, 0, 1, 1)
    for kept, layer in zip((0, 2), pair.auxiliary.layers, strict=True):
        assert mx.array_equal(layer.mlp.up_proj.weight, pair.base.layers[kept].mlp.up_proj.weight)


@pytest.mark.variations
@pytest.mark.parametrize("family", ["openelm", "llama", "gemma3_text", "olmoe"])
def test_kept_layers_of_quantized_models(family, tmp_path, demo_pair):
    folder = write_model(tmp_path / family, family, demo_pair[1])
    base = load_part(str(folder))
    nn.quantize(base.model, 32, 4)
    pruned = keep_layers(base, [0, 3])
    ours = dict(tree_flatten(pruned.model.layers[1].parameters()))
    theirs = dict(tree_flatten(base.model.layers[3].parameters()))
    assert ours.keys() == theirs.keys() and all(mx.array_equal(ours[k], theirs[k]) for k in ours)
    assert pruned.model(mx.array([[1, 2, 3]])).shape == (1, 3, 4096)


def test_train_from_two_models_and_go_on_from_the_pair(models, tmp_path, run):
    out, more = tmp_path / "pair", tmp_path / "more"
    options = ["--iters", 4, "--batch-size", 2, "--steps-per-report", 2, "--fit-tokens", 2000, "--warmup", 1]
    code, printed, err = run("train", *arguments(models, out, *options))
    assert code == 0, err
    assert "step 4: loss" in err and "keys" in err and "tokens/s" in err and "retention" in printed
    assert not out.with_name("pair.training").exists()
    assert "trained together on 768 tokens" in (out / "README.md").read_text()
    pair = ["--model", out, "--data", models / "text.txt", "--mlx-path", more, "--max-seq-length", 64]
    code, _, err = run(
        "train", *pair, "--iters", 2, "--freeze-auxiliary", "--grad-checkpoint", "--no-compile"
    )
    assert code == 0, err
    before, after = load(out)[0], load(more)[0]
    assert mx.array_equal(
        before.auxiliary.layers[0].mlp.up_proj.weight, after.auxiliary.layers[0].mlp.up_proj.weight
    )
    assert not mx.array_equal(before.predictor.key_maps[0].weight, after.predictor.key_maps[0].weight)


def test_quality_of_the_demo_pair(models, run):
    code, out, err = run(
        "quality",
        "--data",
        models / "text.txt",
        "--prompt-tokens",
        "64,32",
        "--score-tokens",
        8,
        "--windows",
        4,
        "--dequantize",
        "--json",
    )
    assert code == 0, err
    figures = json.loads(out)
    assert [f["prompt_tokens"] for f in figures] == [64, 32]
    assert figures[0]["modes"]["exact"]["agreement"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    code, out, _ = run(
        "quality",
        DEMO_PAIR,
        "--data",
        models / "text.txt",
        "--prompt-tokens",
        32,
        "--score-tokens",
        8,
        "--windows",
        2,
        "--all-documents",
        "--exact-last",
        4,
    )
    assert code == 0 and "predicted" in out and "explained variance of keys" in out
    assert "read with exact-last=4" in " ".join(out.split())


def test_bad_usage_is_one_line(models, tmp_path, run):
    out, data = tmp_path / "out", models / "text.txt"
    both = ["--base", models / "base", "--auxiliary", models / "small", "--data", data, "--mlx-path", out]
    fails(run("fit", *both, "--source", "keys"), 2, "--source", "expected one of kv, kv-joint, hidden")
    fails(run("fit", *both, "--layer-map", "0,0,9,9"), 2, "--layer-map", "expected auto, even, or 4")
    fails(run("fit", *both, "--auxiliary-layers", "0.5"), 2, "both given", "expected one of the two")
    fails(
        run("fit", "--data", data, "--auxiliary", models / "small", "--mlx-path", out), 2, "--base", "missing"
    )
    fails(
        run("fit", "--base", models / "base", "--auxiliary-layers", "0.3", "--data", data, "--mlx-path", out),
        2,
        "0.3",
    )
    fails(run("fit", *both, "--tokens", 0), 2, "--tokens")
    fails(run("train", *both, "--model", DEMO_PAIR), 2, "--model")
    fails(run("train", *both, "--dtype", "int8"), 2, "--dtype", "float32, float16, bfloat16")
    fails(run("train", *both, "--optimizer", "sgd"), 2, "--optimizer", "'sgd', expected adamw or muon")
    muon = ("--optimizer", "muon", "--weight-decay", 0.1)
    fails(run("train", *both, *muon), 2, "--weight-decay", "0.1, expected none with --optimizer muon")
    fails(run("quality"), 2, "--data", "missing")
    fails(run("quality", "--data", data, "--prompt-tokens", "1,x"), 2, "--prompt-tokens", "'1', 'x'")
    assert not out.exists()


def test_bad_data_is_one_line(models, tmp_path, run):
    out = tmp_path / "out"
    both = ["--base", models / "base", "--auxiliary", models / "small", "--mlx-path", out]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("x = 1\n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    for command in ("fit", "train"):
        fails(run(command, *both, "--data", tmp_path / "absent"), 1, "absent", "no such file")
        fails(run(command, *both, "--data", tmp_path / "empty.txt"), 1, "empty.txt", "expected text")
        fails(
            run(command, *both, "--data", tmp_path / "short.txt"),
            1,
            "short.txt",
            "tokens, expected at least 513",
        )
        fails(run(command, *both, "--data", tmp_path / "latin.txt"), 1, "latin.txt", "not UTF-8 at byte 2")
    fails(run("quality", "--data", tmp_path / "short.txt", "--all-documents"), 1, "expected at least 256")
    assert not out.exists()


def test_models_that_do_not_fit(models, tmp_path, run, demo_pair):
    data = models / "text.txt"
    other = tmp_path / "other"
    write_model(other, "llama", demo_pair[1])
    file = other / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    vocabulary["model"]["vocab"] = {
        {"\n": "return"}.get(t, {"return": "\n"}.get(t, t)): i
        for t, i in vocabulary["model"]["vocab"].items()
    }
    file.write_text(json.dumps(vocabulary))
    parts = ["--base", models / "base", "--data", data, "--mlx-path", tmp_path / "out"]
    code, _out, err = run("fit", *parts, "--auxiliary", other)
    assert code == 1 and "token" in err and "expected the same" in err, err
    fails(run("fit", *parts, "--auxiliary", DEMO_PAIR), 1, "a pair already")
    fails(run("fit", *parts, "--auxiliary", tmp_path / "nothing"), 1, "no such directory")
    truncated = tmp_path / "truncated"
    write_model(truncated, "llama", demo_pair[1])
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails(run("fit", *parts, "--auxiliary", truncated), 1, "truncated")


def test_no_permission_and_a_full_disk(models, tmp_path, run, monkeypatch):
    import os

    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, *a, **k: path != tmp_path and allowed(path, *a, **k))
    fails(run("fit", *arguments(models, tmp_path / "locked" / "pair")), 1, "no permission to write in")
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlx_lm.utils, "save_model", full)
    code, _, err = run("fit", *arguments(models, tmp_path / "pair", "--tokens", 2000))
    assert code == 1 and "No space left on device" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [tmp_path / "pair.fitting"]  # the sums: the next try begins with them


@pytest.mark.slow
def test_a_loss_that_is_not_a_number(models, tmp_path, run):
    out = tmp_path / "pair"
    options = ["--iters", 8, "--batch-size", 2, "--fit-tokens", 2000, "--warmup", 0, "--learning-rate", 1e30]
    code, _, err = run("train", *arguments(models, out, *options, "--save-every", 1, "--grad-clip", 0))
    assert code == 1 and "try a lower learning rate" in err.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("bits", [None, 4])
def test_kept_layers_share_the_base_s_weights(tmp_path, demo_pair, bits):
    """In memory when the pair is made and when it is loaded again, and on disk."""
    folder = write_model(tmp_path / "base", "llama", demo_pair[1])
    base = load_part(str(folder))
    if bits:
        nn.quantize(base.model, 32, bits)
    mx.eval(base.model.parameters())
    before = mx.get_active_memory()
    pruned = keep_layers(base, [0, 2])
    mx.eval(pruned.model.parameters())
    assert mx.get_active_memory() - before < 0.05 * weight_bytes(base.model)
    widths = KVTaps(pruned.model).widths
    pair = join(base, pruned, Predictor([0, 0, 1, 1], widths, KVTaps(base.model).widths))
    save(tmp_path / "pair", pair)
    stored = mx.load(str(tmp_path / "pair" / "model.safetensors"))
    assert not any(name.startswith("auxiliary.") for name in stored)
    before = mx.get_active_memory()
    again = load_model(tmp_path / "pair")
    own = weight_bytes(again.base) + weight_bytes(again.predictor)
    assert mx.get_active_memory() - before < 1.2 * own
    prompt = mx.arange(1, 51)[None]
    assert mx.array_equal(again(prompt), pair(prompt))


def first_layers_arguments(models, out, *more):
    return [
        "fit", "--base", models / "base", "--data", models / "text.txt", "--mlx-path", out, "--max-seq-length", 96,
        "--tokens", 3000, "--batch-size", 4, *more,
    ]  # fmt: skip


def test_fit_of_a_base_alone(models, tmp_path, run):
    """Without auxiliary or layers the base's first half reads; the card has figures, and nothing else is left."""
    out = tmp_path / "pair"
    code, printed, err = run(*first_layers_arguments(models, out))
    assert code == 0, err
    pair, tokenizer = load(out)
    assert pair.predictor.depths == (2,) and pair.auxiliary is None and tokenizer is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pair"]
    card = (out / "README.md").read_text()
    assert "first 2 layers" in card and "| predicted |" in card and "| auxiliary |" not in card
    assert "explained variance of keys" in printed
    code, printed, _ = run("info", "--model", out)
    assert code == 0 and "first layers: 2" in printed
    code, printed, err = run(
        "generate", "--model", out, "--prompt", "x = 1\n" * 40, "--max-tokens", 4, "--json"
    )
    assert code == 0 and json.loads(printed)["ttft"] > 0, err
    fails(
        run("generate", "--model", out, "--prompt", "x", "--draft-model", "auxiliary"),
        1,
        "no auxiliary model",
    )
    fails(
        run("generate", "--model", out, "--prompt", "x", "--depth", "1"),
        1,
        "depth 1, expected one of the pair's: 2",
    )


@pytest.mark.variations
@pytest.mark.parametrize(
    ("layers", "depths"), [("first:1", (1,)), ("first:0.25,0.5", (1, 2)), ("first:2,1", (1, 2))]
)
def test_fit_of_first_layers(models, tmp_path, run, layers, depths):
    code, _, err = run(*first_layers_arguments(models, tmp_path / "pair", "--auxiliary-layers", layers))
    assert code == 0, err
    assert load_model(tmp_path / "pair").predictor.depths == depths


@pytest.mark.parametrize("layers", ["first:", "first:0", "first:3", "first:x", "first:0.9"])
def test_first_layers_that_cannot_be(models, tmp_path, run, layers):
    result = run(*first_layers_arguments(models, tmp_path / "pair", "--auxiliary-layers", layers))
    fails(result, 2, repr(layers), "expected first: and numbers of layers from 1 to 2")


def test_a_pair_is_kept_when_its_figures_are_interrupted(models, tmp_path, run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvpred_mlx.making.quality.measure", interrupted)
    code, _, err = run(*first_layers_arguments(models, tmp_path / "pair"))
    assert code == 130 and "is saved, its card has no figures" in err
    assert load_model(tmp_path / "pair").predictor.depths == (2,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pair"]


@pytest.mark.slow
def test_an_interrupted_fit_goes_on(models, tmp_path, run, monkeypatch):
    """To the same predictor as one that was not interrupted; with other settings it is refused."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert run(*first_layers_arguments(models, whole))[0] == 0
    read, count = Sums.read, []

    def stopping(self, *args, **kwargs):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(1)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Sums, "read", stopping)
    assert run(*first_layers_arguments(models, again))[0] == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.fitting", "whole"]
    monkeypatch.setattr(Sums, "read", lambda *a, **k: (count.append(1), read(*a, **k))[1])
    fails(run(*first_layers_arguments(models, again, "--seed", 5)), 1, "a fit with other settings")
    assert run(*first_layers_arguments(models, again))[0] == 0
    assert len(count) == load_batches(models)
    for (name, a), (_, b) in zip(
        *(tree_flatten(load_model(p).parameters()) for p in (whole, again)), strict=True
    ):
        assert mx.array_equal(a, b), name


def load_batches(models):
    return 3000 // 96 // 4


def test_several_kinds_of_data(models, tmp_path, run):
    """Two paths, one with conversations, which need a chat template."""
    chats = tmp_path / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"def f{i}(x):\n    return x + {i}\n" * 9}]}
        for i in range(40)
    ]
    chats.write_text("\n".join(map(json.dumps, lines)))
    result = run(*first_layers_arguments(models, tmp_path / "pair", "--data", chats))
    assert result[0] == 1 and "no chat template" in result[2].splitlines()[-1]


def test_calibration_text_without_a_network(models, tmp_path, run, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("kvpred_mlx.making.data.load_data", unreachable)
    given = [
        a
        for a in first_layers_arguments(models, tmp_path / "pair")
        if a not in ("--data", models / "text.txt")
    ]
    result = run(*given)
    assert result[0] == 1 and "give text of your own with --data" in result[2].splitlines()[-1]
    rows = mx.random.randint(1, 1000, (40, 96), key=mx.random.key(0))
    monkeypatch.setattr("kvpred_mlx.making.data.load_data", lambda *a, **k: rows)
    assert run(*given)[0] == 0


@pytest.mark.variations
@pytest.mark.parametrize("reads", ["first layers", "auxiliary"])
def test_train_as_used(models, tmp_path, run, reads):
    """From recorded windows; interrupted after the recording, nothing of it is made again."""
    out, fitted = tmp_path / "trained", tmp_path / "fitted"
    with_auxiliary = ["--auxiliary", models / "small"] if reads == "auxiliary" else []
    assert run(*first_layers_arguments(models, fitted, *with_auxiliary))[0] == 0
    options = ["--data", models / "text.txt", "--mlx-path", out, "--max-seq-length", 128, "--windows", 6]
    command = [
        "train", "--model", fitted, *options, "--as-used", "--iters", 3, "--batch-size", 2, "--warmup", 0
    ]  # fmt: skip
    code, _, err = run(*command)
    assert code == 0, err
    assert "divergence" in err and "trained as it is used" in (out / "README.md").read_text()
    before, after = load_model(fitted), load_model(out)
    for name, array in tree_flatten(after.base.parameters()):
        assert mx.array_equal(array, dict(tree_flatten(before.base.parameters()))[name])
    changed = [n for n, a in tree_flatten(after.predictor.parameters())
               if not mx.array_equal(a, dict(tree_flatten(before.predictor.parameters()))[n])]  # fmt: skip
    assert changed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fitted", "trained", "trained.recording"]
    fails(
        run(*command, "--windows", 0, "--record", tmp_path / "x", "--restart"), 2, "--record", "--windows 0"
    )
    out = tmp_path / "fresh"
    code, _, err = run(*command, "--windows", 0, "--mlx-path", out)
    assert code == 0 and "divergence" in err, err
    assert (out / "config.json").exists() and not out.with_name("fresh.recording").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--as-used", "--windows", 4], []])
def test_train_on_quantized_maps(models, tmp_path, run, how):
    """As shared pairs have them: in full precision, if that is asked for."""
    fitted, out = tmp_path / "fitted", tmp_path / "trained"
    assert run(*first_layers_arguments(models, fitted, "--q-bits", 4, "--q-group-size", 32))[0] == 0
    command = [
        "train",
        "--model",
        fitted,
        "--data",
        models / "text.txt",
        "--mlx-path",
        out,
        "--max-seq-length",
        96,
    ]
    command += [*how, "--iters", 1, "--batch-size", 2, "--warmup", 0]
    fails(run(*command), 1, "the predictor is quantized", "--dequantize")
    code, _, err = run(*command, "--dequantize", "--restart")
    assert code == 0, err
    config = json.loads((out / "config.json").read_text())
    assert "quantization" not in config and load(out)[0].predictor.depths == (2,)
    assert not any("scales" in name for name in mx.load(str(out / "model.safetensors")))


class Templated:
    """A tokenizer with a chat template, as far as reading conversations needs one."""

    has_chat_template = True

    def apply_chat_template(self, messages, tools=None, tokenize=True):
        if any(message["role"] == "narrator" for message in messages):
            raise ValueError("no narrators")
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + ("+tools" if tools else "")


def test_conversations_go_through_the_chat_template(tmp_path):
    file = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    entries = [{"messages": chat}, {"messages": chat, "tools": [{}]}, {"text": "plain", "messages": chat}]
    file.write_text("\n".join(map(json.dumps, entries)))
    expected = ["<user>hi<assistant>hello", "<user>hi<assistant>hello+tools", "plain"]
    assert list(read_documents(file, "text", Templated())) == expected
    file.write_text(json.dumps({"messages": [{"role": "narrator", "content": "x"}]}))
    with pytest.raises(ValueError, match="line 1: the chat template refuses the messages: no narrators"):
        list(read_documents(file, "text", Templated()))
