"""Pairs to the Hugging Face hub; `kvpred_mlx.load` takes them from there."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

CARD = "README.md"
HOW_TO_RUN = """
# {name}

An MLX model for kvpred-mlx (KV Prediction,
[arXiv 2410.08391](https://arxiv.org/abs/2410.08391)). {made}

```bash
pip install kvpred-mlx
kvpred-mlx generate --model {name} --prompt "..."
```
"""


def check_access(repo_id: str) -> None:
    """Make sure that `repo_id` can be uploaded to, before long work is done for it.

    Raises:
        ValueError: it is not the name of a repository, NAME or OWNER/NAME.
        OSError: the hub does not answer, or does not know who asks.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is no repository's name: {_one_line(error)}") from error
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
        card(repo_id, made).save(path / CARD)
    api = HfApi()
    try:
        address = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=path, commit_message="Upload with kvpred-mlx")
    except Exception as error:
        raise _failure(repo_id, error) from error
    return str(address)


def card(name: str, made: str = "") -> ModelCard:
    """A card that says how to run the model; those of fitted and trained pairs have figures, too."""
    data = ModelCardData(
        library_name="mlx", pipeline_tag="text-generation", tags=["mlx", "kvpred-mlx", "kv-prediction"]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{HOW_TO_RUN.format(name=name, made=made)}")


def _failure(repo_id: str, error: Exception) -> OSError:
    """Whatever the hub's client raises: some errors are of the HTTP library that it happens to use."""
    return OSError(f"{repo_id}: the Hugging Face hub refused: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
