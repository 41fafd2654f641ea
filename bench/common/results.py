"""A measurement's results: one dictionary that is ready for JSON, how it begins, and its files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvpred_mlx.bench.common import machine
from kvpred_mlx.files import write_file

Results = dict[str, Any]


def begin(
    schema: int,
    pair: dict[str, Any] | None,
    settings: dict[str, Any],
    *,
    kind: str | None = None,
    command: Sequence[str] = ("kvpred-mlx",),
    **own: Any,
) -> Results:
    """The beginning of all results: what is measured, when, where, and by which command; not `complete` yet.

    Args:
        schema: of this kind of results; it changes when a name or a meaning does.
        pair: `describe_pair`, or what of it is shown (None: there is no single pair).
        kind: tells results apart whose files have the same name.
        command: what the arguments of this process were given to.
        own: what this kind of results has beside.
    """
    return {
        "schema": schema,
        **({} if kind is None else {"kind": kind}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [*command, *sys.argv[1:]],
        "machine": machine.describe(),
        **({} if pair is None else {"pair": pair}),
        "settings": settings,
        **own,
        "complete": False,
    }


def machine_text(results: Results) -> str:
    """Machine, backend and versions of any pair's results, in one line."""
    m, v = results["machine"], results["machine"]["versions"]
    threads = f", {m['blas_threads']} threads" if m["blas_threads"] else ""
    return (
        f"{m['processor']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB, {m['system']}; "
        f"MLX {v['mlx']} {m['device']}, {results['pair']['dtype']}, BLAS: {m['blas']}{threads}; "
        f"mlx-lm {v['mlx-lm']}"
    )


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


def write_json(path: Path, results: Results) -> None:
    """Write results as JSON."""
    write_file(path, lambda beside: beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8"))
