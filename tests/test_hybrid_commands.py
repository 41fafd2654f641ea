"""The commands on pairs of models with recurrent states: made, trained, measured, asked, served."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm.utils
import pytest
from conftest import fails
from processes import python, serving
from test_mlx_lm import complete, text_of

import kvpred_mlx
from kvpred_mlx.bench.recipe.plan import qwen3_5
from kvpred_mlx.cli import main
from kvpred_mlx.pair.config import build_model

TEXT = "\n\n".join(f"def value_{i}(a, b):\n    return a * {i * i % 97} + b" for i in range(300))
PROMPT = TEXT[:600]


@pytest.fixture(scope="module")
def root(tmp_path_factory, demo_pair):
    """A base and an auxiliary with the bundled pair's tokenizer, and pairs of them: `two` and `own`."""
    root = tmp_path_factory.mktemp("hybrid")
    (root / "text.txt").write_text(TEXT)
    for seed, (name, config) in enumerate(
        (("base", qwen3_5(64, 8, 2, 96, 32, 2)), ("auxiliary", qwen3_5(32, 4, 1, 64, 32, 1)))
    ):
        mx.random.seed(seed)
        (root / name).mkdir()
        mlx_lm.utils.save_model(root / name, build_model(config))
        mlx_lm.utils.save_config(config, root / name / "config.json")
        demo_pair[1].save_pretrained(root / name)
    data = ["--base", root / "base", "--data", root / "text.txt", "--max-seq-length", 96, "--windows", 2]
    for name, reader in (
        ("two", ["--auxiliary", root / "auxiliary"]),
        ("own", ["--auxiliary-layers", "first:4"]),
    ):
        assert command("fit", *data, *reader, "--mlx-path", root / name) == 0
    return root


def command(*arguments) -> int:
    """The exit code of a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["kvpred-mlx", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code


def test_info(root, run):
    code, out, _ = run("info", "--model", root / "own")
    assert code == 0
    assert "linear_attn.in_proj_qkv" in out and "the last 3 positions" in out and "(layers 3,7)" in out
    facts = json.loads(run("info", "--model", root / "two", "--json")[1])
    assert [place["window"] for place in facts["places"]] == [3, 3, 3, None] * 2


@pytest.mark.variations
@pytest.mark.parametrize("name", ["two", "own"])
def test_quality(root, run, name):
    data = ["--data", root / "text.txt", "--prompt-tokens", 40, "--score-tokens", 8, "--windows", 2]
    code, out, err = run("quality", "--model", root / name, *data, "--all-documents")
    assert code == 0, err
    assert "explained variance of linear_attn.in_proj_a by layer: 0:" in out
    own = [f"{i}: 1.00" in out for i in range(4)]
    assert all(own) if name == "own" else not all(own)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "own"])
def test_generate(root, run, tmp_path, name):
    asked = ["generate", "--model", root / name, "--prompt", PROMPT, "-m", 6]
    assert run(*asked)[0] == 0
    assert run(*asked, "--exact-top", 0.3, "--exact-last", 0.1)[0] == 0
    assert run(*asked, "--repair")[0] == 0
    exact = run(*asked, "--exact", "--verbose", "false")[1]
    dialled = run(*asked, "--exact-last", "1.0", "--verbose", "false")[1]
    assert exact == dialled


def test_no_draft(root, run):
    asked = [
        "generate",
        "--model",
        root / "two",
        "--prompt",
        PROMPT,
        "-m",
        6,
        "--draft",
        "auxiliary",
        "--verbose",
        "false",
    ]
    fails(run(*asked), 1, "qwen3_5 keeps states that cannot be wound back", "no speculative decoding")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "own"])
def test_train(root, run, tmp_path, name):
    data = [
        "--data",
        root / "text.txt",
        "--max-seq-length",
        64,
        "--iters",
        2,
        "--batch-size",
        2,
        "--windows",
        2,
    ]
    assert run("train", "--model", root / name, *data, "--mlx-path", tmp_path / "out")[0] == 0
    before, after = (kvpred_mlx.load(p)[0].predictor for p in (root / name, tmp_path / "out"))
    changed = [not mx.array_equal(a, b) for a, b in zip(arrays(before), arrays(after), strict=True)]
    assert any(changed)


def arrays(module):
    return [array for _, array in mlx_lm.utils.tree_flatten(module.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "own"])
def test_train_as_used(root, run, tmp_path, name):
    data = ["--data", root / "text.txt", "--max-seq-length", 96, "--iters", 2, "--batch-size", 2]
    code, _, err = run(
        "train", "--as-used", "--model", root / name, *data, "--mlx-path", tmp_path / "out", "--windows", 4
    )
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "own"])
def test_bench(root, run, tmp_path, name):
    code, out, err = run(
        "bench", "--model", root / name, "--prompt-lens", 64, "--trials", 1, "--output-dir", tmp_path / name
    )
    assert code == 0 and "FLOPs allow" in out, err


@pytest.mark.slow
def test_pareto(root, run, tmp_path):
    code, _, err = run(
        "pareto", "--model", root / "two", "--data", root / "text.txt", "--prompt-lens", 64, "--score-tokens", 8,
        "--windows", 2, "--all-documents", "--budgets", "0.5", "--output-dir", tmp_path / "front", "--methods",
        "exact,predicted,dial-last,dial-top,sparse-top,last-only", "--no-plot",
    )  # fmt: skip
    assert code == 0, err


@pytest.mark.variations
@pytest.mark.parametrize("name", ["two", "own"])
def test_server(root, name):
    """Answers in batches of different lengths, and turns, are those of `generate`."""
    pair = kvpred_mlx.load(root / name)
    starting = python(
        "import backend; from kvpred_mlx.cli import main; main()", "serve", "--model", root / name
    )
    prompts = [f"# file {i}\n" + PROMPT + f"    value_{i} = {i}\n" * (3 * i) for i in range(4)]
    with serving(starting) as (url, _, _):
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda p: text_of(complete(url, p)), prompts))
        assert answers == [kvpred_mlx.generate(*pair, p, max_tokens=8) for p in prompts]
        longer = prompts[0] + answers[0] + "\n\n\ndef other(a):\n" * 6
        answer = complete(url, longer)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 30
        assert text_of(complete(url, longer)) == text_of(answer)
