"""Where models and pairs are: directories, bundled pairs by name, the local cache and the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_lm.utils
from huggingface_hub import snapshot_download

from kvpred_mlx.errors import one_line

DEMO_PAIR = Path(__file__).parents[1] / "pycode"
LINKED_PAIRS = Path(__file__).parents[1] / "pairs"  # predictors of models that the hub has
BUNDLED = {
    path.name: path for path in (DEMO_PAIR, *(c.parent for c in sorted(LINKED_PAIRS.glob("*/config.json"))))
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "tiktoken.model",
    "vocab.json",
)


def find_pair(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The local directory of a pair: a directory, a bundled pair's name, or a Hugging Face repository, fetched.

    Raises:
        FileNotFoundError: none of these, or a repository that could not be fetched.
    """
    name = str(path_or_hf_repo)
    if name in BUNDLED and not Path(name).exists():
        return BUNDLED[name]
    if "/" not in name and not Path(name).exists():
        raise FileNotFoundError(f"{name}: no such directory, and not a bundled pair ({', '.join(BUNDLED)})")
    return find_model(path_or_hf_repo, revision)


def find_model(
    path_or_hf_repo: str | Path, revision: str | None = None, *, local_files_only: bool = False
) -> Path:
    """The local directory of a model: a directory, or a Hugging Face repository, fetched as mlx-lm does it.

    Args:
        local_files_only: take what is in the local cache, and fetch nothing.

    Raises:
        FileNotFoundError: neither a directory nor a repository that could be fetched.
    """
    path = Path(path_or_hf_repo).expanduser()
    if path.exists():
        return path
    name = str(path_or_hf_repo)
    if not is_repository(name):
        raise FileNotFoundError(f"{name}: no such directory")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=mlx_lm.utils.DEFAULT_ALLOW_PATTERNS,
                local_files_only=local_files_only,
            )
        )
    except Exception as error:  # whatever the HTTP library raises that the hub's client happens to use
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{name}{at}: no such directory, and not to be had from the Hugging Face hub: {one_line(error)}"
        ) from error


def is_repository(name: str) -> bool:
    """Whether it looks like the name of a Hugging Face repository, OWNER/NAME, and not like a path."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")


def revision_of(path: Path) -> str | None:
    """The commit of a model in the Hugging Face cache; None elsewhere."""
    return path.name if path.parent.name == "snapshots" else None


def has_tokenizer(path: Path) -> bool:
    """Whether a directory has a tokenizer's files."""
    return any((path / name).exists() for name in TOKENIZER_FILES)


def read_config(path: Path) -> dict[str, Any]:
    """A pair's `config.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or not a pair's.
    """
    config = read_model_config(path)
    if config.get("model_type") != "kvpred":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}, expected 'kvpred' (a pair)")
    return config


def read_model_config(path: Path) -> dict[str, Any]:
    """Any model's `config.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: {'not a directory' if path.exists() else 'no such directory'}")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json, so not a model directory")
    try:
        config = mlx_lm.utils.load_config(path)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / 'config.json'}: not JSON: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'} holds {type(config).__name__}, expected a model's settings")
    return config
