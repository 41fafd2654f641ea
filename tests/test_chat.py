"""`kvpred-mlx chat`: the history and its cache, commands, interruption; in a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time

import mlx_lm.chat
import pytest
import typer.main
from conftest import fails
from mlx_lm.utils import load_tokenizer
from processes import command

import kvpred_mlx
from kvpred_mlx.cli import app
from kvpred_mlx.generation.conversation import Conversation
from kvpred_mlx.pair.loading import context_length, read_base_config
from kvpred_mlx.pair.locating import DEMO_PAIR

LINES = [
    "def read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n\n\ndef write(path, text):",
    "def append_line(path, line):\n    with open(path, 'a') as file:\n        file.write(line)\n\n\ndef remove(path):",
]


READY = "\u203a"  # what mlx-lm shows before the cursor


def text_of(responses):
    return "".join(r.text for r in responses)


def test_turns_are_those_of_the_whole_history(demo_pair):
    """Each answer is what the history as one prompt gives, up to what earlier turns left in the cache."""
    model, tokenizer = demo_pair
    conversation = Conversation(model, tokenizer)
    first = text_of(conversation.say(LINES[0], 12))
    assert first == kvpred_mlx.generate(model, tokenizer, LINES[0] + "\n", max_tokens=12)
    known = len(conversation._cache[-1].logged())
    responses = list(conversation.say(LINES[1], 12))
    assert (
        responses[-1].prompt_tokens
        < len(tokenizer.encode(LINES[1])) + 16
        < known + responses[-1].prompt_tokens
    )
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"] == first


def test_exact_turns_are_the_base_s(demo_pair, monkeypatch):
    model, tokenizer = demo_pair
    monkeypatch.setattr(model, "exact", True)
    conversation = Conversation(model, tokenizer)
    first = text_of(conversation.say(LINES[0], 12))
    second = text_of(conversation.say(LINES[1], 12))
    history = f"{LINES[0]}\n{first}" + ("" if first.endswith("\n") else "\n") + f"{LINES[1]}\n"
    assert second == kvpred_mlx.generate(model, tokenizer, history, max_tokens=12)


def test_a_chat_template_and_a_system_prompt(demo_pair):
    model = demo_pair[0]
    template = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}# assistant\n"
    tokenizer = load_tokenizer(DEMO_PAIR, {"chat_template": template})
    conversation = Conversation(model, tokenizer, "Be brief.")
    answer = text_of(conversation.say(LINES[0], 8))
    prompt = tokenizer.decode(conversation._cache[-1].logged())
    assert "# system\nBe brief." in prompt and prompt.count("# assistant") == 1
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert text_of(conversation.say(LINES[0], 8)) == answer


@pytest.mark.slow
def test_the_draft_changes_no_text(demo_pair):
    model, tokenizer = demo_pair
    texts = []
    for options in ({}, {"draft_model": model.auxiliary, "num_draft_tokens": 3}):
        conversation = Conversation(model, tokenizer, **options)
        texts.append([text_of(conversation.say(line, 12)) for line in LINES])
    assert texts[0] == texts[1]


def test_a_stopped_answer_stays_and_the_next_turn_is_right(demo_pair):
    model, tokenizer = demo_pair
    conversation = Conversation(model, tokenizer)
    answer = conversation.say(LINES[0], 50)
    begun = next(answer).text + next(answer).text
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": begun}
    history = f"{LINES[0]}\n{begun}" + ("" if begun.endswith("\n") else "\n") + f"{LINES[1]}\n"
    assert text_of(conversation.say(LINES[1], 8)) == kvpred_mlx.generate(
        model, tokenizer, history, max_tokens=8
    )


def test_the_context_ends_the_conversation(demo_pair):
    conversation = Conversation(*demo_pair, context=40)
    assert list(conversation.say("x = 1", 500))[-1].generation_tokens <= 40
    with pytest.raises(
        ValueError, match=r"has \d+ tokens, expected fewer than the model's context of 40: /reset"
    ):
        list(conversation.say("y = 2\n" * 40, 5))
    assert len(conversation.messages) == 2
    conversation.reset()
    assert text_of(conversation.say("x = 1", 2))


def test_in_a_pipe(run):
    said = "x = [1, 2, 3]\n/exact on\ny = 3\n/exact\n/nonsense\n/reset\nz = 4\n/exit\nno"
    code, out, err = run("chat", "-m", 4, stdin=said.encode())
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert out.count("TTFT ") == 3 and out.count("4 tokens, ") == 3
    assert "exact: the base alone" in out and "reset: context cleared" in out
    assert "'/nonsense' is no command" in out and "'/exact' is no command" in out
    assert out.splitlines()[-1] == "bye"


@pytest.mark.variations
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
def test_lines_that_are_no_text_are_passed_over(locale):
    """And in a locale that knows no emoji, one is an emoji."""
    lines = b"def \xff\xfe\n# \xf0\x9f\x99\x82 def f(x):\n/exit\n"
    done = subprocess.run(
        command("chat", "-m", 3), input=lines, capture_output=True, env={**os.environ, **locale}, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode("utf-8", "replace")
    assert (
        shown.count("is not UTF-8 text") == 1 and shown.count("TTFT") == 1 and shown.rstrip().endswith("bye")
    )


def test_the_pipe_may_just_end(run):
    for draft in ("--draft-model", "--draft"):  # its old name
        code, out, _ = run(
            "chat", "--model", "pycode", "-m", 2, draft, "auxiliary", "--exact", stdin=b"x = 1\n"
        )
        assert code == 0 and out.count("TTFT ") == 1 and out.endswith("bye\n")


def test_a_history_that_is_too_long_is_said(run):
    context = context_length(read_base_config(DEMO_PAIR))
    code, out, _ = run("chat", "-m", 2, stdin=("x = 1;" * context + "\ny = 2\n").encode())
    assert code == 0
    assert f"expected fewer than the model's context of {context}" in out and out.count("TTFT ") == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--draft", "x"], ["--draft", "'x', expected auxiliary"]),
        (["--draft-model", "x"], ["--draft-model", "'x', expected auxiliary"]),
        (["--xtc-threshold", "2"], ["--xtc-threshold"]),
    ],
)
def test_wrong_usage(run, arguments, parts):
    fails(run("chat", *arguments), 2, *parts)


def test_names_and_defaults():
    """mlx-lm's, but for those that make no sense for a pair."""
    wanted = {
        a.option_strings[0]: a.default for a in mlx_lm.chat.setup_arg_parser()._actions if a.dest != "help"
    }
    ours = {p.opts[0]: p.default for p in typer.main.get_command(app).commands["chat"].params}
    assert wanted.keys() - ours.keys() == {"--adapter-path", "--pipeline"}
    assert ours["--model"] is None  # the bundled pair
    assert {n for n, d in wanted.items() if n in ours and str(ours[n]) != str(d)} == {"--model"}


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *arguments):
        self._fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command("chat", *arguments), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.seen = b""

    def expect(self, pattern, seconds=120):
        """Read until `pattern` has been shown since the last call."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern.encode(), self.seen)):
            assert time.monotonic() < until, f"no {pattern!r} in {self.seen!r}"
            if select.select([self._fd], [], [], 0.5)[0]:
                self.seen += os.read(self._fd, 4096)
        self.seen = self.seen[found.end() :]

    def shows(self, pattern, seconds=2):
        """Whether `pattern` is shown within a short time."""
        try:
            self.expect(pattern, seconds)
        except AssertionError:
            return self.process.poll() is not None  # what has ended shows nothing any more
        return True

    def type(self, text):
        os.write(self._fd, text.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def test_on_a_terminal_ctrl_c_interrupts_the_answer_only():
    terminal = Terminal("-m", "400")
    try:
        terminal.expect("/exit")
        terminal.expect(READY)
        terminal.type("def read(path):\n")
        terminal.expect(r"\(path\):")
        terminal.expect("[a-z_]{3}")  # the answer has begun, and has most of 400 tokens to go
        os.killpg(terminal.process.pid, signal.SIGINT)
        terminal.expect("interrupted")
        terminal.expect(READY)
        while not terminal.shows("/exit ends the chat"):
            # A signal that comes while readline still writes the prompt waits for the next key.
            os.killpg(terminal.process.pid, signal.SIGINT)
        terminal.type("/exact on\n")
        terminal.expect("exact: the base alone")
        terminal.type("/exit\n")
        terminal.expect("bye")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
