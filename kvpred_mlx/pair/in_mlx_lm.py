"""What lets mlx-lm's own `load` take a linked pair: imported right after `mlx_lm.utils` (see `_registration`).

mlx-lm hands a model class its config, not the directory that it came from; so the paths in a linked pair's config are
made absolute where mlx-lm reads it.  And the tokenizer of a linked pair is its base's.

Nothing of ours is imported here at once: it may be one of our modules whose import of mlx-lm leads here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm import utils

_load_config, _load_tokenizer = utils.load_config, utils.load_tokenizer


def load_config(model_path: Path) -> dict[str, Any]:
    """mlx-lm's `load_config`; a pair's links are absolute."""
    config = _load_config(model_path)
    if isinstance(config, dict) and config.get("model_type") == "kvpred":
        for role in ("base", "auxiliary"):
            if isinstance(entry := config.get(role), dict) and isinstance(entry.get("path_or_hf_repo"), str):
                entry["path_or_hf_repo"] = _absolute(Path(model_path), entry["path_or_hf_repo"])
    return config


def load_tokenizer(
    model_path: Any, tokenizer_config_extra: dict[str, Any] | None = None, eos_token_ids: Any = None
) -> Any:
    """mlx-lm's `load_tokenizer`; that of a linked pair's base for the pair."""
    from kvpred_mlx.pair.locating import find_model, has_tokenizer

    path = Path(model_path)
    if (path / "config.json").is_file() and not has_tokenizer(path):
        config = load_config(path)
        base = config.get("base") if isinstance(config, dict) else None
        if isinstance(base, dict) and "path_or_hf_repo" in base:
            model_path = find_model(base["path_or_hf_repo"], base.get("revision"))
            if eos_token_ids is None:
                eos_token_ids = _load_config(model_path).get("eos_token_id")
    return _load_tokenizer(model_path, tokenizer_config_extra, eos_token_ids=eos_token_ids)


def _absolute(pair: Path, place: str) -> str:
    from kvpred_mlx.pair.locating import is_repository

    beside = (pair / place).resolve()
    if beside.exists() or not is_repository(place):
        return str(Path(place).expanduser() if place.startswith("~") else beside)
    return place


utils.load_config, utils.load_tokenizer = load_config, load_tokenizer
