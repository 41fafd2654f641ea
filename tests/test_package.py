"""The built wheel holds the tree's modules and data, and puts nothing else into site-packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"kvpred_mlx": "kvpred_mlx", "convert": "kvpred_mlx/convert", "bench": "kvpred_mlx/bench"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the files that git knows, as a fresh clone has them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in files:
        if not name.startswith("tests/") and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", out, source], check=True, capture_output=True
    )
    return next(out.glob("*.whl"))


def test_wheel_holds_exactly_the_tree(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {n for n in archive.namelist() if ".dist-info/" not in n}
    expected = set()
    for folder, installed in PACKAGES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and "results" not in path.parts:
                expected.add(f"{installed}/{path.relative_to(ROOT / folder).as_posix()}")
    assert found == expected


def test_installed_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel], check=True
    )
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import importlib.util, kvpred_mlx, kvpred_mlx.convert, kvpred_mlx.bench\n"
        f"assert kvpred_mlx.__file__.startswith({str(site)!r}), kvpred_mlx.__file__\n"
        "assert importlib.util.find_spec('convert') is None\n"
        "assert importlib.util.find_spec('bench') is None\n"
        "assert kvpred_mlx.load(kvpred_mlx.pair.loading.DEMO_PAIR)[1] is not None\n"
    )
    # -P: the repository's own folders must not be what is found.
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)
    assert sorted(p.name for p in site.iterdir() if p.suffix != ".dist-info") == ["bin", "kvpred_mlx"]
