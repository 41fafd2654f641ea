"""`kvpred-mlx generate` has mlx-lm's flags: same names, same defaults, same text for the same command line."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module

import mlx.core as mx
import mlx_lm.utils
import pytest
import typer.main
from conftest import fails
from mlx_lm import cache_prompt
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvpred_mlx import load
from kvpred_mlx.cli import app
from kvpred_mlx.cli.generate import EPILOG
from kvpred_mlx.cli.prompt import ChatTemplate
from kvpred_mlx.generation.stream import encode
from kvpred_mlx.pair.loading import context_length, read_base_config
from kvpred_mlx.pair.locating import DEMO_PAIR

generation = import_module("mlx_lm.generate")  # mlx_lm's function of that name hides it
FUNCTION = (DEMO_PAIR / "prompt.txt").read_text()
TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}\n    def {{ name or 'peek' }}(self):\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat_pair(tmp_path_factory):
    """The bundled pair with a chat template."""
    path = shutil.copytree(DEMO_PAIR, tmp_path_factory.mktemp("chat") / "pair")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def draft_model(tmp_path_factory, demo_pair):
    """The bundled pair's auxiliary as a model of its own."""
    path = tmp_path_factory.mktemp("draft") / "model"
    path.mkdir()
    model, tokenizer = demo_pair
    config = json.loads((DEMO_PAIR / "config.json").read_text())
    mlx_lm.utils.save_model(path, model.auxiliary)
    quantization = {name: config[name] for name in ("quantization",) if name in config}
    mlx_lm.utils.save_config(config["auxiliary"] | quantization, path / "config.json")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def theirs(monkeypatch, capsys):
    """Run one of mlx-lm's own commands in this process; what it prints."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["mlx_lm", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def cached(tmp_path, theirs):
    """A prompt cache of `FUNCTION` as mlx-lm's `cache_prompt` makes it."""

    def make(pair, *arguments):
        file = tmp_path / "cache.safetensors"
        options = ("--model", pair, "--prompt", FUNCTION, "--prompt-cache-file", file)
        theirs(cache_prompt.main, *options, *arguments)
        return file

    return make


def test_names_and_defaults():
    parser = generation.setup_arg_parser()
    wanted = {a.option_strings[0]: a.default for a in parser._actions if a.dest != "help"}
    ours = {p.opts[0]: p.default for p in typer.main.get_command(app).commands["generate"].params}
    missing = wanted.keys() - ours.keys()
    assert missing == {"--adapter-path", "--image", "--quantize-activations"}
    assert all(name in EPILOG for name in missing)
    assert wanted.pop("--prompt") == "hello" and ours["--prompt"] is None  # ours has to be given
    different = {n for n, d in wanted.items() if n in ours and str(ours[n] or None) != str(d or None)}
    assert different == set()


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        (["--extra-eos-token", "a", "b", "-p", "x"], ["a", "b"]),
        (["--extra-eos-token=a", "--extra-eos-token", "-1", "--extra-eos-token", "b"], ["a", "-1", "b"]),
    ],
)
def test_several_tokens_after_one_flag(words, tokens):
    command = typer.main.get_command(app).commands["generate"]
    assert list(command.make_context("generate", words).params["extra_eos_token"]) == tokens


@pytest.fixture(scope="module")
def sampled(chat_pair):
    """Options with which the slightest change shows in the text."""
    return ["--model", chat_pair, "-p", FUNCTION, "-m", 12, "--verbose", "False", "--temp", 1, "--seed", 3]


@pytest.fixture(scope="module")
def without_flags():
    """The text with none but those, once it is known."""
    return {}


@pytest.mark.variations(2)
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (["--temp", 0], True),
        (["--xtc-probability", 1, "--xtc-threshold", 0.01], True),
        (["--extra-eos-token", "self", "\u2581the"], True),
        (["--system-prompt", "import os\\nimport sys"], True),
        (["--prefill-response", "    def clear(self):\n        self"], True),
        (["--chat-template-config", '{"name": "pop_all"}'], True),
        (["--ignore-chat-template"], True),
        (["--use-default-chat-template"], False),
        (["--trust-remote-code"], False),
        (["--kv-bits", 2, "--kv-group-size", 32, "--quantized-kv-start", 0], True),
    ],
)
def test_the_text_is_mlx_lm_s(run, theirs, sampled, without_flags, options, changes):
    """With the same flags; and each of them that should change the text does."""
    code, text, err = run("generate", *sampled, *options)
    assert (code, err) == (0, "")
    assert text == theirs(generation.main, *sampled, *options)
    if not without_flags:
        without_flags["text"] = run("generate", *sampled)[1]
    assert (text != without_flags["text"]) == changes


def test_verbose(run):
    answer = run("generate", "-p", "x", "-m", 3, "--verbose", "f")[1]
    assert "=====" not in answer and "TTFT" not in answer
    for value in ("True", "T", "yes"):  # mlx-lm: all but false and f
        out = run("generate", "-p", "x", "-m", 3, "--verbose", value)[1]
        assert out.startswith(f"{'=' * 10}\n{answer}{'=' * 10}\nPrompt: 2 tokens") and "TTFT" in out


@pytest.mark.slow
def test_another_draft_model(run, theirs, draft_model, chat_pair, tmp_path):
    common = ["--model", chat_pair, "-p", FUNCTION, "-m", 12, "--verbose", "F", "--num-draft-tokens", 2]
    plain = run("generate", *common)[1]
    for draft in (draft_model, "auxiliary"):
        assert run("generate", *common, "--draft-model", draft)[1] == plain
    assert theirs(generation.main, *common, "--draft-model", draft_model) == plain
    fails(run("generate", *common, "--draft-model", DEMO_PAIR), 1, "expected a single model")
    fails(run("generate", *common, "--draft-model", tmp_path / "none"), 1, "no such directory")
    (draft_model / "tokenizer.json").rename(tmp_path / "kept")
    (draft_model / "tokenizer_config.json").unlink()
    fails(run("generate", *common, "--draft-model", draft_model), 1, "no tokens", "expected 4096")


def test_what_has_no_effect_without_a_template_is_said(run):
    options = ["--prefill-response", "x", "--system-prompt", "y", "--chat-template-config", '{"z": 1}']
    code, _, err = run("generate", "-p", "x", "-m", 1, *options, "--use-default-chat-template")
    assert code == 0 and "changes nothing" in err
    assert all(option in err for option in (*options[::2], "--use-default-chat-template"))
    code, _, err = run("generate", "-p", "x", "-m", 1)
    assert code == 0 and "changes nothing" not in err


def test_the_default_template():
    """Of a tokenizer's class, as old ones have it."""
    tokenizer = mlx_lm.utils.load_tokenizer(DEMO_PAIR)
    raw = ChatTemplate(use_default=True).encode(tokenizer, FUNCTION)
    assert raw == tokenizer.encode(FUNCTION)
    tokenizer.default_chat_template = TEMPLATE
    assert ChatTemplate().encode(tokenizer, FUNCTION) == raw
    shown = tokenizer.decode(ChatTemplate(use_default=True).encode(tokenizer, FUNCTION))
    assert shown.startswith("# user") and shown.endswith("def peek(self):\n")
    tokenizer.chat_template = "{{ 'its own' }}"
    assert tokenizer.decode(ChatTemplate(use_default=True).encode(tokenizer, FUNCTION)) == "its own"


@pytest.mark.parametrize("config", ["{", "[1]", "x"])
def test_a_template_config_that_is_no_object(run, config):
    fails(run("generate", "-p", "x", "--chat-template-config", config), 2, "--chat-template-config", "object")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 8])
def test_a_prompt_goes_on_from_a_cache_file(run, theirs, cached, bits):
    """The model is the one that made the file; the text is mlx-lm's, with our own options too."""
    file = cached(DEMO_PAIR, *(["--kv-bits", bits, "--quantized-kv-start", 0] if bits else []))
    common = ["--prompt-cache-file", file, "-p", "\n\n\nstack = Stack()\nstack", "-m", 12, "--verbose", "F"]
    expected = theirs(generation.main, *common)
    for options in (
        [],
        ["--model", "pycode", "--draft-model", "auxiliary"],
        ["--repair", "--exact-last", 0.5],
    ):
        assert run("generate", *common, *options) == (0, expected, "")
    assert run("generate", *common[2:])[1] != expected


@pytest.mark.slow
def test_a_chat_goes_on_from_a_cache_file(run, theirs, cached, chat_pair, tmp_path):
    file = cached(chat_pair)
    common = ["--prompt-cache-file", file, "-p", "\n\n\nstack = Stack()", "-m", 12]
    assert run("generate", *common, "--verbose", "F")[1] == theirs(generation.main, *common, "--verbose", "F")
    # A cache of the prompt's beginning and the rest are the whole prompt.
    counts = [
        json.loads(run("generate", "--model", chat_pair, *given, "-m", 1, "--json")[1])["prompt_tokens"]
        for given in (common[:4], ["-p", FUNCTION + "\n\n\nstack = Stack()"])
    ]
    assert counts[0] + load_prompt_cache(str(file))[-1].size() == counts[1]
    begun = run("generate", *common, "--prefill-response", "import")[1]  # the question is still there
    whole = [
        "--model",
        chat_pair,
        "-p",
        FUNCTION + "\n\n\nstack = Stack()",
        "-m",
        16,
        "--prefill-response",
        "import",
    ]
    assert begun.splitlines()[1] == run("generate", *whole)[1].splitlines()[1]
    (chat_pair / "chat_template.jinja").rename(tmp_path / "template")
    (chat_pair / "chat_template.jinja").write_text("# {{ messages[-1].content | length }}\n")
    try:
        fails(run("generate", *common), 1, "--prompt-cache-file needs --ignore-chat-template")
    finally:
        (tmp_path / "template").rename(chat_pair / "chat_template.jinja")


def test_a_cache_file_without_notes(run, demo_pair, tmp_path):
    """As `save_prompt_cache` writes it when it is given none."""
    model, tokenizer = demo_pair
    cache, file = model.make_cache(), tmp_path / "plain.safetensors"
    model(mx.array([tokenizer.encode(FUNCTION)]), cache=cache)
    save_prompt_cache(str(file), cache)
    code, out, err = run("generate", "--prompt-cache-file", file, "-p", "x", "-m", 2)
    assert code == 0 and "Prompt: 2 tokens" in out and "bundled" in err


def test_cache_files_that_are_refused(run, demo_pair, golden_pair, tmp_path, cached, draft_model):
    model, file = demo_pair[0], tmp_path / "file.safetensors"
    generate = ["generate", "-p", "x", "-m", 1, "--prompt-cache-file"]
    fails(run(*generate, tmp_path / "none"), 1, "none: no such file")
    file.write_bytes(b"damaged")
    fails(run(*generate, file), 1, str(file), "not a prompt cache")
    mx.save_safetensors(str(file), {"a": mx.zeros(1)})
    fails(run(*generate, file), 1, str(file), "not a prompt cache")
    single = make_prompt_cache(model.base)
    model.base(mx.array([[1, 2, 3]]), cache=single)
    save_prompt_cache(str(file), single)
    fails(run(*generate, file), 1, "of a single model, expected a pair's")
    other = load(golden_pair)[0]
    cache = other.make_cache()
    other(mx.array([[1] * 40]), cache=cache)
    save_prompt_cache(str(file), cache)
    fails(run(*generate, file), 1, "the prompt cache of another model")

    file = cached(DEMO_PAIR, "--kv-bits", 4, "--quantized-kv-start", 0)
    fails(run(*generate, file, "--model", draft_model), 1, "expected 'kvpred'")
    fails(run(*generate, file, "--kv-bits", 8), 2, "--kv-bits", "8, expected 4")
    fails(run(*generate, file, "--kv-group-size", 32), 2, "--kv-group-size", "32, expected 64")
    fails(run(*generate, file, "--draft-model", draft_model), 2, "--draft-model auxiliary")
    copy = shutil.copytree(DEMO_PAIR, tmp_path / "copy")
    fails(run(*generate, file, "--model", copy), 2, "was made with", str(DEMO_PAIR))
    room = context_length(read_base_config(DEMO_PAIR)) - load_prompt_cache(str(file))[-1].size()
    generate[2] = "x " * room
    fails(run(*generate, file), 2, "in the prompt cache, expected fewer than the model's context")


@pytest.mark.variations
@pytest.mark.parametrize("draft", [[], ["--draft-model", "auxiliary"]])
def test_until_the_answer_ends(run, draft):
    """-1, as in mlx-lm; with a draft, too."""
    code, out, err = run(
        "generate", "-p", FUNCTION, "-m", -1, "--extra-eos-token", "\n", "--verbose", "F", *draft
    )
    assert code == 0 and out.count("\n") <= 1, err
    assert out == run("generate", "-p", FUNCTION, "-m", 200, "--extra-eos-token", "\n", "--verbose", "F")[1]


def test_a_prompt_that_begins_with_a_bos_gets_no_second(demo_pair):
    """Where the tokenizer takes it for one; that of the bundled pair takes it for text."""

    class Parsing:
        bos_token_id = 1

        def encode(self, text):
            return [1, *(1 if word == "<s>" else 7 for word in text.split())]

    wrapped = object.__new__(TokenizerWrapper)
    wrapped._tokenizer = Parsing()
    assert encode(wrapped, "x") == encode(wrapped, "<s> x") == [1, 7]
    assert encode(wrapped, "") == encode(wrapped, "<s>") == [1]
    tokenizer = demo_pair[1]
    assert encode(tokenizer, "x = 1")[0] == tokenizer.bos_token_id
    assert encode(tokenizer, "<s>x") == tokenizer.encode("<s>x")
