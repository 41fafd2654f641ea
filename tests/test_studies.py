"""The studies and the recipe as commands: one style, one line for whatever is wrong."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from pairs import make_pair
from processes import python

import kvpred_mlx
from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.readme import RESULTS
from kvpred_mlx.bench.recipe import real_report
from kvpred_mlx.bench.studies import convert_memory, hybrids, pieces, scans
from kvpred_mlx.bench.studies.predictor_forms import read_by
from kvpred_mlx.making.pairing import load_part
from kvpred_mlx.making.recording import Recording
from kvpred_mlx.taps.kv_taps import KVTaps

STUDIES = [
    f"studies.{name}"
    for name in (
        "compare_sources", "draft", "first_layers", "fit_cost", "hybrids", "pieces", "predictor_forms", "repair",
        "scans", "soak",
    )
]  # fmt: skip
RECIPES = ["recipe.demo_pair", "recipe.real_pairs", "recipe.real_report"]
COMMANDS = [*STUDIES, *RECIPES, "studies.convert_memory", "readme"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a module of the bench as a command: (exit code, standard output, standard error)."""

    def call(name, *arguments):
        module = importlib.import_module(f"kvpred_mlx.bench.{name}")
        monkeypatch.setattr(sys, "argv", [f"{name.rpartition('.')[2]}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            command.run(module.main, pass_on=name.endswith("convert_memory"))
        return stop.value.code, *capsys.readouterr()

    return call


def fails(result, code, name, *parts):
    found, out, err = result
    assert (found, out, err.count("\n")) == (code, "", 1), err
    assert err.startswith(f"{name}: error: ") and all(part in err for part in parts)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(run, name):
    code, out, err = run(name, "--help")
    assert code == 0 and "Usage: " in out and not err


@pytest.mark.parametrize("name", [*STUDIES, *RECIPES])
def test_unknown_options(run, name):
    fails(run(name, "--frobnicate"), 2, name.rpartition(".")[2], "--frobnicate")


@pytest.mark.parametrize(
    ("name", "arguments", "code", "parts"),
    [
        ("studies.draft", ["--num-draft-tokens", "1,0"], 2, ["--num-draft-tokens", "'0'", "from 1 on"]),
        (
            "studies.draft",
            ["--prompt-file", "/nowhere"],
            2,
            ["--prompt-file", "/nowhere", "expected a text file"],
        ),
        ("studies.draft", ["--model", "/nowhere"], 1, ["/nowhere: no such directory"]),
        ("studies.repair", [], 2, ["--data"]),
        (
            "studies.repair",
            ["--data", __file__, "--prompt-lens", "100000"],
            2,
            ["--data", "at least 100000"],
        ),
        ("studies.pieces", ["--preset", "gpt-5"], 2, ["--preset", "gpt-5", "openelm-1_1b:openelm-270m"]),
        ("studies.pieces", ["--prompt-lens", "512,x"], 2, ["--prompt-lens", "'x'"]),
        ("studies.scans", ["--layers", "6"], 2, ["--layers 6", "multiples"]),
        ("studies.hybrids", ["--layers", "6"], 2, ["--layers 6", "multiples"]),
        ("studies.soak", ["--requests", "0"], 2, ["--requests"]),
        ("studies.compare_sources", ["--folder", "/nowhere"], 1, ["/nowhere"]),
        ("recipe.demo_pair", ["--iters", "1,2"], 2, ["--iters", "'1,2'", "9 numbers", "sharpened"]),
        ("recipe.demo_pair", ["--minutes", "-1"], 2, ["--minutes"]),
        ("readme", ["/nowhere.md"], 1, ["/nowhere.md"]),
    ],
)
def test_what_is_wrong_is_one_line(run, name, arguments, code, parts):
    fails(run(name, *arguments), code, name.rpartition(".")[2], *parts)


def test_draft(run):
    options = ["--max-tokens", 4, "--trials", 1, "--num-draft-tokens", 2]
    code, out, err = run("studies.draft", *options, "--json")
    assert code == 0, err
    assert [row["num_draft_tokens"] for row in json.loads(out)] == [0, 2]


def test_pieces():
    told = []
    found = list(pieces.measure(make_pair(), [40], lambda *progress: told.append(progress)))
    assert [(name, tokens) for name, tokens, _ in found] == [("auxiliary", 39), ("base", 39)]
    for _, _, seconds in found:
        assert list(seconds) == ["whole", "pieces", "pieces on streams"] and min(seconds.values()) > 0
    assert told[-1] == (pieces.TRIALS, pieces.TRIALS + 1, "base, 39 tokens")


@pytest.mark.variations
@pytest.mark.parametrize("family", scans.FAMILIES)
def test_hybrids(family):
    (row,) = hybrids.measure(family, 4, 128, [40], trials=1)
    # Half of the layers: of FLOPs a little less than twice as many, the maps count too.
    assert 1 < row.allowed < 2 and f"{family}, 40 tokens" in hybrids.text(row)
    assert row.injected.median > 0 < row.sooner.median


@pytest.mark.variations
@pytest.mark.parametrize("family", scans.FAMILIES)
def test_scans(family):
    (row,) = scans.measure(family, 4, 128, [40], trials=1)
    assert (row.family, row.prompt_tokens) == (family, 40) and row.difference < 1e-4
    assert row.own > 0 < row.ours and f"{family}, 40 tokens" in scans.text(row)
    assert scans.OPT_OUT not in os.environ
    (row,) = scans.measure(family, 4, 128, [40], trials=1, q_bits=4)
    assert row.difference < 1e-4


@pytest.fixture
def python_that_fails(monkeypatch):
    """What is started as Python ends with exit code 1."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))


def test_a_soak_without_a_server_fails(run, python_that_fails):
    fails(run("studies.soak"), 1, "soak", "the server did not start (exit code 1)")


def test_what_is_passed_on_to_convert(run, monkeypatch):
    given = []
    monkeypatch.setattr(convert_memory, "write_checkpoint", lambda checkpoint, config: None)

    def convert(checkpoint, config, out, arguments):
        given.extend(arguments)
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"0" * 10_000_000)
        return 30_000_000

    monkeypatch.setattr(convert_memory, "convert", convert)
    code, out, _ = run("studies.convert_memory", "-q", "--q-bits", "4", "--dtype", "float16")
    assert code == 0 and given == ["-q", "--q-bits", "4", "--dtype", "float16"]
    assert out == "peak resident memory 0.03 GB, output 0.01 GB, +0.02 GB\n"


def test_a_conversion_that_fails(tmp_path, python_that_fails):
    paths = [tmp_path / name for name in ("model.pt", "model.yaml", "out")]
    with pytest.raises(ChildProcessError, match="the conversion failed"):
        convert_memory.convert(*paths, [])
    with pytest.raises(ChildProcessError, match="the checkpoint could not be written"):
        convert_memory.write_checkpoint(*paths[:2])


@pytest.mark.slow
def test_as_a_module():
    code = "import runpy; runpy.run_module('kvpred_mlx.bench.studies.draft', run_name='__main__', alter_sys=True)"
    command_line = python(code, "--trials", "none")
    done = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("draft: error: Invalid value for '--trials'") and done.stderr.count("\n") == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("small", [True, False])
def test_fit_cost(tmp_path, run, demo_pair, small):
    from test_making import TEXT, write_model

    write_model(tmp_path / "base", "qwen3", demo_pair[1])
    (tmp_path / "text.txt").write_text(TEXT)
    command_line = ["--base", tmp_path / "base", "--data", tmp_path / "text.txt", "--tokens", 4096]
    reads = ["--auxiliary", tmp_path / "base"] if small else ["--layers", "first:2"]
    code, out, err = run("studies.fit_cost", *command_line, *reads)
    assert code == 0, err
    found = json.loads(out)
    assert found["tokens"] == 4096 and 0 < found["reading_over_forward"] < found["fit_over_forward"]
    assert found["peak_resident_bytes"] >= found["resident_bytes_before"] > 0


@pytest.fixture
def text(tmp_path):
    """Folders of text to make pairs of, and to measure them on."""
    text = "".join(f"def function_{i}(a, b):\n    return a * {i} + b  # line {i}\n\n\n" for i in range(900))
    for name in ("train", "held"):
        (tmp_path / name).mkdir()
        for i in range(6):
            (tmp_path / name / f"{i}.py").write_text(text[i * 99 :][:20000])
    return tmp_path


@pytest.mark.variations
@pytest.mark.parametrize(("windows", "reads"), [(4, "--depths"), (0, "--depths"), (4, "--auxiliary")])
def test_real_pairs(text, run, demo_pair, monkeypatch, windows, reads):
    """The recipe on tiny models: every step once, and linked pairs that are loaded beside any copy of the base."""
    from test_asked_conversations import CONVERSATION, DOCUMENTED
    from test_making import write_model

    from kvpred_mlx.bench.recipe import real_steps

    monkeypatch.setattr(real_steps, "MEASURED", (96, 192))
    write_model(text / "base", "qwen3", demo_pair[1])
    write_model(text / "auxiliary", "qwen3", demo_pair[1])
    (text / "base" / "chat_template.jinja").write_text(CONVERSATION)
    (text / "train" / "asked.py").write_text(DOCUMENTED)
    how = {"--depths": "1,2", "--auxiliary": text / "auxiliary"}[reads]
    names = ["tiny-1", "tiny-2"] if reads == "--depths" else ["tiny"]
    command_line = [
        "--base", text / "base", "--data", text / "train", "--held-out", text / "held", "--folder", text / "out",
        reads, how, "--name", "tiny", "--links", "somebody/base,somebody/auxiliary", "--tokens", 4096,
        "--windows", windows, "--iters", 2, "--batch-size", 2, "--measured", 2, 1, "--prompt-lens", "33,80",
        "--requests", 2, "--bodies", 3, *(["--joint-iters", 2] if reads == "--auxiliary" else []),
    ]  # fmt: skip
    code, _, err = run("recipe.real_pairs", *command_line)
    assert code == 0, err
    assert len((text / "out" / "requests.jsonl").read_text().splitlines()) == 2
    recorded = {path.name for path in (text / "out").glob("recorded-*")}
    of = [f"{kind}{tokens}" for kind in ("", "bodies-") for tokens in (33, 80)]
    assert recorded == ({f"recorded-{name}" for name in of} if windows else set())
    rows = [np.load(text / "out" / f"bodies-{n}-3.npy") for n in (33, 80)]
    assert [r.shape[1] for r in rows] == [33 + 64, 80 + 64]
    written = [len(r) for r in rows]
    others = {"base": str(text / "base")}
    before = {}
    for name in names:
        folder = text / "out" / name
        assert json.loads((folder / "config.json").read_text())["base"]["path_or_hf_repo"] == "somebody/base"
        card = (folder / "README.md").read_text()
        assert "| predicted |" in card and "with conversations of the base's own in the text" in card
        assert f"also {written[0]}, {written[1]} whose answers the base wrote itself" in card
        pair, _ = kvpred_mlx.load(folder, **others)
        assert pair(mx.arange(1, 50)[None]).shape[1] == 49
        assert any("scales" in key for key in mx.load(str(folder / "model.safetensors")))
        before[name] = (folder / "model.safetensors").stat().st_mtime_ns
    assert run("recipe.real_pairs", *command_line)[0] == 0
    for name, then in before.items():
        assert (text / "out" / name / "model.safetensors").stat().st_mtime_ns == then
    fails(
        run("recipe.real_pairs", *command_line, "--tokens", 8192),
        1,
        "real_pairs",
        "tokens '4096', now '8192'",
    )
    fails(
        run("recipe.real_pairs", *command_line, "--q-bits", 7),
        2,
        "real_pairs",
        "--q-bits",
        "expected one of 2, 3",
    )
    if reads == "--depths":
        fails(run("recipe.real_pairs", *command_line, "--joint-iters", 1), 2, "real_pairs", "--joint-iters")
    fails(run("recipe.real_pairs", *command_line, "--iters", 0), 2, "real_pairs", "--bodies", "--iters 0")
    short = [*command_line[:5], text / "train" / "0.py", "--folder", text / "new", *command_line[8:]]
    monkeypatch.setattr(real_steps, "MEASURED", (96, 10**6))
    fails(run("recipe.real_pairs", *short), 1, "real_pairs", "expected at least 1000064")
    assert not (text / "new" / "fitted.safetensors").exists()


def test_a_recipe_goes_on_with_what_it_was_begun_with(tmp_path):
    """What an older recipe did not ask for is not noted, and may be anything."""
    from kvpred_mlx.bench.recipe.real_pairs import check_same, note

    check_same(tmp_path / "out", {"tokens": 1})
    assert not (tmp_path / "out").exists()
    note(tmp_path / "out", {"tokens": 1})
    check_same(tmp_path / "out", {"tokens": 1, "requests": 0})
    note(tmp_path / "out", {"requests": None})
    for given in ({"tokens": 2}, {"tokens": 1, "requests": 3}):
        with pytest.raises(ValueError, match="was begun with"):
            check_same(tmp_path / "out", given)


@pytest.mark.slow
def test_what_a_recipe_refuses_stands_in_no_way(text, run, demo_pair):
    from test_making import write_model

    write_model(text / "base", "qwen3", demo_pair[1])
    command_line = [
        "--base", text / "base", "--data", text / "train", "--held-out", text / "held", "--folder", text / "out",
    ]  # fmt: skip
    fails(run("recipe.real_pairs", *command_line, "--requests", 3), 1, "real_pairs", "no chat template")
    assert not (text / "out").exists()
    fails(run("recipe.real_pairs", *command_line, "--prompt-lens", "64,900000"), 1, "real_pairs", "900064")
    noted = json.loads((text / "out" / "recipe.json").read_text())
    assert "prompt_lens" not in noted and not (text / "out" / "fitted.safetensors").exists()
    fails(run("recipe.real_pairs", *command_line, "--prompt-lens", "1"), 2, "real_pairs", "--prompt-lens")
    fails(run("recipe.real_pairs", *command_line, "--data", text / "held"), 1, "real_pairs", "was begun with")


def test_real_pairs_as_tables_and_a_picture(tmp_path, run):
    results = real_report.read(RESULTS / "real-pairs" / "results.json")
    heads, _, *rows = real_report.quality_markdown(results).splitlines()
    assert len(rows) == 1 + len(results["quality"]) and len({row.count("|") for row in (heads, *rows)}) == 1
    heads, _, *rows = real_report.longer_markdown(results).splitlines()
    assert len(rows) == len(results["longer"]["quality"]) and len({r.count("|") for r in (heads, *rows)}) == 1
    shares = [float(row.split("|")[3]) for row in real_report.humaneval_markdown(results).splitlines()[2:]]
    assert (
        shares == sorted(shares, reverse=True) and shares[0] == 1 and len(shares) == len(results["humaneval"])
    )
    for row in results["humaneval"]:
        assert len(row["right"]) == 164 and row["pass@1"]["mean"] == pytest.approx(
            row["right"].count("1") / 164
        )
    shutil.copy(RESULTS / "real-pairs" / "results.json", tmp_path)
    assert run("recipe.real_report", tmp_path)[0] == 0
    assert (tmp_path / "real-pairs.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results.json").write_text("{}")
    fails(run("recipe.real_report", tmp_path), 1, "real_report", "not the results of pairs of real models")


@pytest.mark.slow
def test_first_layers_and_predictor_forms(text, run, demo_pair):
    """A study of a tiny base from recording to training, gone on with, and the forms on what it recorded."""
    from test_making import write_model

    write_model(text / "base", "qwen3", demo_pair[1])
    command_line = [
        "--base", text / "base", "--depths", "1,2", "--data", text / "train", "--held-out", text / "held",
        "--folder", text / "out", "--windows", 5, "--counts", "3,5", "--held-windows", 3, "--recall", 1,
        "--iters", 2, "--batch-size", 2, "--every", 1, "--trained", 2, "--saved", "1,2",
    ]  # fmt: skip
    code, _, err = run("studies.first_layers", *command_line)
    assert code == 0, err
    results = json.loads((text / "out" / "results.json").read_text())
    ways = [(row["depth"], row["way"]) for row in results["rows"]]
    assert ways == [
        *((k, f"closed form, {c} windows") for c in (3, 5) for k in (1, 2)),
        *((2, f"trained, {i} steps") for i in (1, 2)),
    ]
    for row in results["rows"]:
        assert row["held-448"]["agreement"]["mean"] <= 1 and row["recall-448"]["recalled"]["mean"] <= 1
    pair, _ = kvpred_mlx.load(text / "out" / "pair")
    assert list(pair.predictor.depths) == [1, 2] and pair(mx.arange(1, 50)[None]).shape[1] == 49
    assert run("studies.first_layers", *command_line)[0] == 0
    again = json.loads((text / "out" / "results.json").read_text())
    assert again["rows"] == results["rows"]
    forms = ["--base", text / "base", "--folder", text / "out", "--depth", 2, "--joined", "1"]
    code, _, err = run("studies.predictor_forms", *forms, "--ranks", "4,64", "--hidden", 8, "--epochs", 1)
    assert code == 0, err
    found = json.loads((text / "out" / "forms-2-5.json").read_text())["forms"]
    assert list(found) == [
        "linear", "rank 4", "rank 64", "joined with 1", "weighted by attention",
        "joined with 1, weighted by attention", "gated MLP, 8 wide",
    ]  # fmt: skip
    zero = found["rank 64"]["over linear"]["agreement"]
    assert (
        zero["mean"] == found["linear"]["over linear"]["agreement"]["mean"] == 0
    )  # as many ranks as features
    adapted = ["--kinds", "trained,adapted-trained", "--adapter-rank", 4, "--iters", 10, "--batch-size", 5]
    adapted += ["--learning-rate", 3e-3, "--held-out", "train"]
    code, _, err = run("studies.predictor_forms", *forms, *adapted)
    assert code == 0, err
    found = json.loads((text / "out" / "forms-2-5.json").read_text())["forms"]
    linear, maps, both = (found[name]["itself"]["divergence"]["mean"] for name in found)
    assert list(found)[2] == "adapters of rank 4, trained" and both != maps and max(both, maps) < linear
    found = run("studies.predictor_forms", *forms, *adapted, "--auxiliary", text / "base")
    fails(found, 2, "predictor_forms", "--depth alone")
    write_model(text / "small", "llama", demo_pair[1])
    both = [*forms[:4], "--auxiliary", text / "small", "--joined", "1,2", "--ranks", 4, "--hidden", 4]
    code, _, err = run("studies.predictor_forms", *both, "--epochs", 1)
    assert code == 0, err
    found = json.loads((text / "out" / "forms-small-5.json").read_text())["forms"]
    assert [name for name in found if name.startswith("joined")] == [
        f"joined with {k}" for k in ("1", "2", "1, 2")
    ] + ["joined with 1, 2, weighted by attention"]
    small, train = KVTaps(load_part(text / "small").model), Recording(text / "out" / "train")
    whole = Recording(text / "out" / "train-small").rows(slice(0, 4))
    for count in (2, 4, 1):  # goes on with more, and takes no more than it is asked for
        some = read_by(small, train, text / "again", count)
        assert len(some) == count
    assert all(mx.array_equal(whole[k], v) for k, v in Recording(text / "again").rows(slice(0, 4)).items())
    more = ["--depth", 1, "--kinds", "joined,joined-attention,joined-trained", "--joined", 0]
    more += ["--iters", 10, "--batch-size", 5, "--learning-rate", 3e-3]
    joined = [*both[:4], "--auxiliary", text / "small", *more]
    code, _, err = run("studies.predictor_forms", *joined, "--held-out", "train")
    assert code == 0, err
    results = json.loads((text / "out" / "forms-1-small-5.json").read_text())
    assert results["training"]["iters"] == 10
    fitted, trained = (
        results["forms"][name]["itself"]["divergence"]["mean"]
        for name in ("joined with 0", "joined with 0, trained")
    )
    assert trained < 0.98 * fitted  # on the windows that it was trained on
    code, _, err = run("studies.predictor_forms", *joined)
    assert code == 0, err
    found = json.loads((text / "out" / "forms-1-small-5.json").read_text())["forms"]
    assert list(found) == [
        "linear",
        "joined with 0",
        "joined with 0, trained",
        "joined with 0, weighted by attention",
    ]
    alone = ["--depth", 1, "--kinds", "rank", "--joined", 0, "--ranks", 4]
    code, _, err = run("studies.predictor_forms", *both[:4], *alone)
    assert code == 0, err
    one = json.loads((text / "out" / "forms-1-5.json").read_text())["forms"]["linear"]["itself"]
    assert found["linear"]["itself"]["divergence"]["mean"] == pytest.approx(
        one["divergence"]["mean"], rel=0.05
    )  # the same maps, but for ridges chosen part by part
