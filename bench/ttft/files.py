"""A bench on disk: `results.json`, `results.csv` and `ttft.png`, each written beside and then renamed."""

from __future__ import annotations

from pathlib import Path

from kvpred_mlx.bench.common.results import Results, can_draw, read_json, write_json
from kvpred_mlx.bench.ttft.report import csv_text
from kvpred_mlx.bench.ttft.run import SCHEMA
from kvpred_mlx.files import write_file

FILES = ("results.json", "results.csv", "ttft.png")


def check_new(folder: Path) -> None:
    """Make sure that results can be written to `folder` before hours are spent on them.

    Raises:
        FileExistsError: it holds results already.
        OSError: it cannot be written.
    """
    there = [name for name in FILES if (folder / name).exists()]
    if there:
        raise FileExistsError(f"{folder} has {' and '.join(there)} already: give another --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ".results.json", {})
    (folder / ".results.json").unlink()


def write(folder: Path, results: Results, plot: bool) -> None:
    """Write what there is so far; without matplotlib there is no picture, and a warning in the results."""
    draw = plot and results["shapes"] and can_draw(results)
    write_json(folder / "results.json", results)
    write_file(folder / "results.csv", lambda path: path.write_text(csv_text(results), encoding="utf-8"))
    if draw:
        from kvpred_mlx.bench.ttft.plot import plot as draw_plot

        write_file(folder / "ttft.png", lambda path: draw_plot(results, path))


def read(path: Path) -> Results:
    """Read a bench's `results.json`.

    Raises:
        ValueError: it is not one, or of another schema.
        OSError: it cannot be read.
    """
    results = read_json(path)
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema!r}, expected {SCHEMA} (a results.json of kvpred-mlx bench)")
    return results
