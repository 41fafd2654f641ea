"""Linked pairs: what is on disk, every way to load them, and models that are missing, moved or others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub.constants
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import openai
import pytest
from conftest import fails
from local_hub import local_hub
from mlx.utils import tree_flatten
from processes import command, serving
from test_making import TEXT, write_model

import kvpred_mlx
from kvpred_mlx import cli
from kvpred_mlx.pair.catalogue import is_cached
from kvpred_mlx.pair.description import weight_bytes
from kvpred_mlx.pair.links import Link
from kvpred_mlx.pair.locating import BUNDLED, is_repository
from kvpred_mlx.pair.predictor import FirstLayersPredictor

PROMPT = mx.arange(1, 81)[None]
NAMES = ("two", "first", "kept")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def root(tmp_path_factory, demo_pair):
    """Two models, and linked pairs of them: with an auxiliary, with first layers, with layers of the base."""
    root = tmp_path_factory.mktemp("linked")
    write_model(root / "base", "qwen3", demo_pair[1])
    write_model(root / "small", "llama", demo_pair[1])
    (root / "text.txt").write_text(TEXT)
    reads = (["--auxiliary", "small"], ["--auxiliary-layers", "first:1,2"], ["--auxiliary-layers", "0,2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, options in zip(NAMES, reads, strict=True):
            sizes = ["--tokens", "1500", "--max-seq-length", "64", "--windows", "2"]
            arguments = ["fit", "--base", "base", *options, "--data", "text.txt", "--mlx-path", name, *sizes]
            patch.setattr(sys, "argv", ["kvpred-mlx", *arguments])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert stop.value.code == 0
    return root


@pytest.fixture
def copy(root, tmp_path):
    """The same in a place where it may be damaged."""
    return shutil.copytree(root, tmp_path / "linked")


def other_model(folder, tokenizer, **overrides):
    """Of the base's family, with norms of its own: those of random models are all the same."""
    write_model(folder, "qwen3", tokenizer, **overrides)
    weights = mx.load(str(folder / "model.safetensors"))
    norms = {n: w + mx.random.normal(w.shape) / 50 for n, w in weights.items() if w.ndim == 1}
    mx.save_safetensors(str(folder / "model.safetensors"), weights | norms, {"format": "mlx"})
    return folder


def quantized(root, bits, name="base"):
    folder = root / f"{name}-{bits}"
    mlx_lm.convert(str(root / name), str(folder), quantize=True, q_bits=bits, q_group_size=32)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_holds_the_predictor_alone(root, name):
    """And norms to know the models by; the base's tokenizer is the pair's."""
    stored = mx.load(str(root / name / "model.safetensors"))
    assert {n.partition(".")[0] for n in stored} == {"predictor", "norms"}
    config = json.loads((root / name / "config.json").read_text())
    assert config["base"]["path_or_hf_repo"] == "../base" and config["base"]["layers"] == 4
    assert ("auxiliary" in config) == (name == "two")
    files = {"README.md", "config.json", "model.safetensors", "model.safetensors.index.json"}
    assert {f.name for f in (root / name).iterdir()} == files


@pytest.mark.variations
@pytest.mark.parametrize("name", NAMES)
def test_fused_it_gives_the_same_logits(root, name, tmp_path, run):
    pair, tokenizer = kvpred_mlx.load(root / name)
    expected = pair(PROMPT)
    assert tokenizer.encode("def f(x):")
    theirs, their_tokenizer = mlx_lm.load(str(root / name))
    assert mx.array_equal(theirs(PROMPT), expected)
    assert their_tokenizer.eos_token_ids == tokenizer.eos_token_ids
    code, out, err = run("fuse", "--model", root / name, "--mlx-path", tmp_path / "fused")
    assert code == 0 and str(tmp_path / "fused") in out.replace("\n", ""), err
    assert "path_or_hf_repo" not in (tmp_path / "fused/config.json").read_text()
    again, its_tokenizer = kvpred_mlx.load(tmp_path / "fused")
    assert mx.array_equal(again(PROMPT), expected)
    assert its_tokenizer.encode("def f(x):") == tokenizer.encode("def f(x):")


@pytest.mark.slow
def test_every_command_takes_it(root, run, tmp_path):
    data = ["--data", root / "text.txt", "--all-documents"]
    for line in (
        ["generate", "-p", "def f(x):\n" * 12, "-m", 4],
        ["info", "--json"],
        ["quality", *data, "--prompt-lens", 40, "--score-tokens", 8, "--windows", 2],
        ["bench", "--prompt-lens", 64, "--trials", 1, "--output-dir", tmp_path / "bench", "--no-plot"],
    ):
        code, out, err = run(*line, "--model", root / "two")
        assert code == 0, err
    code, out, _ = run("info", root / "two")
    assert f"linked to {root / 'base'}" in out


@pytest.mark.variations
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_base_quantized_otherwise(copy, name, bits):
    """The same model; nothing else is taken for it."""
    folder = quantized(copy, bits)
    pair, _ = kvpred_mlx.load(copy / name, base=str(folder))
    expected, _ = mlx_lm.load(str(folder))
    assert mx.array_equal(pair(PROMPT, exact=True), expected(PROMPT))
    assert pair(PROMPT).shape == expected(PROMPT).shape
    if name == "kept":
        mine, its = (dict(tree_flatten(m.layers[1].parameters())) for m in (pair.auxiliary, pair.base))
        assert all(a.dtype == its[n].dtype for n, a in mine.items())


def test_a_standalone_pair_s_base_is_replaced(copy, tmp_path, run):
    run("fuse", "--model", copy / "two", "--mlx-path", tmp_path / "fused")
    folder = quantized(copy, 8)
    pair, tokenizer = kvpred_mlx.load(tmp_path / "fused", base=str(folder))
    assert "scales" in pair.base.layers[0].self_attn.q_proj and tokenizer is not None
    other = other_model(tmp_path / "other", tokenizer)
    with pytest.raises(ValueError, match="is not the base that the predictor was fitted on"):
        kvpred_mlx.load(tmp_path / "fused", base=str(other))


def test_another_model_of_the_same_shape(copy, run, demo_pair):
    other = other_model(copy / "other", demo_pair[1])
    command = ["generate", "-p", "x", "-m", 2, "--model"]
    for name in NAMES:
        wrong = run(*command, copy / name, "--base", other)
        fails(
            wrong,
            1,
            str(other),
            "is not the base that the predictor was fitted on",
            "norms and biases differ",
        )
    assert run(*command, copy / "two", "--base", other, "--force")[0] == 0
    wider = other_model(copy / "wider", demo_pair[1], num_hidden_layers=5)
    fails(run(*command, copy / "first", "--base", wider), 1, "it has 5 layers, expected 4")
    fails(run(*command, copy / "first", "--auxiliary", wider), 1, "reads with layers of its base")
    fails(run(*command, copy / "two", "--auxiliary", copy / "base"), 1, "not the auxiliary")


def test_missing_moved_and_circular(copy, run, tmp_path):
    command = ["generate", "-p", "x", "-m", 2, "--model"]
    moved = copy.rename(tmp_path / "moved")
    assert run(*command, moved / "first")[0] == 0  # with its base
    alone = shutil.copytree(moved / "first", tmp_path / "elsewhere" / "first")
    fails(run(*command, alone), 1, "the base of the pair", "no such directory", "--base names another place")
    assert run(*command, alone, "--base", moved / "base")[0] == 0
    config = json.loads((alone / "config.json").read_text())
    for place, reason in ((".", "a pair already"), (str(moved / "two"), "a pair already")):
        (alone / "config.json").write_text(json.dumps(config | {"base": {"path_or_hf_repo": place}}))
        fails(run(*command, alone), 1, reason)
    for entry in ({"path_or_hf_repo": 3}, {"path_or_hf_repo": "x", "layers": "many"}):
        (alone / "config.json").write_text(json.dumps(config | {"base": entry}))
        fails(run(*command, alone), 1, "expected path_or_hf_repo and revision as text")
    weights = moved / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails(run(*command, moved / "first"), 1, "base")
    weights.unlink()
    fails(run(*command, moved / "first"), 1, "base", "No safetensors")


def test_in_the_hub_s_cache(copy, monkeypatch, tmp_path, run):
    """A pair whose base is a repository at a commit: found without a network, and another commit is not taken."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(copy)
    repository = cache / "models--someone--base"
    shutil.copytree(copy / "base", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    sizes = ["--tokens", 1500, "--max-seq-length", 64, "--windows", 2]
    models = ["--base", "someone/base", "--auxiliary", "small"]
    code, _, err = run("fit", *models, "--data", "text.txt", "--mlx-path", "hub", *sizes)
    assert code == 0, err
    config = json.loads((copy / "hub/config.json").read_text())
    assert config["base"]["path_or_hf_repo"] == "someone/base" and config["base"]["revision"] == COMMIT
    assert config["auxiliary"]["path_or_hf_repo"] == "../small" and "revision" not in config["auxiliary"]
    assert "base_model:\n- someone/base\n" in (copy / "hub/README.md").read_text()
    assert run("generate", "-p", "x", "-m", 2, "--model", "hub")[0] == 0
    assert mlx_lm.load(str(copy / "hub"))[1].encode("x")
    assert is_cached(Link("someone/base", COMMIT)) and not is_cached(Link("someone/base", "f" * 40))
    config["base"]["revision"] = "f" * 40
    (copy / "hub/config.json").write_text(json.dumps(config))
    changed = run("generate", "-p", "x", "--model", "hub")
    fails(changed, 1, "the base of the pair", "someone/base at revision ffff", "--base names another place")
    cache.chmod(0o500)  # read-only
    config["base"]["revision"] = COMMIT
    (copy / "hub/config.json").write_text(json.dumps(config))
    assert run("generate", "-p", "x", "-m", 2, "--model", "hub")[0] == 0


@pytest.mark.slow
def test_an_interrupted_download(copy, tmp_path):
    """One line, and the next try goes on; then nothing is asked for again, and HF_HUB_OFFLINE asks for nothing."""
    config = json.loads((copy / "first/config.json").read_text())
    config["base"] |= {"path_or_hf_repo": "someone/base", "revision": COMMIT}
    (copy / "first/config.json").write_text(json.dumps(config))
    cache = tmp_path / "cache"
    generate = command("generate", "-p", "x", "-m", 2, "--model", copy / "first")
    with local_hub({"someone/base": copy / "base"}, COMMIT) as (hub, reached):
        env = {**os.environ, **reached, "HF_HUB_CACHE": str(cache)}

        def tried(**more):
            return subprocess.run(generate, env={**env, **more}, capture_output=True, text=True, check=False)

        hub.break_after = 50_000
        done = tried()
        assert done.returncode == 1 and "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert "the base of the pair: someone/base at revision 0123" in last and "not to be had" in last
        hub.break_after = None
        assert tried().returncode == 0
        asked = len(hub.sent)
        assert tried(HF_HUB_OFFLINE="1").returncode == 0 and len(hub.sent) == asked
        shutil.rmtree(cache / "models--someone--base/blobs")
        done = tried(HF_HUB_OFFLINE="1")
        assert done.returncode == 1 and "the base of the pair" in done.stderr.splitlines()[-1]


def test_pairs_of_one_base_share_it(root):
    before = mx.get_active_memory()
    first, _ = kvpred_mlx.load(root / "first")
    one = mx.get_active_memory() - before
    assert one < 1.05 * (weight_bytes(first.base) + weight_bytes(first.predictor)) + 100_000
    second, _ = kvpred_mlx.load(root / "two")
    assert second.base is first.base
    more = weight_bytes(second.auxiliary) + weight_bytes(second.predictor)
    assert mx.get_active_memory() - before - one < 1.05 * more + 100_000
    alone = first(PROMPT)
    second(PROMPT)
    assert mx.array_equal(first(PROMPT), alone)


@pytest.mark.slow
def test_a_quantized_predictor(root, run, tmp_path):
    command = [
        "fit",
        "--base",
        root / "base",
        "--data",
        root / "text.txt",
        "--tokens",
        1500,
        "--max-seq-length",
        64,
    ]
    code, _, err = run(
        *command, "--windows", 2, "--mlx-path", tmp_path / "pair", "--q-bits", 4, "--q-group-size", 32
    )
    assert code == 0, err
    pair, _ = kvpred_mlx.load(tmp_path / "pair")
    stored = mx.load(str(tmp_path / "pair/model.safetensors"))
    assert any(n.endswith(".scales") for n in stored)
    assert "scales" not in pair.base.layers[0].self_attn.q_proj
    assert mx.array_equal(mlx_lm.load(str(tmp_path / "pair"))[0](PROMPT), pair(PROMPT))
    fails(run(*command, "--mlx-path", tmp_path / "no", "--q-bits", 7), 2, "--q-bits", "7")


@pytest.mark.variations
@pytest.mark.parametrize("name", ["two", "kept"])
def test_a_trained_auxiliary_stays_in_the_pair(copy, name, run, tmp_path):
    out = tmp_path / "trained"
    steps = ["--iters", 2, "--batch-size", 2, "--max-seq-length", 64, "--warmup", 0, "--no-compile"]
    code, _, err = run(
        "train", "--model", copy / name, "--data", copy / "text.txt", "--mlx-path", out, *steps
    )
    assert code == 0, err
    stored = mx.load(str(out / "model.safetensors"))
    assert {n.partition(".")[0] for n in stored} == {"predictor", "auxiliary", "norms"}
    pair, tokenizer = kvpred_mlx.load(out)
    before, _ = kvpred_mlx.load(copy / name)
    assert tokenizer is not None and pair.base is before.base
    changed = [np.abs(np.array(a - b)).max() for a, b in zip(*(
        [w for _, w in tree_flatten(p.auxiliary.parameters())] for p in (pair, before)), strict=True)]  # fmt: skip
    assert max(changed) > 0


def test_a_base_of_another_type(copy):
    """A predictor follows the type of the base that it meets."""
    folder = copy / "half"
    mlx_lm.convert(str(copy / "base"), str(folder), dtype="bfloat16")
    pair, _ = kvpred_mlx.load(copy / "first", base=str(folder))
    assert {a.dtype for _, a in tree_flatten(pair.predictor.parameters())} == {mx.bfloat16}
    assert pair(PROMPT).dtype == mx.bfloat16


@pytest.mark.slow
def test_several_are_served_by_name(root):
    names = [str(root / name) for name in ("first", "two")]
    prompt = "def f(x):\n    return x + 1\n\n" * 6
    models = [word for name in names for word in ("--model", name)]
    with (
        serving(command("serve", *models)) as (url, _, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        assert [m.id for m in client.models.list()] == [n + b for n in names for b in ("", ":base")]
        for name in [*names, *names]:
            pair, tokenizer = kvpred_mlx.load(name)
            answer = client.completions.create(model=name, prompt=prompt, max_tokens=6)
            assert answer.choices[0].text == kvpred_mlx.generate(pair, tokenizer, prompt, max_tokens=6)
            exact = client.completions.create(model=f"{name}:base", prompt=prompt, max_tokens=6)
            assert exact.usage.model_extra["mode"] == "exact"
        with pytest.raises(openai.NotFoundError, match="two:base"):
            client.completions.create(model="nobody", prompt=prompt)


def test_bundled_ones_have_names(copy, run, monkeypatch):
    monkeypatch.setitem(BUNDLED, "small-coder", copy / "first")
    assert run("generate", "-p", "x", "-m", 2, "--model", "small-coder")[0] == 0
    bundled = json.loads(run("pairs", "--offline", "--json")[1])["bundled"]
    [listed] = [pair for pair in bundled if pair["name"] == "small-coder"]
    assert listed["reads"] == "its first 1 or 2 layers" and listed["parts"] == {str(copy / "base"): True}
    fails(
        run("generate", "-p", "x", "--model", "large-coder"),
        1,
        "not a bundled pair (pycode, ",
        "small-coder)",
    )


SHIPPED = sorted(set(BUNDLED) - {"pycode"})


@pytest.mark.variations
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_predictor_is_whole(name):
    """As far as can be told without its models: everything of it is there, and gives numbers."""
    config = json.loads((BUNDLED[name] / "config.json").read_text())
    link, [depth] = Link.of(config["base"]), config["first_layers"]
    assert is_repository(link.path_or_hf_repo) and len(link.kv_widths) == link.layers
    weights = mx.load(str(BUNDLED[name] / "model.safetensors"))
    assert weights.pop("norms.base").size > 0
    maps = {n.removeprefix("predictor."): w for n, w in weights.items()}
    width = maps[f"first_{depth}.key_maps.0.scales"].shape[1] * config["quantization"]["group_size"]
    predictor = FirstLayersPredictor([depth], [width] * link.layers, link.kv_widths)
    nn.quantize(predictor, config["quantization"]["group_size"], config["quantization"]["bits"])
    predictor.load_weights(list(maps.items()))
    made = predictor.behind(depth)(mx.random.normal((1, 3, width)).astype(mx.float16))
    assert len(made) == link.layers - depth - 1
    assert all(mx.isfinite(array).all() and mx.abs(array).max() > 0.1 for layer in made for array in layer)


def test_shipped_predictors_are_small_and_measured(run):
    listed = json.loads(run("pairs", "--offline", "--json")[1])["bundled"]
    shipped = [pair for pair in listed if pair["name"] in SHIPPED]
    assert shipped and sum(pair["bytes"] for pair in shipped) <= 16e6
    for pair in shipped:
        assert pair["reads"].startswith("its first ") and pair["base"] in pair["parts"]
        assert {0.5 < float(pair["figures"][f]) <= 1 for f in ("agreement", "first token", "retention")} == {
            True
        }


def test_pairs_lists_what_is_there(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("pairs", "--offline")
    assert code == 0 and err == "" and all(f"{name} " in out for name in BUNDLED)  # no name is broken in two
    repository = json.loads((BUNDLED[SHIPPED[0]] / "config.json").read_text())["base"]["path_or_hf_repo"]
    assert out.count(f"{', '.join(SHIPPED)}: {repository}, ") == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, out, err = run("pairs", "--json")
    listed = json.loads(out)
    assert code == 0 and len(err.splitlines()) == 1 and "hub does not answer" in err
    [pycode] = [pair for pair in listed["bundled"] if pair["name"] == "pycode"]
    assert pycode["base"] is None and 0 < float(pycode["figures"]["retention"]) < 1 and listed["hub"] == []
