"""Makes pairs known to mlx-lm, without importing mlx-lm before its user does.

mlx-lm looks model families up as modules `mlx_lm.models.<model_type>`, and the caches of prompt-cache files by class
name in `mlx_lm.models.cache`.  A finder answers for the module; a hook lets modules of ours be imported right after
one of mlx-lm's, where they make themselves known: the cache entry's, and what saves caches whole, after
`mlx_lm.models.cache`, that of linked pairs after `mlx_lm.utils`, the scans for MLX's CPU backend after the modules that
have mlx-lm's own (convolutions are MLX's; every model file imports `mlx_lm.models.base`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

FAMILY = "mlx_lm.models.kvpred"
FOLLOWERS = {
    "mlx_lm.models.base": ("kvpred_mlx.scans.depthwise", "kvpred_mlx.scans.quantized_linear"),
    "mlx_lm.models.cache": ("kvpred_mlx.pair.saved_cache", "kvpred_mlx.pair.auxiliary_cache"),
    "mlx_lm.models.gated_delta": ("kvpred_mlx.scans.delta_net",),
    "mlx_lm.models.jamba": ("kvpred_mlx.scans.jamba",),
    "mlx_lm.models.ssm": ("kvpred_mlx.scans.state_space",),
    "mlx_lm.utils": ("kvpred_mlx.pair.in_mlx_lm",),
}


def register() -> None:
    """Let mlx-lm find pairs, whether it is imported already or will be."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for module, followers in FOLLOWERS.items():
        for follower in followers if module in sys.modules else ():
            importlib.import_module(follower)


def announce_config() -> None:
    """Give transformers a config class of a pair's name, else loading its tokenizer warns of an unknown type."""
    from transformers import AutoConfig, PreTrainedConfig

    config_class = type("KVPredictionConfig", (PreTrainedConfig,), {"model_type": "kvpred"})
    AutoConfig.register("kvpred", config_class, exist_ok=True)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == FAMILY:
            return importlib.util.spec_from_file_location(
                FAMILY, Path(__file__).with_name("pair") / "family.py"
            )
        if fullname not in FOLLOWERS:
            return None
        others = (f.find_spec(fullname, path, target) for f in sys.meta_path if f is not self)
        spec = next((s for s in others if s is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, FOLLOWERS[fullname])
        return spec


class _Then(Loader):
    """The module's own loader, and then the import of other modules."""

    def __init__(self, loader: Loader, followers: Sequence[str]):
        self._loader, self._followers = loader, followers

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # If it is the follower which imports this module, this changes nothing: it is not done yet.
        for follower in self._followers:
            importlib.import_module(follower)
