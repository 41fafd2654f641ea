"""Pairs to the Hugging Face hub; `kvpred_mlx.load` takes them from there."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from kvpred_mlx.errors import one_line
from kvpred_mlx.making.card import CARD, CardFacts, write_card


def check_access(repo_id: str) -> None:
    """Make sure that `repo_id` can be uploaded to, before long work is done for it.

    Raises:
        ValueError: it is not the name of a repository, NAME or OWNER/NAME.
        OSError: the hub does not answer, or does not know who asks.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is no repository's name: {one_line(error)}") from error
    try:
        HfApi().whoami()
    except Exception as error:
        raise _failure(repo_id, error) from error


def upload(path: Path, repo_id: str, made: str = "") -> str:
    """Upload a model's directory with its card; returns the repository's address.

    Args:
        path: a saved model; without a card (README.md) it gets one that says how to run it.
        made: a sentence for that card on how the model was made.

    Raises:
        FileNotFoundError: `path` is not a model's directory.
        ValueError, OSError: as `check_access`, or the hub refuses the upload.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json, so not a model directory")
    check_access(repo_id)
    if not (path / CARD).exists():
        write_card(path, CardFacts(repo_id, made=[made] if made else []))
    api = HfApi()
    try:
        address = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=path, commit_message="Upload with kvpred-mlx")
    except Exception as error:
        raise _failure(repo_id, error) from error
    return str(address)


def _failure(repo_id: str, error: Exception) -> OSError:
    """Whatever the hub's client raises: some errors are of the HTTP library that it happens to use."""
    return OSError(f"{repo_id}: the Hugging Face hub refused: {one_line(error)}")
