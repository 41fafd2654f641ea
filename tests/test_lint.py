"""What `make lint` and the pages for those who come after rest on."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from kvpred_mlx.mlx_lm_internals import VERSIONS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    if (ROOT / name).exists()
)  # fmt: skip
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def test_pre_commit_runs_what_make_lint_runs():
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    steps = re.findall(r"^\t\$\(BIN\)/(.*)$", recipe, re.MULTILINE)
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in hooks if "entry" in hook]
    assert len(steps) == len(entries) > 4
    for step, entry in zip(steps, entries, strict=True):  # a hook is given its files, a step names them
        assert step == entry or (step.startswith(f"{entry} .github/")), (step, entry)
    assert "$(ACTIONLINT)" in recipe and "actionlint" in [hook["id"] for hook in hooks]


def test_mypy_reads_all_code_and_what_proves_it():
    mypy = PROJECT["tool"]["mypy"]
    assert mypy["files"] == ["kvpred_mlx", "tests/types_seen.py"]
    assert {link: (ROOT / link).resolve() for link in ("kvpred_mlx/bench", "kvpred_mlx/convert")} == {
        "kvpred_mlx/bench": ROOT / "bench", "kvpred_mlx/convert": ROOT / "convert"
    }  # fmt: skip
    unseen = [module for o in mypy["overrides"] for module in o["module"]]
    assert "ignore_missing_imports" not in mypy
    assert not [module for module in unseen if module.startswith("kvpred_mlx")]


def test_the_range_of_mlx_lm_is_the_one_that_is_checked():
    assert VERSIONS in PROJECT["project"]["dependencies"]


def test_architecture_names_every_package():
    page = (ROOT / "docs/architecture.md").read_text()
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert not [name for name in packages if f"{name.rsplit('.', 1)[-1]}/" not in page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def anchors(page):
    """The places of a page's headings, as GitHub names them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
