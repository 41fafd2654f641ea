"""What is installed holds the tree's modules and data, each once, and nothing else lands in site-packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"kvpred_mlx": "kvpred_mlx", "convert": "kvpred_mlx/convert", "bench": "kvpred_mlx/bench"}
LINKS = {"kvpred_mlx/convert": "../convert", "kvpred_mlx/bench": "../bench"}


def packaged(root):
    """The tree's files that get installed: where they stand and where they go; no links are followed."""
    return {
        f"{folder}/{path.relative_to(root / folder).as_posix()}": (
            f"{installed}/{path.relative_to(root / folder).as_posix()}"
        )
        for folder, installed in PACKAGES.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "results" not in path.parts
    }


def copy_tree(to):
    """The files that git knows, as a fresh clone has them."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, names):
        if os.path.lexists(ROOT / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name, follow_symlinks=False)


def build(source, out, *arguments):
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *arguments, "--outdir", out, source],
        check=True, capture_output=True,
    )  # fmt: skip


def make(source, what, out):
    """Call a function of the build backend, as front ends do."""
    code = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, what, out], cwd=source, check=True, capture_output=True)


def modules_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(n for n in archive.namelist() if ".dist-info/" not in n)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    copy_tree(source)
    return source


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """An sdist of the tree, and a wheel of that sdist, made as `build` does, with fewer processes."""
    out, unpacked = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("unpacked")
    make(source, "build_sdist", out)
    shutil.unpack_archive(next(out.glob("*.tar.gz")), unpacked)
    make(next(unpacked.iterdir()), "build_wheel", out)
    return out


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


def install(wheel, site):
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--target",
        site,
    ]
    subprocess.run([*command, wheel], check=True)


def run_installed(code, site):
    """Run Python code where `site` is installed: not what the tests run on, nor the repository's folders."""
    begin = (
        "import site, sys\n"
        f"site.addsitedir({str(site)!r})\n"
        f"sys.path.append({sysconfig.get_path('purelib')!r})\n"  # what it needs, no editable installs
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", begin + code],
        cwd=site, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_wheel_of_the_sdist_holds_exactly_the_tree(wheel):
    assert modules_of(wheel) == sorted(packaged(ROOT).values())


def test_sdist_holds_each_file_once_and_no_links(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        members = archive.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()]
    files = [m.name.split("/", 1)[1] for m in members if m.isfile()]
    about = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    modules = [f for f in files if f not in about and not f.startswith("kvpred_mlx.egg-info/")]
    assert sorted(modules) == sorted(packaged(ROOT))


@pytest.mark.slow
def test_wheel_of_a_clone_is_the_same(tmp_path):
    # What `pip install git+...` does; of the last commit, whatever is in the tree.
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, clone], check=True, capture_output=True)
    assert {name: os.readlink(clone / name) for name in LINKS} == LINKS
    for weights in (clone / "kvpred_mlx").rglob("*.safetensors"):
        weights.write_bytes(b"")  # names matter here, and they pack slowly
    build(clone, tmp_path / "out", "--wheel")
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert modules_of(wheel) == sorted(packaged(clone).values())


@pytest.mark.slow
def test_editable_install_finds_exactly_the_tree(source, tmp_path):
    code = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=source, check=True, capture_output=True)
    install(next(tmp_path.glob("*.whl")), tmp_path / "site")
    modules = {
        installed.removesuffix(".py").removesuffix("/__init__").replace("/", "."): os.path.realpath(
            source / file
        )
        for file, installed in packaged(source).items()
        if file.endswith(".py")
    }
    code = (
        "import json, os, pkgutil\n"
        "from importlib.util import find_spec\n"
        "import kvpred_mlx\n"
        "found = [m.name for m in pkgutil.walk_packages(kvpred_mlx.__path__, 'kvpred_mlx.')]\n"
        "places = {name: os.path.realpath(find_spec(name).origin) for name in ['kvpred_mlx', *found]}\n"
        "print(json.dumps(places))\n"
    )
    assert json.loads(run_installed(code, tmp_path / "site")) == modules


@pytest.mark.slow
def test_installed_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    install(wheel, site)
    code = (
        "import importlib.metadata, importlib.util, kvpred_mlx, kvpred_mlx.convert, kvpred_mlx.bench\n"
        f"assert kvpred_mlx.__file__.startswith({str(site)!r}), kvpred_mlx.__file__\n"
        "assert importlib.util.find_spec('convert') is None\n"
        "assert importlib.util.find_spec('bench') is None\n"
        "assert kvpred_mlx.load(kvpred_mlx.pair.locating.DEMO_PAIR)[1] is not None\n"
        "assert importlib.metadata.version('kvpred-mlx') == kvpred_mlx.__version__\n"
    )
    run_installed(code, site)
    assert sorted(p.name for p in site.iterdir() if p.suffix != ".dist-info") == ["bin", "kvpred_mlx"]
