"""The command line as a new user would try it: every failure is one line and an exit code."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import typer.main
from conftest import DATA, fails
from processes import command

from kvpred_mlx.cli import app
from kvpred_mlx.pair.locating import DEMO_PAIR

FUNCTION = (DEMO_PAIR / "prompt.txt").read_text()


def tokens_of(pair):
    return len(pair[1].encode(FUNCTION))


def copy_of_demo(tmp_path):
    return shutil.copytree(DEMO_PAIR, tmp_path / "pair")


def test_generates_and_shows_the_ttft(run, demo_pair):
    code, out, err = run("generate", "--prompt", FUNCTION, "-m", 8)
    assert code == 0
    assert (
        f"Prompt: {tokens_of(demo_pair)} tokens" in out
        and "Generation: 8 tokens" in out
        and "Peak memory" in out
    )
    assert "TTFT: " in out and "prompt cache" in out and "base step" in out
    assert "bundled demo pair" in err


def test_prompt_from_standard_input(run, demo_pair):
    code, out, _ = run("generate", "--prompt", "-", "-m", 2, stdin=FUNCTION.encode())
    assert code == 0
    assert f"Prompt: {tokens_of(demo_pair)} tokens" in out


@pytest.mark.parametrize("exact", [False, True])
def test_json_is_one_line(run, demo_pair, exact):
    code, out, _ = run("generate", "-p", FUNCTION, "-m", 4, "--json", *(["--exact"] if exact else []))
    assert code == 0
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result["mode"] == ("exact" if exact else "predicted")
    assert result["prompt_tokens"] == tokens_of(demo_pair) and result["generation_tokens"] == 4
    assert 0 < result["prefill_time"] < result["ttft"]
    assert result["text"]


@pytest.mark.slow
def test_seed_makes_sampling_repeatable(run):
    texts = {
        seed: [
            json.loads(run("generate", "-p", FUNCTION, "-m", 8, "--temp", 1, "--seed", seed, "--json")[1])[
                "text"
            ]
            for _ in range(2)
        ]
        for seed in (1, 2)
    }
    assert texts[1][0] == texts[1][1] and texts[2][0] == texts[2][1]
    assert texts[1] != texts[2]


@pytest.mark.variations(2)
@pytest.mark.parametrize(
    "options", [["--prefill-step-size", "40"], ["--max-kv-size", "64"], ["--kv-bits", "8"], ["--top-k", "5"]]
)
def test_options_of_mlx_lm(run, options):
    assert run("generate", "-p", FUNCTION, "-m", 3, *options)[0] == 0


def test_one_token_prompt(run):
    code, out, _ = run("generate", "-p", "x", "-m", 2)
    assert code == 0
    assert "Prompt: 2 tokens" in out  # <s> and x


def test_chat_template_is_used(run, tmp_path):
    pair = copy_of_demo(tmp_path)
    (pair / "chat_template.jinja").write_text("# {{ messages[-1].content }} with some words more\n")
    lengths = [
        json.loads(run("generate", "--model", pair, "-p", "x = 1", "-m", 1, "--json", *extra)[1])[
            "prompt_tokens"
        ]
        for extra in ([], ["--ignore-chat-template"])
    ]
    assert lengths[0] != lengths[1]


@pytest.mark.parametrize(
    ("arguments", "stdin", "parts"),
    [
        ([], b"", ["--prompt", "missing"]),
        (["-p", ""], b"", ["--prompt", "empty"]),
        (["-p", "-"], b"", ["--prompt", "empty"]),
        (["-p", "-"], b"abc\xff\xfe", ["not UTF-8 at position 3"]),
        (["-p", "\udcff"], b"", ["not UTF-8"]),
        (["-p", "-"], b"x = 1\n" * 300, ["the prompt has 1", "tokens", "context of 640"]),
        (["-p", "x", "--temp", "warm"], b"", ["--temp"]),
        (["-p", "x", "--temp", "-1"], b"", ["--temp"]),
        (["-p", "x", "-m", "0"], b"", ["--max-tokens"]),
        (["-p", "x", "--kv-bits", "5"], b"", ["--kv-bits", "5", "2, 3, 4, 6 or 8"]),
        (["-p", "x", "--no-such-flag"], b"", ["--no-such-flag"]),
        (["-p", "x", "--repair", "--draft-model", "auxiliary"], b"", ["--repair", "--draft-model"]),
    ],
)
def test_wrong_usage(run, arguments, stdin, parts):
    fails(run("generate", *arguments, stdin=stdin), 2, *parts)


def test_unknown_command(run):
    fails(run("generte"), 2, "generte")


def test_unknown_models(run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(run("generate", "-p", "x", "--model", "/no/such/dir"), 1, "/no/such/dir", "no such directory")
    fails(run("generate", "-p", "x", "--model", "./nope"), 1, "./nope")
    fails(run("generate", "-p", "x", "--model", "nobody/nothing"), 1, "nobody/nothing", "hub")
    fails(run("info", "nobody"), 1, "nobody: no such directory, and not a bundled pair (pycode, ")


def test_bundled_pairs_have_names(run, golden_pair, tmp_path, monkeypatch):
    """As the model card says; a directory of that name comes first."""
    monkeypatch.chdir(tmp_path)
    code, out, err = run("generate", "--model", "pycode", "-p", "x", "-m", 1, "--json")
    assert (code, err) == (0, "") and json.loads(out)["model"] == str(DEMO_PAIR)
    shutil.copytree(golden_pair, tmp_path / "pycode")
    assert json.loads(run("info", "pycode", "--json")[1])["path"] == "pycode"


TAKE_A_PAIR = ("chat", "serve", "quality", "info", "pareto", "eval", "fuse")


def test_a_pair_is_a_model_everywhere(run, golden_pair):
    commands = typer.main.get_command(app).commands
    options = {name: {o for p in command.params for o in p.opts} for name, command in commands.items()}
    assert {n for n, found in options.items() if "--model" in found} == {
        *TAKE_A_PAIR, "generate", "bench", "train",
    }  # fmt: skip
    assert {n for n, found in options.items() if "pair" in found} == set(TAKE_A_PAIR)
    assert run("info", "--model", golden_pair) == run("info", golden_pair)


@pytest.mark.parametrize("command", TAKE_A_PAIR)
def test_a_pair_is_named_once(run, command):
    more = ("--data", "x") if command == "pareto" else ()
    fails(run(command, "one", "--model", "two", *more), 2, "--model", "'two', and 'one' too")


def test_prompt_lengths_have_one_name(run):
    """What quality called them still works, and is not shown."""
    for option in ("--prompt-lens", "--prompt-tokens"):
        fails(run("quality", "--data", "x", option, "1,y"), 2, option, "'1', 'y'")
    shown = run("quality", "--help")[1]
    assert "--prompt-lens" in shown and "--prompt-tokens" not in shown and "--draft " not in shown


@pytest.mark.variations(2)
@pytest.mark.parametrize("kept", [0, 5, 100, 1_000_000, 9_000_000])
def test_truncated_weights(run, tmp_path, kept):
    pair = copy_of_demo(tmp_path)
    os.truncate(pair / "model.safetensors", kept)
    fails(run("generate", "-p", FUNCTION, "--model", pair), 1, str(pair), "damaged weights")


def test_missing_weights(run, tmp_path):
    pair = copy_of_demo(tmp_path)
    (pair / "model.safetensors").unlink()
    fails(run("generate", "-p", "x", "--model", pair), 1, str(pair))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"layer_map": [0, 0, 1, 1]}, "layer map has 4 entries, expected 8"),
        ({"layer_map": [0, 0, 1, 1, 2, 2, 3, 9]}, "not auxiliary layers 0 to 3"),
        ({"layer_map": "0,0"}, "layer_map is '0,0', expected list"),
        ({"layer_map": [0, 0, 0, 1, 2, 2, 2, 2]}, "shape"),
        ({"model_type": "llama"}, "expected 'kvpred'"),
        ({"base": {"model_type": "mamba"}}, "pair"),
        ({"base": {"model_type": "nothing"}}, "nothing"),
        ({"auxiliary": None}, "auxiliary"),
        ({"min_prompt_tokens": "many"}, "min_prompt_tokens"),
    ],
)
def test_wrong_config(run, tmp_path, change, part):
    pair = copy_of_demo(tmp_path)
    config = json.loads((pair / "config.json").read_text()) | change
    (pair / "config.json").write_text(json.dumps(config))
    fails(run("generate", "-p", "x", "--model", pair), 1, part)
    fails(run("info", pair), 1, part)


def test_config_that_is_not_json(run, tmp_path):
    pair = copy_of_demo(tmp_path)
    (pair / "config.json").write_bytes(b"{\xff")
    fails(run("info", pair), 1, "not JSON")
    (pair / "config.json").unlink()
    fails(run("info", pair), 1, "no config.json")


def test_pair_without_tokenizer(run, golden_pair):
    fails(run("generate", "-p", "x", "--model", golden_pair), 1, "no tokenizer")


def test_info(run, golden_pair):
    code, out, _ = run("info")
    assert code == 0
    assert "base:      nemotron, 8 layers, 6.82 M parameters" in out
    assert "auxiliary: nemotron, 4 layers, 1." in out
    assert "layer map: " in out and "source:    hidden" in out
    assert "8 bits in groups of 32 (affine)" in out
    facts = json.loads(run("info", golden_pair, "--json")[1])
    assert facts["layer_map"] == [0, 0, 1, 1] and facts["tokenizer"] is False
    assert facts["base"]["dtype"] == "float32" and facts["base"]["quantization"] is None
    assert facts["context_length"] == 64


def test_convert(run, tmp_path):
    golden = DATA / "golden_tiny"
    arguments = ["convert", "--checkpoint", golden / "checkpoint.pt", "--config", golden / "config.yaml"]
    out = tmp_path / "out"
    assert run(*arguments, "--mlx-path", out, "-q", "--q-bits", 8, "--q-group-size", 32)[0] == 0
    assert json.loads(run("info", out, "--json")[1])["base"]["quantization"]["bits"] == 8
    fails(run(*arguments, "--mlx-path", out), 1, "exists already", "--overwrite")
    assert run(*arguments, "--mlx-path", out, "--overwrite", "--dtype", "float16")[0] == 0
    fails(run(*arguments, "--mlx-path", tmp_path / "b", "--q-bits", 4), 2, "need -q")
    fails(run(*arguments, "--mlx-path", tmp_path / "b", "-q", "--q-group-size", 48), 1, "group size 48")
    fails(
        run(*arguments, "--mlx-path", tmp_path / "b", "-q", "--q-bits", 7, "--q-group-size", 32), 1, "bits 7"
    )
    fails(run("convert", "--mlx-path", tmp_path / "b"), 2, "--checkpoint")
    fails(
        run("convert", "--checkpoint", tmp_path / "none.pt", "--mlx-path", tmp_path / "b"), 1, "no such file"
    )
    assert not (tmp_path / "b").exists()


def test_demo(run):
    code, out, err = run("demo")
    assert (code, err) == (0, "")
    assert out.count("class Stack") == 1
    assert "def " in out.partition("predicted prompt cache")[2]
    assert "TTFT: predicted " in out and ", exact " in out


def test_help_does_not_import_mlx_lm():
    code = "import sys, kvpred_mlx.cli; sys.exit('mlx_lm' in sys.modules or 'mlx.core' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interrupt_ends_cleanly():
    """Ctrl-C in the middle of the stream: the partial text stays, exit code 130, no traceback."""
    process = subprocess.Popen(
        command("generate", "-p", FUNCTION, "-m", 100_000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert started.startswith("==========\n") and len(started + out) > 11
    assert "[interrupted]" in err and "Traceback" not in err


def test_closed_pipe_is_quiet():
    pipeline = f"{shlex.join(command('info'))} | head -c 1"
    done = subprocess.run(pipeline, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.slow
def test_interrupted_conversion_leaves_nothing(tmp_path):
    golden = DATA / "golden_tiny"
    code = "from kvpred_mlx.cli import main; main()"
    arguments = [
        "--checkpoint",
        golden / "checkpoint.pt",
        "--config",
        golden / "config.yaml",
        "--mlx-path",
        tmp_path / "out",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "convert", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    while not any(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been quicker than the signal
        assert process.returncode == 130, err
        assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in err
