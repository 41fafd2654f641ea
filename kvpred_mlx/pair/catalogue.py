"""Pairs by name: those that come with the package, and those on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from kvpred_mlx.errors import one_line
from kvpred_mlx.pair.links import ROLES, Link
from kvpred_mlx.pair.locating import BUNDLED, find_model, read_config

TAG = "kvpred"  # of pairs on the hub (`kvpred_mlx.making.card`)


@dataclass(frozen=True)
class Listed:
    """What a list says of a pair.

    Args:
        name: what `--model` takes.
        base: a repository or a path; None if the pair holds its base itself.
        reads: what reads prompts: the auxiliary, or the base's first layers.
        bytes: on disk (None: not known).
        figures: from its card, by name: agreement, first token, retention.
        parts: by repository, whether it is in the local cache.
    """

    name: str
    base: str | None
    reads: str
    bytes: int | None
    figures: dict[str, str]
    parts: dict[str, bool]


def bundled() -> Iterator[Listed]:
    """The pairs that come with the package."""
    for name, path in BUNDLED.items():
        config = read_config(path)
        links = {role: link for role in ROLES if (link := Link.of(config.get(role)))}
        yield Listed(
            name,
            links["base"].path_or_hf_repo if "base" in links else None,
            _reads(config, links.get("auxiliary")),
            sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
            card_figures(path / "README.md"),
            {link.path_or_hf_repo: is_cached(link) for link in links.values()},
        )


def on_the_hub(limit: int = 100) -> list[str]:
    """Names of repositories on the hub that hold pairs, most downloaded first.

    Raises:
        OSError: the hub does not answer.
    """
    try:
        return [model.id for model in HfApi().list_models(filter=TAG, sort="downloads", limit=limit)]
    except Exception as error:  # whatever the HTTP library raises that the hub's client happens to use
        raise OSError(f"the Hugging Face hub does not answer: {one_line(error)}") from error


def is_cached(link: Link) -> bool:
    """Whether a linked model is there without a download."""
    try:
        find_model(link.path_or_hf_repo, link.revision, local_files_only=True)
    except FileNotFoundError:
        return False
    return True


def card_figures(card: Path) -> dict[str, str]:
    """Means of the predicted cache's row in the last table of a model card, {} if it has none."""
    if not card.exists():
        return {}
    rows = [line.strip("| ").split(" | ") for line in card.read_text(encoding="utf-8").splitlines()]
    heads = [row for row in rows if row[0] == "prompt cache"]
    predicted = [row for row in rows if row[0] == "predicted"]
    if not heads or not predicted:
        return {}
    found = dict(zip(heads[-1], predicted[-1], strict=False))
    means = {
        name: re.match(r"[\d.]+", found.get(name, "")) for name in ("agreement", "first token", "retention")
    }
    return {name: mean.group() for name, mean in means.items() if mean}


def _reads(config: dict[str, Any], auxiliary: Link | None) -> str:
    if config.get("first_layers"):
        return f"its first {' or '.join(map(str, config['first_layers']))} layers"
    if config.get("auxiliary_layers"):
        return f"its layers {','.join(map(str, config['auxiliary_layers']))}"
    return "its own auxiliary" if auxiliary is None else auxiliary.path_or_hf_repo
