"""Write the tables of `bench/results/` into the README and docs/dial.md: `make readme`.

Each table stands between `<!-- bench: FOLDER -->` (or `pareto`, `recall`, `gain`) and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kvpred_mlx.bench.common.results import read
from kvpred_mlx.bench.front import report as pareto_report
from kvpred_mlx.bench.ttft.report import machine_line, machine_text, markdown

RESULTS = Path(__file__).with_name("results")
BLOCK = re.compile(r"<!-- (bench|pareto|recall|gain): (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def with_tables(text: str) -> str:
    """The README's text with every table as its results say.

    Raises:
        OSError, ValueError: a table's results cannot be read.
    """
    return BLOCK.sub(lambda match: _block(match[1], match[2]), text)


def _block(kind: str, folder: str) -> str:
    path = RESULTS / folder / "results.json"
    if kind in ("recall", "gain"):
        table = {"recall": pareto_report.recall_markdown, "gain": pareto_report.gain_markdown}[kind]
        return f"<!-- {kind}: {folder} -->\n\n{table(pareto_report.read(path))}\n\n<!-- end -->"
    if kind == "bench":
        results = read(path)
        table, machine = markdown(results), machine_line(results)
    else:
        results = pareto_report.read(path)
        table, machine = pareto_report.markdown(results), machine_text(results)
        machine = f"{data}. {machine}" if (data := pareto_report.data_line(results)) else machine
    command = " ".join(results["command"])
    return f"<!-- {kind}: {folder} -->\n\n{table}\n\n`{command}`\n\n{machine}.\n\n<!-- end -->"


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
