"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_absent(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError if `path` must not be written: it is there and `overwrite` is false, or it is
    there and is not a model directory that could be replaced."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already: give another path, or --overwrite to replace it")
    if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").is_file()):
        raise FileExistsError(f"{path} is not a model directory: --overwrite replaces only those")


@contextmanager
def kept_if_filled(folder: Path) -> Iterator[None]:
    """Make a directory and those above it; what is still empty of them at the end is removed again."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in made:
            with suppress(OSError):  # there is something in it
                place.rmdir()


@contextmanager
def new_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a directory beside `path` that is renamed to `path` at the end, or removed on any error.

    Raises:
        FileExistsError: as `check_absent`.
    """
    check_absent(path, overwrite)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with kept_if_filled(path.parent):
        try:
            beside.mkdir()  # in here: an interruption may come right after it
            yield beside
            _swap_in(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _swap_in(beside: Path, path: Path) -> None:
    if not os.path.lexists(path):
        beside.rename(path)
        return
    old = beside.with_name(beside.name + ".old")
    path.rename(old)
    beside.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory, if it is there, so that a kill leaves nothing half under its name."""
    if not path.is_dir():
        return
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write a file beside `path`, and put it in its place."""
    beside = path.with_name(f".new.{path.name}")  # with its suffix at its end: some add one that is not there
    try:
        make(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
