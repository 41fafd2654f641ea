"""Makes pairs known to mlx-lm, without importing mlx-lm before its user does.

mlx-lm looks model families up as modules `mlx_lm.models.<model_type>`, and the caches of prompt-cache files
by class name in `mlx_lm.models.cache`.  `kvpred_mlx.model` announces itself there when it is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register() -> None:
    """Import `kvpred_mlx.model` now if mlx-lm is imported, else right after it will be."""
    if "mlx_lm" in sys.modules:
        importlib.import_module("kvpred_mlx.model")
    elif not any(isinstance(finder, _AfterMlxLm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterMlxLm())


def announce(model_module: ModuleType, cache_class: type) -> None:
    """Put the pair's module, the class of its cache entry and its config where they are looked up."""
    from mlx_lm.models import cache
    from transformers import AutoConfig, PreTrainedConfig

    sys.modules.setdefault("mlx_lm.models.kvpred", model_module)
    setattr(cache, cache_class.__name__, cache_class)
    # Without a config class of this name, loading the tokenizer warns of an unknown model type.
    config_class = type("KVPredictionConfig", (PreTrainedConfig,), {"model_type": "kvpred"})
    AutoConfig.register("kvpred", config_class, exist_ok=True)


class _AfterMlxLm(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "mlx_lm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if not _importing():
            importlib.import_module("kvpred_mlx.model")


def _importing() -> bool:
    """Whether it is a module of ours that imports mlx-lm: `kvpred_mlx.model` may need that one whole."""
    ours = [module for name, module in [*sys.modules.items()] if name.startswith("kvpred_mlx.")]
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)
