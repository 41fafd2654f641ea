"""The converted tokenizer against SentencePiece itself, read the way mlx-lm reads it."""

import argparse
import inspect
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper, load
from sentencepiece import sentencepiece_model_pb2

from kvpred_mlx.convert.tokenizer import convert_sentencepiece

CORPUS = (
    inspect.getsource(argparse) + inspect.getsource(json.encoder) + "naïve façade, 東京タワー, ½ µm\n" * 40
)
PLAIN: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
CODE: dict[str, Any] = {
    **PLAIN,
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
SYMBOLS = ["<sep>", "<a>", "self", "\t"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": CODE,
    "pycode": {**CODE, "add_dummy_prefix": False, "user_defined_symbols": "\n"},
    "blocks": {**CODE, "add_dummy_prefix": False, "user_defined_symbols": ["\n", "\n\n", "▁▁▁▁", *SYMBOLS]},
    "prefixed symbols": {**CODE, "user_defined_symbols": SYMBOLS},
    "bpe without bytes": {**PLAIN, "model_type": "bpe", "pad_id": 0, "bos_id": -1, "eos_id": 1, "unk_id": 2},
    "bpe nfkc": {"model_type": "bpe", "user_defined_symbols": "\n"},
    "bpe nfkc folded": {
        "model_type": "bpe",
        "normalization_rule_name": "nmt_nfkc_cf",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    },
    "unigram": {**PLAIN, "model_type": "unigram", "byte_fallback": True},
    "unigram nfkc": {"model_type": "unigram"},
    "unigram symbols": {"model_type": "unigram", "add_dummy_prefix": False, "user_defined_symbols": SYMBOLS},
}


def train(**options: Any) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=written,
        vocab_size=700,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return written.getvalue()


class Pair:
    """A SentencePiece model and its conversion."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        model = train(**MODELS[name])
        (folder / "tokenizer.model").write_bytes(model)
        convert_sentencepiece(folder / "tokenizer.model", folder / "converted")
        self.spm = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.converted: TokenizerWrapper = load(folder / "converted")

    def ids(self, text: str) -> list[int]:
        return self.converted.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("tokenizer"))


def unicode_text(rng: random.Random, pair: Pair) -> str:
    ranges = [(0, 0x80), (0, 0x250), (0, 0xD800), (0xE000, 0xE000 + 0x2000), (0x10000, 0x20000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, 24)))


def spelled_text(rng: random.Random, pair: Pair) -> str:
    bits = [
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "▁",
        " ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "a",
        "<",
        "s>",
        "hel",
        "\0",
        "e\u0301",
        "㎏",
    ]
    return "x" + "".join(rng.choices(bits + SYMBOLS, k=rng.randint(1, 12)))


def piece_text(rng: random.Random, pair: Pair) -> str:
    pieces = [pair.spm.id_to_piece(rng.randrange(len(pair.spm))) for _ in range(rng.randint(1, 20))]
    return "".join(piece[rng.choice((0, 0, 1)) :] for piece in pieces).replace("▁", " ")


def code_text(rng: random.Random, pair: Pair) -> str:
    start = rng.randrange(len(CORPUS))
    text = CORPUS[start : start + rng.randint(1, 200)]
    return text.replace("\n", rng.choice(("\n", "\r\n"))).replace("    ", rng.choice(("    ", "\t")))


def repeated_text(rng: random.Random, pair: Pair) -> str:
    letters = rng.choice(("ab", "a", "abc", " \n", "  x", "01", "=-", "()", "se"))
    unit = "".join(rng.choices(letters, k=rng.randint(1, 5)))
    return rng.choice(("", "x", " ")) + unit * rng.randint(1, 60) + rng.choice(("", "x", " ", "\n"))


TEXTS = [unicode_text, spelled_text, piece_text, code_text, repeated_text]


@pytest.mark.variations(12)
@pytest.mark.parametrize("make_text", TEXTS)
def test_ids_are_those_of_sentencepiece(pair: Pair, make_text: Callable[[random.Random, Pair], str]) -> None:
    rng = random.Random(make_text.__name__)
    differ = [
        text for text in (make_text(rng, pair) for _ in range(500)) if pair.ids(text) != pair.spm.encode(text)
    ]
    if pair.name.startswith("unigram"):  # "ll" + "l" and "l" + "ll" have the same score
        differ = [text for text in differ if not is_tie(pair, text)]
    assert differ == []


def is_tie(pair: Pair, text: str) -> bool:
    scores = [sum(map(pair.spm.get_score, ids)) for ids in (pair.ids(text), pair.spm.encode(text))]
    return math.isclose(*scores, rel_tol=1e-6)


@pytest.mark.variations(2)
def test_runs_of_spaces(pair: Pair) -> None:
    for length in range(201):
        for text in (" " * length, "x" + " " * length, " " * length + "x"):
            assert pair.ids(text) == pair.spm.encode(text), length


@pytest.mark.variations(2)
def test_bos_comes_first_by_default(pair: Pair) -> None:
    bos = pair.spm.bos_id()
    expected = [bos] * (bos >= 0) + pair.spm.encode("def f():")
    assert pair.converted.encode("def f():") == expected
    assert pair.converted.bos_token_id == (bos if bos >= 0 else None)


def test_bos_can_be_left_out(tmp_path: Path) -> None:
    model = train(**CODE)
    (tmp_path / "tokenizer.model").write_bytes(model)
    convert_sentencepiece(tmp_path / "tokenizer.model", tmp_path, add_bos=False)
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert load(tmp_path).encode("def f():") == spm.encode("def f():")


def test_eos_is_known(pair: Pair) -> None:
    assert pair.converted.eos_token_ids == {pair.spm.eos_id()}
    assert pair.converted.eos_token == "</s>"
    assert len(pair.converted) == len(pair.spm)


def test_decoding_is_that_of_sentencepiece(pair: Pair) -> None:
    rng = random.Random(3)
    for _ in range(300):
        ids = pair.spm.encode(code_text(rng, pair))
        if pair.spm.unk_id() not in ids:
            assert pair.converted.decode(ids) == pair.spm.decode(ids)


def test_streaming_gives_the_decoded_text(pair: Pair) -> None:
    detokenizer = pair.converted.detokenizer
    assert isinstance(detokenizer, SPMStreamingDetokenizer)
    rng = random.Random(4)
    for make_text in TEXTS * 20:
        ids = pair.ids(make_text(rng, pair).lstrip())  # mlx-lm's own trims a second leading space, too
        detokenizer.reset()
        for token in ids:
            detokenizer.add_token(token)
        detokenizer.finalize()
        assert detokenizer.text == pair.converted.decode(ids)


def test_a_llama_config_beside_it_changes_nothing(pair: Pair) -> None:
    (pair.folder / "converted" / "config.json").write_text('{"model_type": "llama"}')
    assert load(pair.folder / "converted").encode("  <s> x\n", add_special_tokens=False) == pair.spm.encode(
        "  <s> x\n"
    )


def test_spaces_can_stay_unescaped(tmp_path: Path) -> None:
    model = train(**PLAIN, model_type="bpe", byte_fallback=True)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    proto.normalizer_spec.escape_whitespaces = False
    for piece in proto.pieces:
        piece.piece = piece.piece.replace("▁", " ")
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    convert_sentencepiece(tmp_path / "tokenizer.model", tmp_path)
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    converted = load(tmp_path)
    for line in CORPUS.splitlines():
        assert converted.encode(line, add_special_tokens=False) == spm.encode(line)


def test_a_spelled_control_symbol_stays_text(pair: Pair) -> None:
    for text in ("<s>", "</s>", "<unk>", "<0x0A>", "a<s>b</s>"):
        assert pair.ids(text) == pair.spm.encode(text)
        assert not {pair.spm.bos_id(), pair.spm.eos_id()} & set(pair.ids(text))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "char"}, "CHAR"),
        ({"model_type": "word"}, "WORD"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(**options))
    with pytest.raises(ValueError, match=named):
        convert_sentencepiece(tmp_path / "tokenizer.model", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256))])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model$"):
        convert_sentencepiece(tmp_path / "tokenizer.model", tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        convert_sentencepiece(tmp_path / "tokenizer.model", tmp_path)


def test_a_difference_is_an_error_naming_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(**CODE))
    monkeypatch.setattr("kvpred_mlx.convert.tokenizer._splits", lambda piece, parts: [])
    with pytest.raises(ValueError, match="differs from SentencePiece on the text"):
        convert_sentencepiece(tmp_path / "tokenizer.model", tmp_path)
