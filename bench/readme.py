"""Write the tables of `bench/results/` into the README and the pages beside them: `make readme`.

Each table stands between `<!-- bench: FOLDER -->` (or `pareto`, `recall`, `gain`, `real`, `humaneval`, `longer`) and
`<!-- end -->`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.common.results import Results, machine_text
from kvpred_mlx.bench.front import files as front_files
from kvpred_mlx.bench.front import report as front_report
from kvpred_mlx.bench.recipe import real_report
from kvpred_mlx.bench.ttft import files as ttft_files
from kvpred_mlx.bench.ttft import report as ttft_report

RESULTS = Path(__file__).with_name("results")
REAL = {
    "real": real_report.quality_markdown,
    "humaneval": real_report.humaneval_markdown,
    "longer": real_report.longer_markdown,
}
KINDS = "|".join(["bench", "pareto", "recall", "gain", *REAL])
BLOCK = re.compile(rf"<!-- ({KINDS}): (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def with_tables(text: str) -> str:
    """The README's text with every table as its results say.

    Raises:
        OSError, ValueError: a table's results cannot be read.
    """
    return BLOCK.sub(lambda match: _block(match[1], match[2]), text)


def _block(kind: str, folder: str) -> str:
    path = RESULTS / folder / "results.json"
    if kind == "bench":
        made = _ttft(path)
    elif kind in REAL:
        made = REAL[kind](real_report.read(path))
    else:
        made = _front(kind, path)
    return f"<!-- {kind}: {folder} -->\n\n{made}\n\n<!-- end -->"


def _ttft(path: Path) -> str:
    results = ttft_files.read(path)
    return _with_origin(results, ttft_report.markdown(results), ttft_report.machine_line(results))


def _front(kind: str, path: Path) -> str:
    results = front_files.read(path)
    if kind == "recall":
        return front_report.recall_markdown(results)
    if kind == "gain":
        return front_report.gain_markdown(results)
    origin = [front_report.data_line(results), machine_text(results)]
    return _with_origin(results, front_report.markdown(results), ". ".join(filter(None, origin)))


def _with_origin(results: Results, table: str, origin: str) -> str:
    return f"{table}\n\n`{' '.join(results['command'])}`\n\n{origin}."


def main(pages: Annotated[list[Path], typer.Argument(help="Markdown files with such places.")]) -> None:
    """Write the tables of bench/results/ into pages."""
    for page in pages:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
