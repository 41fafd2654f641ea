"""Every command line in README, docs and model card exists: its command, its flags, its make target, its tests."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.core
import typer.main

from kvpred_mlx.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / "kvpred_mlx/pycode/README.md", *sorted(ROOT.glob("kvpred_mlx/pairs/*/README.md"))]
PAGES += [page for page in (ROOT / "CONTRIBUTING.md",) if page.exists()]
BEGINNINGS = ("kvpred-mlx", "python -m kvpred_mlx", "make", "pytest", "python -m pytest", "mlx.launch")
ELIDED = "ELIDED"  # what stands for ... and [in brackets], which leave something out


def command_lines(text: str) -> list[str]:
    """The lines of code blocks, and inline code that begins as a command of ours does."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    blocks = [code for language, code in fence.findall(text) if language not in ("python", "json")]
    prose = fence.sub("", text)
    blocks += re.findall(r"^ {4}(.*)$", prose, re.MULTILINE)
    lines = [line for code in blocks for line in code.replace("\\\n", " ").splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    begins = re.compile(rf"(\w+=\S+ )*({'|'.join(map(re.escape, BEGINNINGS))})(\s|\.|$)")
    return [line.strip().removeprefix("$ ") for line in lines] + [
        code for code in inline if begins.match(code)
    ]


def commands(line: str) -> list[list[str]]:
    """The commands of ours in a line of shell, as words: program first, without its folder."""
    line = re.sub(r"(?<!\S)(\.\.\.|\[[^]]*\])(?!\S)", ELIDED, line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # an open quote: no line of shell
        return []
    parts: list[list[str]] = [[]]
    for word in words:
        if re.fullmatch(r"[();<>|&]+", word) or word == "--":  # mlx.launch -n 2 -- COMMAND
            parts.append([])
        elif parts[-1] or not re.match(r"\w+=", word):  # VARIABLE=value COMMAND
            parts[-1].append(word)
    found = []
    for program, *arguments in filter(None, parts):
        name = Path(program).name
        if name.startswith("python") and arguments[:1] == ["-m"]:
            name, *arguments = arguments[1:]
        if name in ("kvpred-mlx", "make", "pytest") or name.split(".")[0] == "kvpred_mlx":
            found.append(["kvpred-mlx" if name == "kvpred_mlx" else name, *arguments])
    return found


def check(command: list[str]) -> None:
    """Fail if the command does not exist in this way."""
    check_once(tuple(command))


@functools.cache
def check_once(command: tuple[str, ...]) -> None:
    """What exists is looked for once: pages repeat commands."""
    program, *words = command
    elided = (
        ELIDED in words or len(words) == 1
    )  # `kvpred-mlx train` alone is a name, not a whole command line
    kept = [word for word, before in zip(words, command, strict=False) if word != ELIDED or before[0] == "-"]
    words = ["1" if word == ELIDED else word for word in kept]  # `--iters ...`: the value is left open
    if program == "kvpred-mlx":
        check_cli(words, elided)
    elif program == "make":
        check_make(words)
    elif program == "pytest":
        check_pytest(words)
    else:
        check_module(program, words)


@functools.cache
def command_group() -> typer.core.TyperGroup:
    return typer.main.get_command(app)


def check_cli(words: list[str], elided: bool) -> None:
    group = command_group()
    name = words[0] if words else ""
    assert name in group.commands or not words, f"no command {name!r}"
    try:
        context = group.commands[name].make_context(name, words[1:]) if words else None
    except Exception as error:  # typer's errors have no one class in all of its versions
        if not (elided and type(error).__name__ == "MissingParameter"):
            raise AssertionError(getattr(error, "message", "") or repr(error)) from error
    else:
        given = context.params if context else {}
        assert not (given.get("pair") and given.get("model")), "the pair is named twice"


def check_make(words: list[str]) -> None:
    """The target and the variables exist, and so do the commands of ours that it would run."""
    makefile = (ROOT / "Makefile").read_text()
    for variable in (word.partition("=")[0] for word in words if "=" in word):
        assert re.search(rf"\$\({variable}\)|^{variable} \?=", makefile, re.MULTILINE), (
            f"no variable {variable}"
        )
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.replace("\\\n", " ").splitlines():
        for command in commands(line):
            if command[0] not in ("make", "pytest"):
                check(command)


class Parsed(BaseException):
    """The command line was understood; whoever catches every `Exception` does not catch this."""


def check_module(name: str, words: list[str]) -> None:
    """Run a module up to the point where it has parsed its command line."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, *given, **options):
        parse(parser, *given, **options)
        raise Parsed

    def invoke(*given):
        raise Parsed

    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"no module {name}"
    if not re.search(
        r"^import (argparse|typer)|^    command\.run\(", Path(spec.origin).read_text(), re.MULTILINE
    ):
        assert not any(word.startswith("-") for word in words), f"{name} takes no flags"
        return
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(typer.core.TyperCommand, "invoke", invoke)
        patch.setattr(sys, "argv", [name, *words])
        patch.delitem(sys.modules, name, raising=False)
        try:
            runpy.run_module(name, run_name="__main__")
        except Parsed:
            return
        except SystemExit as stop:
            assert not stop.code, printed.getvalue()


def check_pytest(words: list[str]) -> None:
    """Every file and every word of -k selects a test."""
    assert words.count("-k") <= 1, "of several -k only the last counts"
    found: list[str] = []

    class Collector:
        def pytest_collection_finish(self, session):
            found.extend(item.nodeid for item in session.items)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(ROOT)
        # The plugin collects garbage ten times at the end, which takes seconds where so much is imported.
        without = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]
        code = pytest.main([*words, "--collect-only", "-q", *without], plugins=[Collector()])
    assert code == 0, printed.getvalue()
    files = [word for word in words if word.startswith("tests/")]
    expression = words[words.index("-k") + 1] if "-k" in words else ""
    wanted = [*files, *(set(re.findall(r"\w+", expression)) - {"and", "or", "not"})]
    assert found and all(any(name in item for item in found) for name in wanted), (wanted, found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_line_exists(page):
    wrong = []
    for line in command_lines(page.read_text(encoding="utf-8")):
        for command in commands(line):
            try:
                check(command)
            except AssertionError as error:
                wrong.append(f"{line}\n    {error}")
    assert not wrong, "\n".join(wrong)


def test_command_lines_are_found():
    """Of every kind; else the pages, or what reads them, have changed."""
    lines = [line for page in PAGES for line in command_lines(page.read_text(encoding="utf-8"))]
    found = [command for line in lines for command in commands(line)]
    assert len(found) > 60
    assert {"kvpred-mlx", "make", "pytest"} < {command[0] for command in found}
    assert {command[1] for command in found if command[0] == "kvpred-mlx" and len(command) > 1} == set(
        command_group().commands
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```bash\nkvpred-mlx info PAIR   # what it is\n```", [["kvpred-mlx", "info", "PAIR"]]),
        ("see `kvpred-mlx\n  demo` and `other -x`", [["kvpred-mlx", "demo"]]),
        ("    $ printf 'a' | kvpred-mlx chat -m 12", [["kvpred-mlx", "chat", "-m", "12"]]),
        ("`mlx.launch -n 2 -- kvpred-mlx train ...`", [["kvpred-mlx", "train", ELIDED]]),
        (
            '`X=1 python -m kvpred_mlx generate --prompt "..."`',
            [["kvpred-mlx", "generate", "--prompt", "..."]],
        ),
        (
            "```\nmake setup && pytest -k 'a or b' \\\n  tests/x.py\n```",
            [["make", "setup"], ["pytest", "-k", "a or b", "tests/x.py"]],
        ),
        ("```python\nmake('x')\n```\n`makes`", []),
    ],
)
def test_how_command_lines_are_found(text, expected):
    assert [command for line in command_lines(text) for command in commands(line)] == expected


@pytest.mark.parametrize(
    "line",
    [
        "kvpred-mlx info PAIR --jsn",
        "kvpred-mlx infos",
        "kvpred-mlx convert ... --dtipe bfloat16",
        "kvpred-mlx convert --dtype bfloat16",
        "python -m kvpred_mlx.bench.readme --all",
        "kvpred-mlx bench --trials none",
        "kvpred-mlx chat PAIR --model PAIR",
        "python -m kvpred_mlx.bench.studies.soak --request 3x",
        "python -m kvpred_mlx.bench.studies.nothing",
        "make demos",
        "make bench ARG='--model PAIR'",
        "make bench ARGS='--modell PAIR'",
        "pytest tests/test_nothing.py",
        "pytest tests/test_golden.py -k no_such_test",
        "pytest tests/test_golden.py -k logits -k greedy",
    ],
)
def test_what_does_not_exist_is_found_out(line):
    (command,) = commands(line)
    with pytest.raises(AssertionError):
        check(command)


@pytest.mark.slow
def test_make_convert(tmp_path):
    """Bare it converts the example, in the place of an earlier one; with half of its variables it tells its usage."""
    check(["make", "convert"])
    for name in ("pyproject.toml", "venv/bin/python", "venv/.runtime-none", "venv/.dev-none"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    program = tmp_path / "venv/bin/kvpred-mlx"
    shown = '[ "$1" = info ] && exec echo "$@"'  # that command has its own tests
    program.write_text(f'#!/bin/sh\n{shown}\nPYTHONPATH={ROOT} exec {sys.executable} -m kvpred_mlx "$@"\n')
    program.chmod(0o755)

    def make(*variables):
        options = [
            "-f",
            ROOT / "Makefile",
            "VENV=venv",
            "BACKEND=none",
            f"EXAMPLE={ROOT}/tests/data/golden_tiny",
        ]
        command = ["make", "convert", *map(str, options), *variables]
        outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the `make test` around this test
        env = {name: value for name, value in os.environ.items() if name not in outer}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)

    earlier = tmp_path / "build/example-pair"
    earlier.mkdir(parents=True)
    (earlier / "config.json").touch()
    done = make()
    assert done.returncode == 0, done.stderr
    assert (earlier / "model.safetensors").exists()
    assert (
        "info --model build/example-pair" in done.stdout and "build/example-pair is the tests'" in done.stdout
    )
    assert done.stdout.splitlines()[-1].startswith("  make convert CHECKPOINT=model.pt CONFIG=model.yaml")
    for half in (["CHECKPOINT=model.pt"], ["OUT=pair"], ["CONFIG=model.yaml"]):
        done = make(*half)
        assert done.returncode == 2 and done.stderr.startswith("usage: make convert CHECKPOINT=model.pt")
