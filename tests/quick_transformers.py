"""Importing this makes transformers quick to import: what it reads from 3,000 files of its own is kept on disk.

That takes it a second, twice, in each of the many processes that the tests start.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE, FUNCTION = "transformers.utils.import_utils", "define_import_structure"
CACHE = Path(__file__).parents[1] / ".pytest_cache"


class Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == MODULE else None
        if spec is not None and spec.loader is not None:
            spec.loader = Remembering(spec.loader)
        return spec


class Remembering(Loader):
    """The module's own loader; then its function looks on disk first."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        plain = getattr(module, FUNCTION, None)
        if plain is None or module.__file__ is None:
            return
        version = f"{module.__file__} {os.stat(module.__file__).st_mtime_ns}"

        def remembered(*arguments: Any, **options: Any) -> Any:
            key = hashlib.sha256(f"{version} {arguments} {options}".encode()).hexdigest()[:16]
            file = CACHE / f"transformers-{key}.pickle"
            with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
                return pickle.loads(file.read_bytes())
            found = plain(*arguments, **options)
            with contextlib.suppress(OSError):
                CACHE.mkdir(exist_ok=True)
                half = file.with_suffix(f".{os.getpid()}")
                half.write_bytes(pickle.dumps(found))
                half.replace(file)
            return found

        setattr(module, FUNCTION, remembered)


if MODULE not in sys.modules:
    sys.meta_path.insert(0, Finder())
