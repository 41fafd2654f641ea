"""Write the tables of `bench/results/` into the README: `make readme`.

Each table stands between `<!-- bench: FOLDER -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kvpred_mlx.bench.report import machine_line, markdown
from kvpred_mlx.bench.results import read

RESULTS = Path(__file__).with_name("results")
BLOCK = re.compile(r"<!-- bench: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def with_tables(text: str) -> str:
    """The README's text with every table as its results say.

    Raises:
        OSError, ValueError: a table's results cannot be read.
    """
    return BLOCK.sub(lambda match: _block(match[1]), text)


def _block(folder: str) -> str:
    results = read(RESULTS / folder / "results.json")
    command = " ".join(results["command"])
    return f"<!-- bench: {folder} -->\n\n{markdown(results)}\n\n`{command}`\n\n{machine_line(results)}.\n\n<!-- end -->"


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
