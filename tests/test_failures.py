"""What a command leaves behind that fails, or is interrupted, before it has anything to show: nothing."""

from __future__ import annotations

import pytest
from conftest import DATA
from test_making import write_model

from kvpred_mlx.bench.evaluate.run import Evaluation
from kvpred_mlx.bench.front import pareto as front
from kvpred_mlx.bench.studies import first_layers
from kvpred_mlx.bench.ttft import run as ttft
from kvpred_mlx.files import kept_if_filled, new_directory, remove_directory

TEXT = "def f(a):\n    return a\n\n\n" * 400


@pytest.fixture(params=[KeyboardInterrupt, RuntimeError, OSError])
def failing(request):
    """A function that fails in some way, and the exit code that follows."""

    def fail(*arguments, **options):
        raise request.param("no more")

    return fail, 130 if request.param is KeyboardInterrupt else 1


def left(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_bench(run, tmp_path, failing, monkeypatch):
    monkeypatch.setattr(ttft, "_shape", failing[0])
    code, _, err = run("bench", "--prompt-lens", 64, "--output-dir", tmp_path / "a/b")
    assert (code, left(tmp_path)) == (failing[1], []), err
    assert (
        run("bench", "--prompt-lens", 99_999, "--model", "pycode", "--output-dir", tmp_path / "a/b")[0] == 2
    )
    assert left(tmp_path) == []


def test_eval(run, tmp_path, failing, monkeypatch):
    monkeypatch.setattr(Evaluation, "_answer", failing[0])
    data = f"triviaqa={DATA / 'eval/triviaqa.jsonl'}"
    code, _, err = run("eval", "--data", data, "--no-plot", "--output-dir", tmp_path / "a/b")
    assert (code, left(tmp_path)) == (failing[1], []) and "results:" not in err, err


def test_pareto(run, tmp_path, failing, monkeypatch):
    """Before its FLOPs are counted; those are results."""
    monkeypatch.setattr(front, "make_cells", failing[0])
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--data", tmp_path / "text.txt", "--all-documents", "--prompt-lens", 64, "--windows", 1]
    code, _, err = run("pareto", *options, "--output-dir", tmp_path / "a/b")
    assert (code, left(tmp_path)) == (failing[1], ["text.txt"]), err


def test_a_study(tmp_path, demo_pair):
    base = write_model(tmp_path / "base", "qwen3", demo_pair[1])
    with pytest.raises(OSError, match="nowhere"):
        first_layers.main(str(base), "1", tmp_path / "nowhere", tmp_path / "nowhere", tmp_path / "a/b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_convert(run, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"nothing")
    assert run("convert", "--checkpoint", tmp_path / "model.pt", "--mlx-path", tmp_path / "a/b/pair")[0] == 1
    assert left(tmp_path) == ["model.pt"]


def test_directories(tmp_path):
    with pytest.raises(RuntimeError), new_directory(tmp_path / "a/b") as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    with pytest.raises(RuntimeError), kept_if_filled(tmp_path / "a/b"):
        raise RuntimeError
    assert left(tmp_path) == []
    (tmp_path / "there").mkdir()
    with kept_if_filled(tmp_path / "there"):
        pass
    with kept_if_filled(tmp_path / "a/b"):
        (tmp_path / "a/b/c").write_text("x")
    assert left(tmp_path) == ["a", "a/b", "a/b/c", "there"]  # what was there, and what is not empty
    remove_directory(tmp_path / "a/b")
    remove_directory(tmp_path / "nowhere")
    assert left(tmp_path) == ["a", "there"]
