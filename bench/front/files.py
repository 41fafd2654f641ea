"""A front on disk: `results.json`, `results.csv`, `pareto.png` and `front.png`."""

from __future__ import annotations

from pathlib import Path

from kvpred_mlx.bench.common.results import Results, can_draw, read_json, write_json
from kvpred_mlx.bench.front.pareto import KIND, SCHEMA
from kvpred_mlx.bench.front.report import csv_text
from kvpred_mlx.files import write_file


def write(folder: Path, results: Results, plot: bool) -> None:
    """Write `results.json`, `results.csv` and, with matplotlib, `pareto.png` and (scored) `front.png`."""
    drawable = plot and any(c["flops"] for c in results["cells"]) and can_draw(results)
    write_json(folder / "results.json", results)
    write_file(folder / "results.csv", lambda path: path.write_text(csv_text(results), encoding="utf-8"))
    if drawable and any(c["ttft"] or c["quality"] for c in results["cells"]):
        from kvpred_mlx.bench.front.plot import plot as draw
        from kvpred_mlx.bench.front.plot import plot_front

        write_file(folder / "pareto.png", lambda path: draw(results, path))
        if any(c["quality"] for c in results["cells"]):
            write_file(folder / "front.png", lambda path: plot_front(results, path))


def read(path: Path) -> Results:
    """Read a front's `results.json`.

    Raises:
        ValueError: it is not one, or of another schema.
        OSError: it cannot be read.
    """
    results = read_json(path)
    given = (results.get("kind"), results.get("schema")) if isinstance(results, dict) else (None, None)
    if given != (KIND, SCHEMA):
        raise ValueError(
            f"{path}: {given[0]!r} of schema {given[1]!r}, expected {KIND!r} of schema {SCHEMA} "
            "(a results.json of kvpred-mlx pareto)"
        )
    return results
