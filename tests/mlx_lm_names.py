"""Which names of mlx-lm our sources use, read off their syntax trees.

Found are, beyond what mlx-lm documents: names that are imported, called through their module or replaced; of the
classes that are subclassed what is overridden, called or set; of the classes that a file names (or a subclass of ours
that it names) the attributes that it reads, but for those that every array, container or module has; and of every call
of these the parameters that are given by name.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm

from kvpred_mlx.mlx_lm_internals import attributes

ROOT = Path(__file__).parents[1]
ROOMS = ("kvpred_mlx", "bench", "convert")
CACHES = "mlx_lm.models.cache"
COMMON = {a for kind in (mx.array, nn.Module, dict, list, set, str, Path) for a in dir(kind)}
DOCUMENTED = {id(getattr(mlx_lm, name)) for name in mlx_lm.__all__}
DOCUMENTED_MODULES = ("mlx_lm.sample_utils",)

Found = dict[str, set[str]]  # a name, and its parameters that are counted on


def names_used() -> Found:
    """Every name with its parameters; names in `mlx_lm.evaluate` only where lm-eval is there."""
    files = [SourceFile(path) for path in _sources()]
    subclasses = {name: base for file in files for name, base in file.subclasses.items()}
    named = {name for file in files for name in file.classes({})}
    caches = {name for name in named if name.startswith(CACHES) and hasattr(value(name), "is_trimmable")}
    found: Found = {}
    for file in files:
        for name, parameters in file.uses(subclasses, caches):
            found.setdefault(name, set()).update(parameters)
    return found


class SourceFile:
    """One of our source files."""

    def __init__(self, path: Path):
        self._tree = ast.parse(path.read_text())
        self._nodes = list(ast.walk(self._tree))
        self._imported = dict(self._imports())

    def _imports(self) -> Iterator[tuple[str, str]]:
        """What names of this file mean: `mlx_lm.module.name`, or `name` of a class of ours."""
        for node in self._nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                theirs = node.module.split(".")[0] == "mlx_lm"
                for alias in node.names:
                    yield alias.asname or alias.name, f"{node.module}.{alias.name}" if theirs else alias.name
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "mlx_lm":
                        yield alias.asname or "mlx_lm", alias.name if alias.asname else "mlx_lm"

    def _meaning(self, node: ast.AST) -> str | None:
        """`mlx_lm.module.name` of an expression, if it is one of mlx-lm's."""
        if isinstance(node, ast.Name):
            name = self._imported.get(node.id, "")
            return name if name.split(".")[0] == "mlx_lm" else None
        if isinstance(node, ast.Attribute):
            owner = self._meaning(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        return None

    @cached_property
    def subclasses(self) -> dict[str, str]:
        """Our classes in this file, with their parents in mlx-lm."""
        classes = [n for n in self._nodes if isinstance(n, ast.ClassDef)]
        return {c.name: name for c in classes for base in c.bases if (name := self._meaning(base))}

    def classes(self, subclasses: dict[str, str]) -> set[str]:
        """mlx-lm's classes that are named here, themselves or by a subclass of ours."""
        named = {subclasses.get(name, name) for name in (*self._imported.values(), *self.subclasses.values())}
        return {name for name in named if name.startswith("mlx_lm.") and inspect.isclass(value(name))}

    def uses(self, subclasses: dict[str, str], caches: set[str]) -> Iterator[tuple[str, set[str]]]:
        """(name, parameters) again and again."""
        theirs = any(str(name).startswith(CACHES) for name in self._imported.values())
        classes = sorted(self.classes(subclasses) | (caches if theirs else set()), key=_plainest)
        for node in self._nodes:
            yield from self._named(node)
            yield from _attributes_read(node, classes)
            if isinstance(node, ast.FunctionDef):
                yield from self._arguments_read(node)
            if isinstance(node, ast.ClassDef) and node.name in self.subclasses:
                yield from _inherited(node, self.subclasses[node.name])
            if isinstance(node, ast.Call) and _is(node.func, "setattr"):
                yield from self._set_by_name(node)

    def _named(self, node: ast.AST) -> Iterator[tuple[str, set[str]]]:
        name = self._meaning(node)
        if name is not None and not isinstance(value(name), ModuleType):
            replaced = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if replaced or not _is_documented(name):
                yield name, set()
        if isinstance(node, ast.Call) and (name := self._meaning(node.func)) and not _is_documented(name):
            yield name, _keywords(node)

    def _arguments_read(self, node: ast.FunctionDef) -> Iterator[tuple[str, set[str]]]:
        """Attributes of arguments that are annotated with a class of mlx-lm's, but for what a wrapper passes on."""
        annotated = {a.arg: self._meaning(a.annotation) for a in node.args.args if a.annotation is not None}
        for m in ast.walk(node):
            name = annotated.get(getattr(m.value, "id", "")) if isinstance(m, ast.Attribute) else None
            if name is not None and (
                m.attr in attributes(value(name)) or not hasattr(value(name), "__getattr__")
            ):
                yield f"{name}.{m.attr}", set()

    def _set_by_name(self, node: ast.Call) -> Iterator[tuple[str, set[str]]]:
        """`setattr(module, "name", ...)`, if mlx-lm has a function of that name."""
        given = [n for n in self._tree.body if isinstance(n, ast.Assign)]
        constants = {ast.unparse(n.targets[0]): ast.unparse(n.value) for n in given}
        argument = ast.unparse(node.args[1])
        name = constants.get(argument, argument).strip("'")
        homes = (m for n, m in list(sys.modules.items()) if n.startswith("mlx_lm") and name in vars(m))
        for home in sorted({vars(m)[name].__module__ for m in homes if inspect.isfunction(vars(m)[name])}):
            yield f"{home}.{name}", set()


@cache
def value(name: str) -> Any:
    """What `mlx_lm.module.name` is; None if it is not there."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            found = getattr(found, part, None)
        return found
    return None


def _sources() -> Iterator[Path]:
    """All of our source files, each once (`kvpred_mlx/bench` and `convert` are links)."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path


def _is_documented(name: str) -> bool:
    return id(value(name)) in DOCUMENTED or name.startswith(DOCUMENTED_MODULES)


def _plainest(name: str) -> tuple[int, str]:
    """Of several classes that have an attribute, the one to name: the one of the fewest letters."""
    return len(name), name


def _attributes_read(node: ast.AST, classes: list[str]) -> Iterator[tuple[str, set[str]]]:
    """`anything.name` and `getattr(anything, "name")`, if an attribute of one of `classes`; `self` is another's."""
    name = None
    if isinstance(node, ast.Attribute) and not _is(node.value, "self"):
        name = node.attr
    elif isinstance(node, ast.Call) and (_is(node.func, "getattr") or _is(node.func, "hasattr")):
        name = getattr(node.args[1], "value", None)
    if name is not None and name not in COMMON:
        home = next((c for c in classes if name in attributes(value(c))), None)
        if home is not None:
            yield f"{home}.{name}", set()


def _inherited(node: ast.ClassDef, base: str) -> Iterator[tuple[str, set[str]]]:
    """What a subclass of `base` overrides, calls and sets."""
    if value(base) is None:  # of mlx_lm.evaluate, without lm-eval
        return
    theirs = attributes(value(base))
    for m in node.body:
        if isinstance(m, ast.FunctionDef) and m.name in theirs and m.name != "__init__":
            yield f"{base}.{m.name}", {a.arg for a in (*m.args.args[1:], *m.args.kwonlyargs)}
    for m in ast.walk(node):
        if isinstance(m, ast.AnnAssign) and isinstance(m.target, ast.Name) and m.target.id in theirs:
            yield f"{base}.{m.target.id}", set()
        if isinstance(m, ast.Attribute) and m.attr in theirs - {"__init__"} and _is(m.value, "self"):
            yield f"{base}.{m.attr}", set()
        if isinstance(m, ast.Call) and isinstance(m.func, ast.Attribute) and _is_super(m.func.value):
            yield base if m.func.attr == "__init__" else f"{base}.{m.func.attr}", _keywords(m)


def _keywords(call: ast.Call) -> set[str]:
    return {keyword.arg for keyword in call.keywords if keyword.arg is not None}


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _is(node.func, "super")
