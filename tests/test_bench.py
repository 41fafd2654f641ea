"""The bench: what it measures and in which order, what it writes, and how it fails."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import fails
from pairs import kv_entries, make_first_layers_pair, make_pair, tokens
from processes import command

from kvpred_mlx.bench.common import machine, results, statistics
from kvpred_mlx.bench.common.presets import build_preset, find_preset, presets
from kvpred_mlx.bench.readme import with_tables
from kvpred_mlx.bench.ttft import files, report
from kvpred_mlx.bench.ttft.measure import MODES, generate, parts
from kvpred_mlx.bench.ttft.run import bench
from kvpred_mlx.bench.ttft.settings import BenchSettings
from kvpred_mlx.pair.locating import DEMO_PAIR

SMALL = BenchSettings([40, 48], trials=3, max_tokens=3, prefill_step_sizes=[2048, 16])


@pytest.fixture(scope="module")
def measured():
    return bench(make_pair(), "tiny", SMALL)


def test_schema(measured):
    assert json.loads(json.dumps(measured)) == measured
    assert measured["schema"] == 1 and measured["complete"]
    assert measured["machine"]["device"] in ("cpu", "gpu")
    assert {"processor", "cores", "blas", "blas_threads", "versions", "memory_bytes"} <= set(
        measured["machine"]
    )
    assert measured["pair"]["dtype"] == "float32" and measured["matrix_product_flops_per_second"] > 0
    assert [s["prompt_tokens"] for s in measured["shapes"]] == [40, 48]
    for shape in measured["shapes"]:
        assert [(r["mode"], r["prefill_step_size"]) for r in shape["runs"]] == [
            (mode, step) for step in (2048, 16) for mode in MODES
        ]
        assert shape["flops"]["exact"] / shape["flops"]["predicted"] == pytest.approx(shape["flops_ratio"])
        assert len(shape["parts"]) == 3
        for run_ in shape["runs"]:
            assert len(run_["trials"]) == 3
            for trial in run_["trials"]:
                assert trial["ttft"] > 0 and trial["decode_tokens_per_second"] > 0
                assert trial["cache_bytes"] > 0 and trial["peak_bytes"] > 0
        assert [r["compared"] for r in shape["ratios"]] == ["same step size", "best step sizes"]
        for ratio in shape["ratios"]:
            assert ratio["low"] <= ratio["median"] <= ratio["high"]
            assert ratio["quotient"] == pytest.approx(ratio["median"] / shape["flops_ratio"])


def test_every_name_in_the_schema_is_documented(measured):
    page = (Path(__file__).parents[1] / "docs/benchmarking.md").read_text()

    def names(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                if key not in ("device_info", "versions"):
                    yield from names(inner)
                yield key
        elif isinstance(value, list):
            for inner in value:
                yield from names(inner)

    missing = {name for name in names(measured) if f"`{name}`" not in page}
    assert not missing


def test_trials_are_interleaved(measured):
    for shape in measured["shapes"]:
        trials = [(t["started"], i) for i, r in enumerate(shape["runs"]) for t in r["trials"]]
        order = [i for _, i in sorted(trials)]
        assert order == [*range(6)] * 3


def test_the_same_tokens_in_every_mode_and_another_prompt_for_another_seed(monkeypatch):
    from kvpred_mlx.bench.ttft import run as module

    seen = []

    def spy(model, prompt, *rest):
        seen.append(prompt.tolist())
        return generate(model, prompt, *rest)

    monkeypatch.setattr(module, "generate", spy)
    for seed in (0, 1):
        bench(make_pair(), "tiny", BenchSettings([40], trials=1, max_tokens=1, seed=seed))
    assert seen[0] == seen[1] == seen[2] != seen[-1]


def test_ratios_are_taken_pair_by_pair():
    # A machine that slows down in the middle changes no pair's ratio.
    slow = [1.0, 1.0, 4.0, 4.0, 4.0]
    ratio = statistics.paired_ratio([3 * s for s in slow], slow)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((3, 3, 3))
    assert statistics.paired_ratio([3.0], [1.0]).high == 3
    wide = statistics.paired_ratio([2.0, 3.0, 4.0, 5.0], [1.0] * 4)
    assert wide.low < wide.median < wide.high
    assert statistics.spread([1.0, 1.1, 0.9]) == pytest.approx(0.2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_the_clock_waits_for_the_value(mode, batch, monkeypatch):
    from kvpred_mlx.bench.ttft import measure

    pair = make_pair()
    trial = generate(measure.model_of(pair, mode), tokens(40, batch=batch), 2048, 4)
    assert trial.ttft > 0 and trial.decode_tokens_per_second > 0
    alone = generate(measure.model_of(pair, mode), tokens(40, batch=batch), 2048, 1)
    assert alone.decode_tokens_per_second is None


def test_parts_make_the_predicted_cache():
    pair, prompt = make_pair(), tokens(41)
    seen = {}
    base = type(pair.base).__call__

    def spy(self, inputs, cache=None, **rest):
        if self is pair.base and inputs.shape[1] == 1:
            seen["cache"] = [[mx.array(a) for a in c.keys_and_values()] for c in cache]
        return base(self, inputs, cache=cache, **rest)

    type(pair.base).__call__ = spy
    try:
        spent = parts(pair, prompt, 16)
    finally:
        type(pair.base).__call__ = base
    cache = pair.make_cache()
    pair(prompt[:, :-1], cache=cache)
    for expected, found in zip(kv_entries(cache), seen["cache"], strict=True):
        assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True))
    assert min(spent.auxiliary, spent.projection, spent.base_step) > 0


def test_shape_that_does_not_fit_is_skipped(monkeypatch):
    from kvpred_mlx.bench.ttft import run as module

    pair = make_pair()
    needs = {n: module.prefill_bytes(pair.base, 1, n, 2048) for n in (40, 200)}
    monkeypatch.setattr(machine, "available_bytes", lambda: sum(needs.values()) // 2)
    found = bench(pair, "tiny", BenchSettings([200, 40], trials=1, max_tokens=1))
    assert [s["prompt_tokens"] for s in found["shapes"]] == [40] and found["complete"]
    (skipped,) = found["skipped"]
    assert skipped["prompt_tokens"] == 200 and skipped["estimated_bytes"] == needs[200]
    assert any(
        "skipped: 200 tokens x 1: it is estimated not to fit: about" in line for line in report.remarks(found)
    )


def test_allocation_that_fails_is_skipped(monkeypatch):
    from kvpred_mlx.bench.ttft import run as module

    def full(model, prompt, *rest):
        if prompt.shape[1] == 48:
            raise RuntimeError("[malloc] Unable to allocate 99 bytes.")
        return generate(model, prompt, *rest)

    monkeypatch.setattr(module, "generate", full)
    found = bench(make_pair(), "tiny", BenchSettings([48, 40], trials=1, max_tokens=1))
    assert [s["prompt_tokens"] for s in found["shapes"]] == [40]
    assert found["skipped"][0]["reason"].startswith("[malloc]")


@pytest.mark.slow
def test_interrupting_keeps_finished_shapes(tmp_path):
    def stop(done, total, what):
        if what.startswith("48"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(
            make_pair(), "tiny", SMALL, progress=stop,
            finished=lambda so_far: files.write(tmp_path, so_far, plot=False),
        )  # fmt: skip
    kept = files.read(tmp_path / "results.json")
    assert [s["prompt_tokens"] for s in kept["shapes"]] == [40] and not kept["complete"]
    assert report.remarks(kept)[-1].startswith("interrupted")


def test_warnings(measured, monkeypatch):
    noisy = json.loads(json.dumps(measured))
    noisy["shapes"][0]["warnings"] = ["exact at step size 2048: TTFT spread 50%"]
    assert "warning: 40 tokens x 1: exact at step size 2048: TTFT spread 50%" in report.remarks(noisy)
    monkeypatch.setattr(machine._blas, "name", lambda: machine._blas.REFERENCE)
    monkeypatch.setattr(machine, "_device", lambda: "cpu")
    reference, busy = machine.warnings(0.9)
    assert "reference BLAS" in reference and "90%" in busy
    monkeypatch.setattr(machine._blas, "name", lambda: "OpenBLAS")
    assert machine.warnings(0.0) == []


def test_files(measured, tmp_path):
    files.write(tmp_path, measured, plot=True)
    assert files.read(tmp_path / "results.json") == measured
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert (
        len(rows) == 2 * 6 * 3
        and float(rows[0]["ttft"]) == measured["shapes"][0]["runs"][0]["trials"][0]["ttft"]
    )
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(files.FILES)
    with pytest.raises(FileExistsError, match=r"results.json .* already"):
        files.check_new(tmp_path)


def test_a_pair_without_an_auxiliary(tmp_path):
    """Tables and the picture, too."""
    made = bench(make_first_layers_pair(), "first", dataclasses.replace(SMALL, prompt_lens=[40], trials=1))
    assert {run["mode"] for run in made["shapes"][0]["runs"]} == {"exact", "predicted"}
    files.write(tmp_path, made, plot=True)
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")
    assert len(report.tables(made).renderables) == 3 and "| 40 |" in report.markdown(made)


def test_without_matplotlib_there_is_a_warning(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    files.write(tmp_path, dict(measured, warnings=[]), plot=True)
    assert not (tmp_path / "ttft.png").exists()
    assert "matplotlib" in json.loads((tmp_path / "results.json").read_text())["warnings"][0]


def test_presets_have_the_published_sizes():
    assert len(presets()) == 11
    millions = [round(n / 1e6) for n in find_preset("OpenELM-1_1B:OpenELM-270M").parameters()]
    assert millions[:2] == [1080, 272]  # with CoreNet's vocabulary of 32128
    with pytest.raises(ValueError, match="expected one of openelm-1_1b:openelm-270m"):
        find_preset("openelm")


def test_preset_that_does_not_fit(monkeypatch):
    from kvpred_mlx.bench.common import presets as module

    monkeypatch.setattr(module, "available_bytes", lambda: 10**9)
    with pytest.raises(MemoryError, match=r"needs 5\.4 GB for its weights, 1\.0 GB are free"):
        build_preset("openelm-1_1b:openelm-270m", mx.float32, 0)


# The command line


@pytest.mark.slow
def test_command(run, tmp_path):
    out = tmp_path / "out"
    code, stdout, err = run(
        "bench", "--prompt-lens", "40,48", "--prompt-lens", "40", "--trials", 2, "-m", 2, "--output-dir", out,
    )  # fmt: skip
    assert code == 0 and "how many times sooner" in stdout and "parts of a predicted TTFT" in stdout
    assert f"results: {out}" in err
    made = files.read(out / "results.json")
    assert [s["prompt_tokens"] for s in made["shapes"]] == [40, 48] and made["pair"]["name"] == "pycode"
    assert made["pair"]["mode"] == "predicted"
    assert made["command"][:2] == ["kvpred-mlx", "bench"]
    code, stdout, err = run("bench", "--compare", out / "results.json", out / "results.json")
    assert code == 0 and "B / A" in stdout and "1.00 (" in stdout
    fails(run("bench", "--prompt-lens", 40, "--output-dir", out), 1, "already", "--output-dir")


@pytest.mark.slow
def test_json_and_given_prompt(run, tmp_path):
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x\n" * 50)
    options = ["--trials", 1, "-m", 1, "--json", "--no-plot", "--prompt-file", text, "--exact-last", 8]
    code, stdout, _ = run("bench", "--prompt-lens", "40", *options, "--output-dir", tmp_path / "out")
    made = json.loads(stdout)
    assert code == 0 and made["settings"]["prompt"] == "given" and made["pair"]["mode"] == "exact-last=8"
    assert report.tables(made).renderables[0].title.endswith("exact-last=8: time to first token")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["results.csv", "results.json"]


@pytest.mark.slow
def test_preset_list(run):
    code, stdout, _ = run("bench", "--preset", "list")
    assert code == 0 and all(name in stdout for name in presets())


@pytest.mark.parametrize(
    ("arguments", "parts_"),
    [
        (["--prompt-lens", "0"], ["--prompt-lens", "'0'", "expected"]),
        (["--prompt-lens", "512,abc"], ["--prompt-lens", "'abc'", "512,2048"]),
        (["--prompt-lens", "-5"], ["--prompt-lens"]),
        (["--prompt-lens", ""], ["--prompt-lens", "''"]),
        (
            ["--prompt-lens", "64,641", "--model", DEMO_PAIR],
            ["--prompt-lens", "641 tokens", "context of 640"],
        ),
        (["--batch-sizes", "1,,2"], ["--batch-sizes", "''"]),
        (["--trials", "0"], ["--trials"]),
        (["--preset", "gpt-5"], ["--preset", "gpt-5", "openelm-1_1b:openelm-270m"]),
        (["--preset", "openelm-1_1b:openelm-270m", "--model", "x"], ["--preset", "--model"]),
        (["--dtype", "float8"], ["--dtype", "float8", "bfloat16"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--prompt-file", "/nowhere.txt"], ["--prompt-file", "/nowhere.txt"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
)
def test_bad_arguments(run, arguments, parts_, tmp_path):
    fails(run("bench", "--output-dir", tmp_path / "out", *arguments), 2, *parts_)


def test_failures(run, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    fails(run("bench", "--prompt-lens", 40, "--output-dir", tmp_path / "file" / "out"), 1, "file")
    fails(run("bench", "--model", tmp_path / "none", "--output-dir", tmp_path / "o"), 1, "no such directory")
    (tmp_path / "a.json").write_text('{"schema": 99}')
    fails(run("bench", "--compare", tmp_path / "a.json", tmp_path / "a.json"), 1, "schema 99", "expected 1")
    fails(run("bench", "--compare", tmp_path / "b.json", tmp_path / "a.json"), 1, "b.json")
    short = tmp_path / "short.txt"
    short.write_text("x")
    out = tmp_path / "p"
    fails(
        run("bench", "--prompt-lens", 40, "--prompt-file", short, "--output-dir", out),
        2,
        "expected at least 40",
    )
    short.write_bytes(b"\xff\xfe")
    fails(run("bench", "--prompt-lens", 40, "--prompt-file", short, "--output-dir", out), 2, "not UTF-8")


def test_readme_shows_the_results():
    root = Path(__file__).parents[1]
    pages = root / "README.md", root / "docs/real-pairs.md", *root.glob("bench/results/**/README.md")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.search("<!-- (bench|pareto|real): ", text)
        assert with_tables(text) == text  # else: make readme


@pytest.mark.slow
def test_interrupt_on_the_command_line(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("bench", "--prompt-lens", "40,510", "--trials", 2, "-m", 1, "--no-plot", "--output-dir", out),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (out / "results.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "interrupted: these are the shapes that were finished" in err and "KV prediction" in stdout
    assert [s["prompt_tokens"] for s in files.read(out / "results.json")["shapes"]] == [40]
