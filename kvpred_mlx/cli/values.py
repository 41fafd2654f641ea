"""What is written on the command line, as values: names, JSON, a device; and the extras that commands need."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import typer


def names(option: str, text: str) -> list[str]:
    """A comma list of names, in order, without repeats."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise typer.BadParameter(f"{text!r}, expected names with commas between", param_hint=option)
    return list(dict.fromkeys(words))


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """A JSON object; {} for an option that was not given."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r}, expected a JSON object", param_hint=option)
    return value


def set_device(device: str | None) -> None:
    """Choose MLX's device, before mlx-lm is imported: its generation stream is made for the device of that moment."""
    if device is None:
        return
    import mlx.core as mx

    if not mx.is_available(getattr(mx, device)):
        raise typer.BadParameter(f"{device!r} is not available in this build of MLX", param_hint="--device")
    mx.set_default_device(getattr(mx, device))


def check_installed(extra: str, packages: tuple[str, ...]) -> None:
    """Refuse to begin without the packages of an extra."""
    missing = [package for package in packages if find_spec(package.replace("-", "_")) is None]
    if missing:
        raise ImportError(f"{extra} needs {' and '.join(missing)}: pip install 'kvpred-mlx[{extra}]'")
