"""Turns a SentencePiece model into the files of a Hugging Face fast tokenizer, id for id."""

import json
import math
import random
import struct
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
MODEL_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
SPACE = "\u2581"  # stands for a blank inside pieces
APART, JOINT = "\U000e0ffe", "\U000e0fff"  # unassigned code points which end a grapheme


def convert_sentencepiece(model_file: Path, output_dir: Path, add_bos: bool = True) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` for `model_file` into `output_dir`.

    Without special tokens the written tokenizer gives the ids of `SentencePieceProcessor.encode`.
    With them it puts BOS first, if `add_bos` and the model has one.  As in SentencePiece, text which
    spells a control symbol ("<s>") stays ordinary text: a chat template cannot write one
    (`split_special_tokens=False` at load gives that back, at the price of exactness).

    Known to differ, each on rare texts:
      - unigram models, where two splits have the same score: SentencePiece adds in single precision,
      - models with a charsmap, on U+E0FFE, U+E0FFF and unusual sequences of combining marks,
      - BPE models with a dummy prefix, on a text which is one user-defined symbol of several
        characters and nothing else: it gets no prefix.
    Decoding writes unknown and control symbols by their names, SentencePiece as " ⁇ " and "".

    Raises FileNotFoundError without `model_file`, and ValueError if it is not a SentencePiece model,
    is of a kind which cannot be kept exact, or encodes one of a few hundred sample texts differently.
    """
    proto = _read_model(model_file)
    _refuse_unsupported(proto)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    rules = _charsmap_rules(proto.normalizer_spec.precompiled_charsmap)
    tokenizer = _build_tokenizer(proto, rules)
    if add_bos and processor.bos_id() >= 0:
        bos = proto.pieces[processor.bos_id()].piece
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, processor.bos_id())]
        )
    _check_same_ids(processor, tokenizer, _sample_texts(proto, rules), is_unigram=_kind(proto) == "UNIGRAM")
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output_dir / "tokenizer.json"))
    config = _tokenizer_config(proto, processor)
    (output_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_model(model_file: Path) -> Any:
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model_file.read_bytes())
    except DecodeError:
        raise ValueError(f"{model_file} is not a SentencePiece model") from None
    if not proto.pieces or not proto.IsInitialized():
        raise ValueError(f"{model_file} is not a SentencePiece model")
    return proto


def _kind(proto: Any) -> str:
    return MODEL_TYPES.get(proto.trainer_spec.model_type, str(proto.trainer_spec.model_type))


def _refuse_unsupported(proto: Any) -> None:
    characters = {piece.piece for piece in proto.pieces if len(piece.piece) == 1}
    normal = [piece for piece in proto.pieces if piece.type == NORMAL and len(piece.piece) > 1]
    has_ties = len({piece.score for piece in normal}) < len(normal)
    found = {
        f"model type {_kind(proto)}": _kind(proto) not in ("UNIGRAM", "BPE"),
        "treat_whitespace_as_suffix": proto.trainer_spec.treat_whitespace_as_suffix,
        "a denormalizer": bool(proto.denormalizer_spec.precompiled_charsmap),
        "unused pieces": any(piece.type == UNUSED for piece in proto.pieces),
        "characters which are no pieces": not all(characters.issuperset(piece.piece) for piece in normal),
        "BPE pieces of the same score": _kind(proto) == "BPE" and has_ties,
    }
    for feature, is_found in found.items():
        if is_found:
            raise ValueError(f"cannot convert a SentencePiece model with {feature} and keep its ids")


def _build_tokenizer(proto: Any, rules: dict[str, str]) -> Tokenizer:
    spec, is_bpe = proto.normalizer_spec, _kind(proto) == "BPE"
    # Characters need no added token, since no merge takes them up; the unigram model scores symbols.
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    added = [symbol for symbol in symbols if is_bpe and len(symbol) > 1]
    tokenizer = Tokenizer(_bpe_model(proto) if is_bpe else _unigram_model(proto))
    tokenizer.normalizer = _normalizer(spec, rules, symbols, added)
    for symbol in added:
        if tokenizer.normalizer.normalize_str(symbol) != symbol:
            raise ValueError(f"user-defined symbol {symbol!r} is changed by the model's own normalization")
    unknown_characters = None if is_bpe else _unknown_characters(proto)
    if unknown_characters:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(unknown_characters), "isolated")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    tokenizer.add_tokens([AddedToken(symbol, normalized=True, special=False) for symbol in added])
    return tokenizer


def _bpe_model(proto: Any) -> models.BPE:
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    normal = [piece for piece in proto.pieces if piece.type == NORMAL]
    parts = {piece.piece for piece in normal}
    merges: list[tuple[str, str]] = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        if not any(symbol in piece.piece for symbol in symbols):  # user-defined symbols never merge
            merges += _splits(piece.piece, parts)
    return models.BPE(
        vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
        merges=merges,
        unk_token=next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _splits(piece: str, parts: set[str]) -> Iterable[tuple[str, str]]:
    # SentencePiece merges the leftmost pair which gives the piece, however it is split; here one split
    # goes before the other.  In a run of one character the longer part stands on the left, so it is first.
    for cut in range(len(piece) - 1, 0, -1):
        if piece[:cut] in parts and piece[cut:] in parts:
            yield piece[:cut], piece[cut:]


def _unigram_model(proto: Any) -> models.Unigram:
    scores = [piece.score for piece in proto.pieces if piece.type == NORMAL]
    hidden = max(len(piece.piece) for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL, BYTE))
    # Control and byte pieces are matched in text here, unlike in SentencePiece: any other way is better.
    lowest = (hidden + 1) * (min(scores) - 10.0)
    vocab = []
    for piece in proto.pieces:
        score = piece.score if piece.type == NORMAL else lowest
        if piece.type == USER_DEFINED:
            score = 0.1 * (len(piece.piece.encode()) - 1)  # the bonus which SentencePiece gives a symbol
        vocab.append((piece.piece, score))
    unk_id = next(index for index, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    return models.Unigram(vocab, unk_id, proto.trainer_spec.byte_fallback)


def _unknown_characters(proto: Any) -> str | None:
    # Unknown characters split the text anyway; cutting there keeps a control piece from spanning them.
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    known = [piece.piece for piece in proto.pieces if piece.type == NORMAL] + symbols
    characters = {piece for piece in known if len(piece) == 1}
    if all(characters.issuperset(piece.piece) for piece in proto.pieces):
        return None
    whole = sorted((symbol for symbol in symbols if not characters.issuperset(symbol)), key=len, reverse=True)
    alternatives = [_escape(symbol) for symbol in whole]
    no_symbol = f"(?!{'|'.join(alternatives)})" if whole else ""
    run = "" if proto.trainer_spec.byte_fallback else "+"  # without bytes, a run is one unknown token
    return "|".join([*alternatives, f"(?:{no_symbol}[^{_escape(characters)}]){run}"])


def _normalizer(
    spec: Any, rules: dict[str, str], symbols: list[str], added: list[str]
) -> normalizers.Normalizer:
    prefix = _dummy_prefix(added) if spec.add_dummy_prefix else []
    charsmap = _charsmap_steps(spec.precompiled_charsmap, rules, symbols) if rules else []
    escape = [normalizers.Replace(" ", SPACE)] if spec.escape_whitespaces else []
    if not spec.remove_extra_whitespaces:
        return normalizers.Sequence([*prefix, *charsmap, *escape])
    collapse = [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    last = SPACE if spec.escape_whitespaces else " "
    strip = normalizers.Replace(Regex(rf"{last}+\z"), "")
    return normalizers.Sequence([*charsmap, *collapse, *prefix, *escape, strip])


def _dummy_prefix(added: list[str]) -> list[normalizers.Normalizer]:
    if not added:
        return [normalizers.Prepend(" ")]
    # An added token is looked up the way it is normalized itself, so no prefix goes before one alone.
    alone = "|".join(_escape(symbol) for symbol in added)
    return [
        normalizers.Prepend(JOINT),
        normalizers.Replace(Regex(rf"\A{JOINT}(?=(?:{alone})\z)"), ""),
        normalizers.Replace(Regex(rf"\A{JOINT}"), " "),
    ]


def _charsmap_steps(
    charsmap: bytes, rules: dict[str, str], symbols: list[str]
) -> list[normalizers.Normalizer]:
    # Precompiled looks up a grapheme by its shortest rule, SentencePiece takes the longest one at each place.
    # So give it single characters, and let NFC compose the characters which rules join, and only those.
    before: dict[str, set[str]] = defaultdict(set)
    for key in rules:
        for left, right in pairwise(key):
            before[right].add(left)
    # A user-defined symbol which the rules would change is a private code point meanwhile.
    changed = sorted(
        (symbol for symbol in symbols if any(char in rules for char in symbol)), key=len, reverse=True
    )
    stand_ins = {symbol: chr(0x10FFFD - index) for index, symbol in enumerate(changed)}
    return [
        *(normalizers.Replace(symbol, char) for symbol, char in stand_ins.items()),
        normalizers.Replace(Regex(_unjoined_places(before)), APART),
        normalizers.NFC(),
        normalizers.Replace(Regex(rf"(?<=[\s\S])(?=[{_escape([JOINT, *before])}])"), JOINT),
        normalizers.Precompiled(charsmap),
        normalizers.Replace(JOINT, ""),
        normalizers.NFC(),
        normalizers.Replace(APART, ""),
        *(normalizers.Replace(char, symbol) for symbol, char in stand_ins.items()),
    ]


def _unjoined_places(before: dict[str, set[str]]) -> str:
    """Matches between two characters which follow each other in no rule and could be one grapheme."""
    same: dict[frozenset[str], list[str]] = defaultdict(list)
    for right, lefts in before.items():
        same[frozenset(lefts)].append(right)
    places = [rf"(?=[^\x20-\x7e{_escape(before)}])"]  # printable ASCII starts a grapheme anyway
    places += [f"(?=[{_escape(rights)}])(?<![{_escape(lefts)}])" for lefts, rights in same.items()]
    return rf"(?<=[\s\S])(?:{'|'.join(places)})"


def _escape(characters: Iterable[str]) -> str:
    return "".join(rf"\x{{{ord(character):x}}}" for character in characters)


def _charsmap_rules(charsmap: bytes) -> dict[str, str]:
    """Lists the rules of a precompiled charsmap: <size of trie><Darts double array><values>."""
    if not charsmap:
        return {}
    (size,) = struct.unpack_from("<I", charsmap)
    units, values = struct.unpack_from(f"<{size // 4}I", charsmap, 4), charsmap[4 + size :]
    children = defaultdict(list)  # by the base of the parent, which is a child's place less its label
    for place, unit in enumerate(units):
        if unit & 0x800000FF == unit & 0xFF != 0:
            children[place ^ unit & 0xFF].append(place)
    rules: dict[str, str] = {}
    pending = [(0, b"")]
    while pending:
        place, key = pending.pop()
        base = place ^ (units[place] >> 10) << ((units[place] & 0x200) >> 6)
        if units[place] & 0x100:  # a rule ends here, and the place of its value is in the leaf at the base
            start = units[base] & 0x7FFFFFFF
            rules[key.decode()] = values[start : values.index(b"\0", start)].decode()
        pending += [(child, key + bytes([units[child] & 0xFF])) for child in children[base]]
    return rules


def _sample_texts(proto: Any, rules: dict[str, str]) -> list[str]:
    pieces = [piece.piece for piece in proto.pieces]
    texts = ["", " ", "  a  b  ", "\ta\r\n\r\nb\n", "\0", f"{SPACE}a {SPACE}", "e\u0301"]
    texts += ["<0x0A>", *(f"a{piece.piece} b" for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL))]
    texts += [" " * length + "x" for length in range(1, 40)]
    texts += [f"x{piece.piece} {piece.piece}" for piece in proto.pieces if piece.type == USER_DEFINED]
    keys = [key for key in rules if key < "\U00010000"]
    texts += keys[:: len(keys) // 100 + 1]
    rng = random.Random(0)
    for _ in range(200):
        texts.append("".join(rng.choices(pieces, k=rng.randint(1, 8))))
        texts.append("".join(chr(rng.choice((rng.randrange(128), rng.randrange(0xD800)))) for _ in range(8)))
    return texts


def _check_same_ids(
    processor: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer, texts: list[str], is_unigram: bool
) -> None:
    tokenizer.encode_special_tokens = True  # not saved: the tokenizer's configuration says so too
    for text in texts:
        ours, theirs = tokenizer.encode(text, add_special_tokens=False).ids, processor.encode(text)
        scores = [sum(map(processor.get_score, ids)) for ids in (ours, theirs)]
        is_tie = (
            is_unigram and math.isclose(*scores, rel_tol=1e-6) and not any(map(processor.is_control, ours))
        )
        if ours != theirs and not is_tie:
            raise ValueError(f"the converted tokenizer differs from SentencePiece on the text {text!r}")


def _tokenizer_config(proto: Any, processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
        "pad_token": processor.pad_id(),
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,  # "<s>" in a text is text
        "clean_up_tokenization_spaces": False,
        **{name: proto.pieces[index].piece for name, index in ids.items() if index >= 0},
    }
