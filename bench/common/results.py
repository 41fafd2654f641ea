"""Results on disk: `results.json`, `results.csv` and `ttft.png`, written beside and then renamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvpred_mlx.bench.ttft.report import csv_text
from kvpred_mlx.bench.ttft.run import SCHEMA, Results

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
    write_file(folder / ".results.json", lambda path: path.write_text("{}"))
    (folder / ".results.json").unlink()


def write(folder: Path, results: Results, plot: bool) -> None:
    """Write what there is so far; without matplotlib there is no picture, and a warning in the results."""
    draw = plot and results["shapes"] and can_draw(results)
    write_file(folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    write_file(folder / "results.csv", lambda path: path.write_text(csv_text(results)))
    if draw:
        from kvpred_mlx.bench.ttft.plot import plot as draw_plot

        write_file(folder / "ttft.png", lambda path: draw_plot(results, path))


def read(path: Path) -> Results:
    """Read a `results.json`.

    Raises:
        ValueError: it is not one, or of another schema.
        OSError: it cannot be read.
    """
    results = read_json(path)
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema!r}, expected {SCHEMA} (a results.json of kvpred-mlx bench)")
    return results


def can_draw(results: Results) -> bool:
    """Whether there is matplotlib; without it the results get a warning."""
    if find_spec("matplotlib") is not None:
        return True
    note = "no picture without matplotlib: pip install 'kvpred-mlx[bench]'"
    results["warnings"] += [note] if note not in results["warnings"] else []
    return False


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not JSON.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def write_file(path: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write a file beside `path`, and put it in its place."""
    beside = path.with_name(f".{path.name}.new")
    try:
        make(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
