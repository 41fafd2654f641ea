"""The Pareto harness: what it measures, how it goes on after an interruption, what it writes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import fails
from pairs import make_first_layers_pair, make_pair
from test_making import write_model

from kvpred_mlx.bench.common.statistics import paired_shares
from kvpred_mlx.bench.front import files, recall_score
from kvpred_mlx.bench.front import pareto as module
from kvpred_mlx.bench.front import report as pareto_report
from kvpred_mlx.bench.front.cells import SHOWN, label
from kvpred_mlx.bench.front.pareto import pareto
from kvpred_mlx.bench.front.plot import STYLES, _styles
from kvpred_mlx.bench.front.recall import Question
from kvpred_mlx.bench.front.settings import FrontSettings
from kvpred_mlx.bench.front.text import Data
from kvpred_mlx.making.pairing import join_first_layers, load_part
from kvpred_mlx.pair.loading import save
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.taps.kv_taps import KVTaps

TEXT = "".join(f"def function_{i}(a, b):\n    return a * {i} + b\n\n\n" for i in range(300))
SETTINGS = FrontSettings(
    [96, 128], ["predicted", "dial-both", "sparse-top"], [0.1], windows=4, score_tokens=8,
    questions=1, trials=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def demo_pair(unquantized_pair):
    return unquantized_pair


@pytest.fixture(scope="module")
def data(demo_pair):
    tokenizer = demo_pair[1]
    return Data(tokenizer, [TEXT], [tokenizer.encode(TEXT, add_special_tokens=False)])


@pytest.fixture(scope="module")
def front(demo_pair, data):
    return pareto(demo_pair[0], "pycode", SETTINGS, data)


def test_cells(front):
    assert json.loads(json.dumps(front)) == front and front["complete"]
    assert [label(c) for c in front["cells"]] == [
        "exact", "predicted", "dial-both 0.1", "sparse-top 0.1",
    ] * 2  # fmt: skip
    for cell in front["cells"]:
        assert cell["flops"] > 0 and cell["ttft"] > 0 and len(cell["trials"]) == 2
        assert cell["sooner"]["low"] <= cell["sooner"]["median"] <= cell["sooner"]["high"]
        assert {*cell["quality"]} == {*SHOWN} and 0 <= cell["recall"]["all"]["mean"] <= 1
        if cell["method"] == "exact":
            assert cell["quality"]["agreement"]["mean"] == cell["quality"]["retention"]["mean"] == 1
            assert cell["sooner"]["median"] == 1


def test_gains_are_over_plain_prediction_on_the_same_windows_and_questions(front, demo_pair, data):
    for cells in (front["cells"][:4], front["cells"][4:]):
        predicted = cells[1]
        for cell in cells:
            for name, gain in cell["gain"].items():
                figures = [
                    c["recall"]["all"] if name == "recall" else c["quality"][name] for c in (cell, predicted)
                ]
                assert gain["mean"] == pytest.approx(figures[0]["mean"] - figures[1]["mean"], abs=1e-9)
                assert gain["low"] <= gain["mean"] + 1e-9 and gain["mean"] <= gain["high"] + 1e-9
        for name, gain in predicted["gain"].items():
            assert gain["mean"] == 0 and (
                gain["low"] < 0 < gain["high"] if name == "recall" else gain["high"] == 0
            )
    rows = pareto_report.gain_markdown(front).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["dial-both 0.1", "sparse-top 0.1"] * 2
    alone = FrontSettings(
        [96], ["exact", "sparse-top"], [0.1], windows=2, score_tokens=4, questions=0, trials=1
    )
    assert all(c["gain"] is None for c in pareto(demo_pair[0], "pycode", alone, data)["cells"])


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ((36, 12, 2, 0), (0.2, 0.0569, 0.3404)),  # published examples of the method
        ((54, 0, 0, 0), (0.0, -0.0664, 0.0664)),
        ((0, 30, 0, 0), (1.0, 0.8395, 1.0)),
    ],
)
def test_differences_of_shares(table, expected):
    both, first, second, neither = table
    right = [True] * (both + first) + [False] * (second + neither)
    other = [True] * both + [False] * first + [True] * second + [False] * neither
    found = paired_shares(right, other)
    assert [*found.values()] == pytest.approx(expected, abs=5e-5)
    back = paired_shares(other, right)
    assert [back["mean"], back["high"], back["low"]] == pytest.approx([-x for x in expected], abs=5e-5)


def test_every_name_in_the_schema_is_documented(front):
    page = (Path(__file__).parents[1] / "docs/front.md").read_text(encoding="utf-8")
    names = {*front, *front["cells"][0], *front["settings"], *front["cells"][0]["recall"]}
    assert not {name for name in names if f"`{name}`" not in page}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(demo_pair, data, front, monkeypatch):
    """Interrupted twice: after the first cell's recall, and after the recall of all cells of the first length."""
    kept, calls, before = [], [], None
    measure = module.quality.measure
    monkeypatch.setattr(module.quality, "measure", lambda *a, **k: calls.append(1) or measure(*a, **k))

    def stop(so_far):
        kept.append(json.dumps(so_far))
        if len(kept) in (3, 3 + 4):  # the second run begins by giving what it goes on from
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pareto(demo_pair[0], "pycode", SETTINGS, data, before, finished=stop)
        before = json.loads(kept[-1])
        assert not before["complete"]
    found = pareto(demo_pair[0], "pycode", SETTINGS, data, before)
    assert found["complete"] and len(calls) == 2  # once for each length
    for a, b in zip(found["cells"], front["cells"], strict=True):
        assert all(a[name] == b[name] for name in ("quality", "recall", "gain", "flops"))


@pytest.mark.slow
def test_scoring_goes_on_after_the_windows_that_were_done(demo_pair):
    """Ctrl-C in the middle of a length's text: what is scored is kept, and the figures are those of a whole run."""
    documents = [TEXT] * 3  # four windows of each, eight at a time
    ids = [demo_pair[1].encode(text, add_special_tokens=False) for text in documents]
    data = Data(demo_pair[1], documents, ids)
    settings = FrontSettings([96], ["predicted"], [0.1], windows=12, score_tokens=8, questions=0, trials=1)
    kept, scored = [], []

    def stop(done, total, what):
        if (done, total, what) == (8, 12, "96 tokens: text"):
            raise KeyboardInterrupt

    def note(done, total, what):
        scored.extend([done] if what.endswith("text") else [])

    with pytest.raises(KeyboardInterrupt):
        pareto(
            demo_pair[0], "pycode", settings, data, progress=stop,
            finished=lambda so_far: kept.append(json.dumps(so_far)),
        )  # fmt: skip
    before = json.loads(kept[-1])
    assert before["scoring"]["96"]["windows"] == 8
    found = pareto(demo_pair[0], "pycode", settings, data, before, progress=note)
    assert found["complete"] and "scoring" not in found and scored == [12]
    whole = pareto(demo_pair[0], "pycode", settings, data)
    assert [c["quality"] for c in found["cells"]] == [c["quality"] for c in whole["cells"]]


@pytest.mark.slow
def test_other_settings_do_not_go_on(demo_pair, data, front):
    other = FrontSettings([96, 128], ["predicted"], [0.1], windows=5)
    with pytest.raises(
        ValueError, match=r"the settings of the results there and now differ: .*windows 4, now 5"
    ):
        pareto(demo_pair[0], "pycode", other, data, front)
    with pytest.raises(
        ValueError, match="the pair of the results there and now differ: name 'pycode', now 'other'"
    ):
        pareto(demo_pair[0], "other", SETTINGS, data, front)
    another = Data(data.tokenizer, [TEXT], [data.ids[0][1:]])
    with pytest.raises(
        ValueError, match=r"the data of the results there and now differ: checksum \d+, now \d+"
    ):
        pareto(demo_pair[0], "pycode", SETTINGS, another, front)


@pytest.mark.slow
def test_other_pairs_are_further_lines(demo_pair, data, tmp_path):
    other = make_first_layers_pair(demo_pair[0].base, [2])
    methods = ["predicted", "dial-last", "last-only"]
    options = {"windows": 2, "score_tokens": 4, "questions": 0, "trials": 1}
    settings = FrontSettings([96], methods, [0.1], **options, beside=["own"])
    found = pareto(demo_pair[0], "pycode", settings, data, beside={"own": other})
    lines = ["exact", "predicted", "dial-last 0.1", "last-only 0.1", "own: predicted", "own: dial-last 0.1"]
    assert [label(c) for c in found["cells"]] == lines
    alone = pareto(other, "own", FrontSettings([96], methods[:2], [0.1], **options), data)["cells"][1:]
    for cell, same in zip(found["cells"][4:], alone, strict=True):
        assert (cell["flops"], cell["quality"]) == (same["flops"], same["quality"])
        assert cell["ttft"] > 0 and cell["gain"]["agreement"]["mean"] == pytest.approx(
            cell["quality"]["agreement"]["mean"] - found["cells"][1]["quality"]["agreement"]["mean"]
        )
    assert "| own: dial-last 0.1 |" in pareto_report.markdown(found)
    assert [row["pair"] for row in csv.DictReader(pareto_report.csv_text(found).splitlines())] == [
        *["pycode"] * 4, "own", "own"
    ]  # fmt: skip
    again = pareto(demo_pair[0], "pycode", settings, data, found, beside={"own": other})
    assert again["cells"] == found["cells"]
    with pytest.raises(ValueError, match="the beside of the results there and now differ: own"):
        another = make_first_layers_pair(demo_pair[0].base, [1])
        pareto(demo_pair[0], "pycode", settings, data, found, beside={"own": another})
    assert len(_styles(found)) == 2 * len(STYLES)


@pytest.mark.slow
def test_other_pairs_by_name(run, tmp_path, demo_pair):
    """On the base that is loaded, wherever their own link points."""
    base = write_model(tmp_path / "base", "qwen3", demo_pair[1])
    another = write_model(tmp_path / "another", "qwen3", demo_pair[1], num_hidden_layers=5)
    for name, part in (("one", base), ("two", base), ("strange", another)):
        loaded = load_part(str(part))
        predictor = FirstLayersPredictor([1], KVTaps(loaded.model).input_widths, KVTaps(loaded.model).widths)
        save(tmp_path / name, join_first_layers(loaded, predictor, linked=True))
    (tmp_path / "text.txt").write_text(TEXT)
    command = [
        "pareto", "--model", tmp_path / "one", "--data", tmp_path / "text.txt", "--all-documents", "--prompt-lens", 96,
        "--methods", "predicted", "--windows", 2, "--questions", 0, "--trials", 1,
    ]  # fmt: skip
    code, _, err = run(*command, "--beside", tmp_path / "two", "--output-dir", tmp_path / "out")
    assert code == 0, err
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert [label(c) for c in cells] == ["exact", "predicted", "two: predicted"]
    assert (tmp_path / "out" / "pareto.png").exists()
    (tmp_path / "sub").mkdir()
    shutil.copytree(tmp_path / "two", tmp_path / "sub" / "two")
    for others in (["two", "sub/two"], ["two", "two"], ["one"]):
        given = [x for name in others for x in ("--beside", tmp_path / name)]
        fails(run(*command, *given, "--output-dir", tmp_path / "x"), 2, "--beside")
    fails(run(*command, "--beside", "", "--output-dir", tmp_path / "x"), 2, "--beside", "expected a pair")
    fails(run(*command, "--beside", tmp_path / "strange", "--output-dir", tmp_path / "x"), 1, "strange")
    fails(run(*command, "--beside", tmp_path / "none", "--output-dir", tmp_path / "x"), 1, "none")


def test_random_weights_are_timed_only():
    found = pareto(
        make_pair("gemma3_text", "qwen2"), "tiny", FrontSettings([40], ["dial-last", "last-only"], trials=1)
    )
    assert [c["quality"] for c in found["cells"]] == [None] * 9
    assert {c["method"] for c in found["cells"] if c["skipped"]} == {"last-only"}
    assert "sliding windows" in pareto_report.remarks(found)[-1]


def test_prompts_too_short_for_the_facts(demo_pair, data):
    found = pareto(demo_pair[0], "pycode", FrontSettings([40], ["exact"], windows=2, trials=1), data)
    assert found["cells"][0]["recall"] is None and "no recall at 40 tokens" in found["warnings"][-1]


def test_files(front, tmp_path):
    files.write(tmp_path, front, plot=False)
    assert files.read(tmp_path / "results.json") == front
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 8 and float(rows[1]["agreement"]) == front["cells"][1]["quality"]["agreement"]["mean"]
    assert pareto_report.markdown(front).count("\n") == 9
    recalled = [c for c in front["cells"] if c["recall"]["all"]["mean"]]
    by_depth = pareto_report.recall_markdown(front).splitlines()
    assert by_depth[0].count("depth") == 5 and len(by_depth) == 2 + len(recalled)
    (tmp_path / "results.json").write_text('{"schema": 1, "kind": "pareto"}')
    with pytest.raises(ValueError, match="'pareto' of schema 1, expected 'pareto' of schema 2"):
        files.read(tmp_path / "results.json")


@pytest.mark.slow
def test_pictures_of_two_lengths(front, tmp_path):
    files.write(tmp_path, front, plot=True)
    for picture in ("pareto.png", "front.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_prompts_too_short_to_be_predicted(demo_pair, data):
    with pytest.raises(ValueError, match=r"prompt lengths \[32\], expected more than 32 tokens"):
        pareto(demo_pair[0], "pycode", FrontSettings([32, 96], ["exact"], windows=2, trials=1), data)


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(demo_pair, data, monkeypatch):
    def full(results):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.quality, "measure", lambda *a, **k: pytest.fail("measured first"))
    with pytest.raises(OSError, match="No space left"):
        pareto(demo_pair[0], "pycode", SETTINGS, data, finished=full)


# Recall


def test_recall_counts_answers_that_are_right_to_the_last_token():
    asked = [
        Question([1, 2, 3], [5, 6, 7], "passkey", 0.0),
        Question([1, 2, 4], [5, 6, 8], "passkey", 1.0),
        Question([1, 2, 3], [5, 6], "key-value", 0.5),
    ]

    class Counts:
        """After each token comes that token and one: 5, 6, 7 after a prompt that ends with 3 or 4."""

        def __call__(self, inputs, cache):
            following = mx.where(inputs < 5, 5, inputs + 1)
            return (mx.arange(10) == following[..., None]).astype(mx.float32)

    right = recall_score.recalled(lambda prompts: (Counts(), []), asked, batch_size=2)
    assert right == [True, False, True]


def test_recall_by_kind_and_depth(demo_pair, data):
    asked = recall_score.questions(data.tokenizer, data.documents, 128, 2, seed=0)
    assert len(asked) == 2 * 5 * 2 and {len(q.prompt) for q in asked} == {128}
    found = recall_score.summary(asked, [q.kind == "passkey" and q.depth > 0.4 for q in asked])
    assert found["all"]["mean"] == 0.3 and found["kinds"]["key-value"]["mean"] == 0
    assert found["depths"]["passkey"]["0.5"]["mean"] == 1 and found["depths"]["passkey"]["0.0"]["high"] < 1


# The command line


@pytest.mark.variations
@pytest.mark.parametrize("first", ["figures", "pictures"])
def test_command(run, tmp_path, first):
    """All at once, or first the figures; pictures are drawn at the end."""
    text, out = tmp_path / "text.py", tmp_path / "out"
    text.write_text(TEXT)
    options = [
        "--data", text, "--prompt-lens", 128, "--methods", "predicted,dial-last", "--budgets", "0.1,0.2",
        "--windows", 2, "--score-tokens", 8, "--questions", 1, "--trials", 1, "--dequantize",
        "--all-documents", "--output-dir", out,
    ]  # fmt: skip
    if first == "figures":
        assert run("pareto", *options, "--no-plot")[0] == 0
        assert sorted(f.name for f in out.iterdir()) == ["results.csv", "results.json"]
    code, stdout, err = run("pareto", *options)
    assert code == 0 and "dial-last 0.2" in stdout and f"results: {out}" in err, err
    assert sorted(f.name for f in out.iterdir()) == ["front.png", "pareto.png", "results.csv", "results.json"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in out.glob("*.png"))
    code, stdout, _ = run("pareto", *options, "--json", "--no-plot")
    assert code == 0 and json.loads(stdout)["complete"]
    code, _, err = run("pareto", *options, "--seed", 7)
    assert code == 1 and "the settings of the results there and now differ: seed 0, now 7" in err
    assert "Traceback" not in err


def test_list_of_methods(run):
    code, stdout, _ = run("pareto", "--methods", "list")
    assert code == 0 and "sparse-both" in stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), ("--data", "--preset", "one of the two")),
        (("--data", "/nowhere"), ("/nowhere",)),
        (("--preset", "gpt-5"), ("--preset", "gpt-5")),
        (("--preset", "gpt-5", "--data", "x"), ("one of the two",)),
        (("--data", "x", "--methods", "magic"), ("--methods", "'magic'", "dial-last")),
        (("--data", "x", "--budgets", "0.1,2"), ("--budgets", "'2'")),
        (("--data", "x", "--budgets", "some"), ("--budgets", "'some'")),
        (("--data", "x", "--prompt-lens", "0"), ("--prompt-lens", "'0'")),
    ],
)
def test_bad_arguments(run, arguments, named, tmp_path):
    code = 1 if "/nowhere" in arguments else 2
    fails(run("pareto", "--output-dir", tmp_path / "out", *arguments), code, *named)
