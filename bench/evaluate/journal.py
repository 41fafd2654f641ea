"""Finished items on disk, one JSON line each, so that an evaluation can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock
from typing import Any

from kvpred_mlx.files import write_file

Record = dict[str, Any]


class Journal:
    """`items.jsonl`: what must not change, then one line for each finished item.

    Args:
        same: settings that all items of the file share.

    Raises:
        ValueError: the file is of a run with other settings, naming them, or no journal at all.
    """

    def __init__(self, path: Path, same: Record):
        self._path, self._adding = path, Lock()
        lines = _whole_lines(path)
        if lines:
            before = lines.pop(0)
            differ = [
                f"{k} was {before.get(k)!r} and is {v!r}" for k, v in same.items() if before.get(k) != v
            ]
            if differ:
                raise ValueError(f"{path} is of another run: {'; '.join(differ)}. Give another --output-dir")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(same)
        self._records = {(r["task"], r["mode"], r["id"]): r for r in lines}

    def __contains__(self, key: tuple[str, str, str]) -> bool:
        return key in self._records

    def __getitem__(self, key: tuple[str, str, str]) -> Record:
        return self._records[key]

    def keep_or_remove(self) -> bool:
        """Whether there is a finished item; without any the file is removed."""
        if not self._records:
            self._path.unlink(missing_ok=True)
        return bool(self._records)

    def add(self, record: Record) -> None:
        """Write down that `record["id"]` of `record["task"]` is finished in `record["mode"]`; from any thread."""
        with self._adding:
            self._append(record)
            self._records[record["task"], record["mode"], record["id"]] = record

    def _append(self, line: Record) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _whole_lines(path: Path) -> list[Record]:
    """The file's lines; half a line at its end, of a run that was killed, is cut off."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_file(path, lambda beside: beside.write_text(whole, encoding="utf-8"))
    try:
        return [json.loads(line) for line in whole.split("\n") if line]
    except ValueError as error:
        raise ValueError(f"{path}: not a journal of kvpred-mlx eval: {error}") from error
