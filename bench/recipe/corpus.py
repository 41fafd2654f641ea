"""The bundled pair's corpus: the running interpreter's standard library, with facts planted in it."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from kvpred_mlx.bench.front.recall import RecallTask
from kvpred_mlx.making.data import PackedSequences, encode

LEFT_OUT = ("site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__")
HELD_OUT_MODULES = 12  # one module in so many is never trained on
RECALL_SHARE = 0.35  # of the rows


def modules() -> dict[str, str]:
    """Path and source of the standard library's modules, without tests and tables in the guise of code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not set(relative.parts).intersection(LEFT_OUT):
            try:
                found[relative.as_posix()] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return {name: text for name, text in found.items() if text.strip()}


def is_held_out(module: str) -> bool:
    """Whether a module is kept from training, told by its name: the same in every Python version."""
    return int.from_bytes(blake2b(module.encode(), digest_size=8).digest()) % HELD_OUT_MODULES == 0


def write(folder: Path) -> None:
    """Write `train.jsonl` and `heldout.jsonl`, one module a line."""
    sides: dict[str, list[str]] = {"train.jsonl": [], "heldout.jsonl": []}
    for name, text in modules().items():
        line = json.dumps({"module": name, "text": text})
        sides["heldout.jsonl" if is_held_out(name) else "train.jsonl"].append(line)
    for file, lines in sides.items():
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(file: Path) -> list[str]:
    """The modules of a file that `write` made."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(texts: Sequence[str], path: Path, vocab_size: int) -> None:
    """Train a SentencePiece BPE for source code: newlines, runs of blanks and digits are tokens."""
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    with path.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            user_defined_symbols=["\n"],
            max_sentence_length=100_000,
            minloglevel=2,
        )


def text_rows(tokenizer: Any, texts: Sequence[str], length: int, seed: int) -> PackedSequences:
    """Rows of modules in a random order."""
    shuffled = random.Random(seed).sample(list(texts), len(texts))
    return PackedSequences.of(encode(tokenizer, shuffled), length, tokenizer.eos_token_id)


def repeating_rows(text: PackedSequences, count: int, length: int, seed: int) -> PackedSequences:
    """Rows that teach a small model to look back (induction heads); text alone takes far longer.

    Tokens of the text in a random order, which begin again after 8 to `length / 2` of them.
    """
    draw, tokens = np.random.default_rng(seed), text.rows.ravel()
    periods = draw.integers(8, length // 2, count)
    return PackedSequences(
        np.array([np.resize(draw.choice(tokens, p), length + 1) for p in periods], np.int32)
    )


def recall_rows(tokenizer: Any, texts: Sequence[str], length: int, seed: int) -> PackedSequences:
    """Rows of modules, and rows of text with facts planted that come again."""
    text, task = text_rows(tokenizer, texts, length, seed).rows, RecallTask(tokenizer, texts, seed)
    count = int(len(text) * RECALL_SHARE / (1 - RECALL_SHARE))
    return PackedSequences(np.array([*text, *(task.row(length + 1) for _ in range(count))], np.int32))
