"""Prompt-cache files that appear whole or not at all: imported right after `mlx_lm.models.cache` (see `_registration`).

Nothing of ours is imported here at once: it may be one of our modules whose import of mlx-lm leads here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm.models import cache as mlx_lm_caches

SUFFIX = ".safetensors"  # which MLX adds where it is not there
_save = mlx_lm_caches.save_prompt_cache


def save_prompt_cache(file_name: str, cache: list[Any], metadata: dict[str, str] | None = None) -> None:
    """mlx-lm's `save_prompt_cache`, beside the file and then in its place: a kill leaves the old one, or none."""
    from kvpred_mlx.files import write_file

    name = str(file_name)
    path = Path(name if name.endswith(SUFFIX) else name + SUFFIX)
    write_file(path, lambda beside: _save(str(beside), cache, metadata))


mlx_lm_caches.save_prompt_cache = save_prompt_cache
