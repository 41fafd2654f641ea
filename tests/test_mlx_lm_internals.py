"""mlx-lm's internals that are used, and modes."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import mlx_lm.server
import pytest
from mlx_lm_names import SourceFile, names_used

from kvpred_mlx import mlx_lm_internals
from kvpred_mlx.pair.modes import Mode
from kvpred_mlx.serving.settings import ServerSettings

MODULES = [m for m in mlx_lm_internals.USED if m != "mlx_lm.evaluate" or find_spec("lm_eval")]


def test_nothing_that_is_used_has_moved():
    assert mlx_lm_internals.moved(MODULES) == []


def test_what_moves_is_named(monkeypatch):
    monkeypatch.delattr(mlx_lm.server.APIHandler, "handle_completion")
    monkeypatch.setattr(mlx_lm.server.ModelProvider, "load", lambda self, name: None)
    here = version("mlx-lm")
    lost = "model_path, adapter_path, draft_model_path"
    assert mlx_lm_internals.moved(["mlx_lm.server"]) == [
        f"mlx_lm.server.APIHandler.handle_completion is not there in mlx-lm {here}, written for mlx-lm>=0.32,<0.33",
        f"mlx_lm.server.ModelProvider.load has no parameter {lost} in mlx-lm {here}, written for mlx-lm>=0.32,<0.33",
    ]


def test_all_that_our_sources_use_is_listed_and_all_that_is_listed_is_used():
    used, listed = names_used(), set()
    if not find_spec("lm_eval"):
        used = {name: p for name, p in used.items() if not name.startswith("mlx_lm.evaluate.")}
    for module in MODULES:
        for name, parameters in mlx_lm_internals.USED[module].items():
            listed.add(f"{module}.{name}")
            missing = used.get(f"{module}.{name}", set()) - set(parameters.split())
            assert not missing, f"{module}.{name} is used with {missing}"
    assert used.keys() - listed == set(mlx_lm_internals.ADDED)
    assert listed - used.keys() == set()


SOURCE = """
import mlx_lm.utils
from mlx_lm import load
from mlx_lm.generate import _secret as known
from mlx_lm.models.cache import KVCache, make_prompt_cache as caches
from mlx_lm.sample_utils import make_sampler

NAME = "scaled_dot_product_attention"
mlx_lm.utils.load_config(path)
mlx_lm.server.stream_generate = caches(model, max_kv_size=8)
setattr(module, NAME, known)

class Ours(KVCache):
    def trim(self, n): return super().nothing() or super().update_and_fetch(n, values=n)
    def mine(self): self.offset = getattr(other, "is_trimmable", self.ours)
"""


def test_every_kind_of_use_is_found(tmp_path):
    (tmp_path / "source.py").write_text(SOURCE)
    file, found = SourceFile(tmp_path / "source.py"), {}
    for name, parameters in file.uses(file.subclasses, set()):
        found.setdefault(name.removeprefix("mlx_lm."), set()).update(parameters)
    assert found == {
        "utils.load_config": set(),
        "generate._secret": set(),
        "models.cache.KVCache": set(),
        "models.cache.KVCache.trim": {"n"},
        "models.cache.KVCache.nothing": set(),
        "models.cache.KVCache.update_and_fetch": {"values"},
        "models.cache.KVCache.offset": set(),
        "models.cache.KVCache.is_trimmable": set(),
        "models.cache.make_prompt_cache": {"max_kv_size"},
        "models.base.scaled_dot_product_attention": set(),
        "server.stream_generate": set(),
    }


def test_the_version_range_is_the_package_s():
    from importlib.metadata import requires

    name, _, limits = mlx_lm_internals.VERSIONS.partition(">")
    required = next(r for r in requires("kvpred-mlx") if r.startswith("mlx-lm"))
    assert set(required.removeprefix(name).split(",")) == set((">" + limits).split(","))


def test_the_server_has_mlx_lm_s_flags_and_defaults(monkeypatch):
    """All but those that make no sense for a pair."""
    from kvpred_mlx.cli import app

    found = {}

    def caught(parser, *args, **kwargs):
        found.update({a.option_strings[0]: a.default for a in parser._actions if a.option_strings[0] != "-h"})
        raise InterruptedError

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", caught)
    with pytest.raises(InterruptedError):
        mlx_lm.server.main()
    theirs = found.keys() - {"--adapter-path", "--pipeline"}
    import typer.main

    options = typer.main.get_command(app).commands["serve"].params
    ours = {o.opts[0]: o.default for o in options if o.opts[0].startswith("--")}
    assert theirs - ours.keys() == set()
    assert ours.keys() - theirs == {
        "--base", "--auxiliary", "--force",
        "--exact", "--exact-first", "--exact-last", "--exact-top", "--depth", "--draft",
    }  # fmt: skip
    assert {name for name in theirs if str(ours[name]) != str(found[name])} == set()
    settings = ServerSettings()
    kept = theirs - {"--log-level", "--model"}
    defaults = {n: getattr(settings, n[2:].replace("-", "_")) for n in kept}
    assert {n for n, d in defaults.items() if str(d) not in (str(found[n]), f"['{found[n]}']")} == set()


def test_modes_have_names(demo_pair):
    for name in ("exact", "predicted"):
        assert str(Mode.parse(name)) == name
    pair = demo_pair[0]
    with Mode(exact=True).applied(pair):
        assert pair.exact and Mode.of(pair) == Mode(exact=True)
    assert Mode.of(pair) == Mode()


@pytest.mark.parametrize("name", ["", "fast", "last=3", "exact-middle=3", "exact-last", "exact-last=many"])
def test_unknown_modes(name):
    with pytest.raises(ValueError, match="expected"):
        Mode.parse(name)


def test_requests_override():
    assert Mode().override({}) == Mode() == Mode(exact=True).override({"exact": False})
    assert Mode(exact=True).override({}) == Mode(exact=True) == Mode().override({"exact": True})
    for wrong in (3, [], {"exactly": True}, {"exact": 1}, {"exact": None}, {"exact": True, "exact_last": 3}):
        with pytest.raises(ValueError, match="kvpred"):
            Mode().override(wrong)


def test_the_dial():
    exact = pytest.importorskip("kvpred_mlx.dial.positions")
    positions = exact.ExactPositions(first=4, last=0.25)
    mode = Mode(positions=positions)
    assert str(mode) == "exact-first=4+exact-last=0.25" and Mode.parse(str(mode)) == mode
    assert Mode().override({"exact_first": 4, "exact_last": 0.25}) == mode
    assert mode.override({"exact_last": 8}).positions == exact.ExactPositions(first=4, last=8)
    assert mode.override({"exact_first": 0, "exact_last": 0}) == Mode()
    assert mode.override({"exact": True}) == Mode(exact=True)
    for wrong in ({"exact_last": "8"}, {"exact_last": True}, {"exact_first": -1}, {"exact_top": 2}):
        with pytest.raises(ValueError, match="expected"):
            mode.override(wrong)
