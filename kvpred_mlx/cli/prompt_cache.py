"""`generate --prompt-cache-file`: a pair's prompt cache that mlx-lm's `save_prompt_cache` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from kvpred_mlx.cli.opening import OpenedPair

OPTION = "--prompt-cache-file"


@dataclass
class SavedCache:
    """A prompt cache from a file, and what mlx-lm's `cache_prompt` notes beside it.

    Args:
        file: where it was.
        entries: the base's caches and an `AuxiliaryCache`.
        model: the pair that made it (None: not noted).
        tokenizer_config: how that pair's tokenizer was loaded.
    """

    file: Path
    entries: list[Any]
    model: str | None
    tokenizer_config: dict[str, Any]

    def __len__(self) -> int:
        """Tokens that it holds."""
        return self.entries[-1].size()

    def check_quantization(self, kv_bits: int | None, group_size: int) -> None:
        """Refuse options that the cache is not quantized with, as mlx-lm's generate does."""
        from mlx_lm.models.cache import QuantizedKVCache

        quantized = next((c for c in self.entries if isinstance(c, QuantizedKVCache)), None)
        if quantized is None:
            return
        for option, given, found in (
            ("--kv-bits", kv_bits, quantized.bits),
            ("--kv-group-size", group_size, quantized.group_size),
        ):
            if given not in (None, found):
                raise typer.BadParameter(
                    f"{given}, expected {found} as in {self.file} ({OPTION})", param_hint=option
                )

    def check_pair(self, model: str | None, opened: OpenedPair) -> None:
        """Refuse a pair that did not make the cache: of another name, or with other shapes of keys and values."""
        if model is not None and self.model not in (None, model) and not _same(self.model, opened.path):
            raise typer.BadParameter(
                f"{self.file} was made with {self.model}, expected --model {self.model} or none",
                param_hint=OPTION,
            )
        if not _fits(self.entries, opened.pair):
            raise ValueError(f"{self.file}: the prompt cache of another model, expected one of {opened.name}")


def read_cache(file: Path) -> SavedCache:
    """Read a prompt cache.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a prompt cache, or not a pair's.
    """
    from mlx_lm.models.cache import load_prompt_cache

    from kvpred_mlx.errors import one_line
    from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected a prompt cache")
    try:
        entries, metadata = load_prompt_cache(str(file), return_metadata=True)
        if not isinstance(metadata, dict):  # nothing was noted
            metadata = {}
        tokenizer_config = dict(json.loads(metadata.get("tokenizer_config", "{}")))
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a prompt cache of mlx-lm: {one_line(error)}") from error
    if not entries or not isinstance(entries[-1], AuxiliaryCache):
        raise ValueError(f"{file}: the prompt cache of a single model, expected a pair's")
    return SavedCache(file, entries, metadata.get("model"), tokenizer_config)


def _same(name: str | None, path: Path | None) -> bool:
    """Whether a noted name is that directory, written in another way."""
    return name is not None and path is not None and Path(name).expanduser().resolve() == path.resolve()


def _fits(entries: list[Any], pair: Any) -> bool:
    """Whether `pair` makes such caches."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    def shapes(model: Any, caches: list[Any]) -> list[Any]:
        model(mx.array([[0]]), cache=caches)  # lazy: nothing is computed
        return [_shapes(c) for c in caches]

    *base, entry = entries
    auxiliary = shapes(pair.auxiliary, make_prompt_cache(pair.auxiliary))
    read = [
        _shapes(c) for c in entry.auxiliary
    ]  # those of the first layers, if the predictor reads no others
    return [_shapes(c) for c in base] == shapes(
        pair.base, make_prompt_cache(pair.base)
    ) and read == auxiliary[: len(read)]


def _shapes(cache: Any) -> list[tuple[int, ...]]:
    """Rows, heads and width of a cache's keys and of its values; of any length, quantized or not."""
    kept = [getattr(cache, name, None) for name in ("keys", "values")]
    group_size = getattr(cache, "group_size", None)
    if group_size is None:
        return [(*a.shape[:2], a.shape[-1]) for a in kept if a is not None]
    return [(*scales.shape[:2], scales.shape[-1] * group_size) for _, scales, _ in filter(None, kept)]
