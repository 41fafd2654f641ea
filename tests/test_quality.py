"""Quality figures, the data that they are taken on, and recall prompts."""

from __future__ import annotations

import re
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from pairs import make_pair

from kvpred_mlx import KVPredictionModel
from kvpred_mlx.bench.front.recall import KINDS, RecallTask
from kvpred_mlx.making import data
from kvpred_mlx.making.card import CardFacts, card_text
from kvpred_mlx.making.estimates import Estimate, Resampling
from kvpred_mlx.making.fit import fit
from kvpred_mlx.making.quality import METRICS, measure, modes_of
from kvpred_mlx.making.settings import FitSettings
from kvpred_mlx.making.windows import cut_windows, prompts_at_once

DOCUMENTS = [np.random.default_rng(i).integers(1, 127, 60 + 7 * i).tolist() for i in range(6)]


@pytest.fixture(scope="module")
def figures():
    pair = make_pair("llama", "qwen2", min_prompt_tokens=2)
    return pair, measure(pair, cut_windows(DOCUMENTS, 20, 5), batch_size=4)


def test_windows_are_cut_from_documents():
    windows = cut_windows(DOCUMENTS, 20, 5, per_document=2)
    assert windows.prompts.shape == (12, 20) and windows.continuations.shape == (12, 5)
    for d, prompt, rest in zip(windows.documents, windows.prompts, windows.continuations, strict=True):
        ids, row = DOCUMENTS[d], [*prompt, *rest]
        assert any(ids[i : i + 25] == row for i in range(len(ids)))
    assert len(cut_windows(DOCUMENTS, 20, 5, most=3)) == 3
    with pytest.raises(ValueError, match="the longest of 6 documents has 95 tokens, expected at least 105"):
        cut_windows(DOCUMENTS, 100, 5)


def test_figures_against_one_prompt_at_a_time(figures):
    pair, quality = figures
    windows = cut_windows(DOCUMENTS, 20, 5)
    by_document: dict[int, list[list[float]]] = {}
    for d, prompt, rest in zip(windows.documents, windows.prompts, windows.continuations, strict=True):
        ids = mx.array(np.concatenate([prompt, rest]))[None]
        exact = pair.base(ids[:, :-1])[:, 19:]
        cache = pair.make_cache()
        pair(ids[:, :19], cache=cache)
        steps = [pair.base(ids[:, i : i + 1], cache=cache[:-1]) for i in range(19, 24)]
        predicted = mx.concatenate(steps, axis=1)
        loss = nn.losses.cross_entropy(predicted, ids[:, 20:]).mean().item()
        same = mx.argmax(predicted, -1) == mx.argmax(exact, -1)
        by_document.setdefault(d, []).append([loss, same.mean().item(), float(same[0, 0].item())])
    loss, agreement, first = np.mean([np.mean(v, axis=0) for v in by_document.values()], axis=0)
    found = quality.modes["predicted"]
    assert found["cross_entropy"].mean == pytest.approx(loss, rel=1e-4)
    assert found["agreement"].mean == pytest.approx(agreement)
    assert found["first_token_agreement"].mean == pytest.approx(first)


def test_what_the_figures_mean(figures):
    _, quality = figures
    exact, nothing = quality.modes["exact"], quality.modes["no prompt"]
    assert exact["agreement"].mean == exact["first_token_agreement"].mean == 1
    assert exact["retention"].mean == pytest.approx(1) and nothing["retention"].mean == pytest.approx(0)
    for estimates in quality.modes.values():
        assert set(estimates) == {*METRICS, "retention"}
        for name in ("cross_entropy", "top1_accuracy", "agreement"):
            assert estimates[name].low <= estimates[name].mean <= estimates[name].high
    assert quality.documents == 6 and quality.windows == len(cut_windows(DOCUMENTS, 20, 5))
    assert all(v <= 1 for part in quality.explained_variance.values() for v in part)


def test_a_perfect_pair_has_perfect_figures():
    made = make_pair("llama", "llama")
    rows = np.random.default_rng(0).integers(1, 127, (64, 33))
    fitted = fit(
        made.base, made.base, data.PackedSequences(rows), FitSettings(source="kv", layer_map="0,1,2,3")
    )
    pair = KVPredictionModel(made.base, made.base, fitted.predictor, min_prompt_tokens=2)
    quality = measure(pair, cut_windows(DOCUMENTS, 20, 5))
    predicted = quality.modes["predicted"]
    assert predicted["agreement"].mean == 1 and predicted["retention"].mean == pytest.approx(1, abs=1e-3)
    assert min(quality.explained_variance["keys"] + quality.explained_variance["values"]) > 0.999


def test_one_document_has_an_interval_too():
    """Of its windows: drawn as a whole it would be the same each time."""
    values = np.array([0.1, 0.5, 0.9, 0.2])
    alone = Estimate.of(Resampling(np.zeros(4, int), seed=0).means(values))
    apart = Estimate.of(Resampling(np.arange(4), seed=0).means(values))
    assert alone == apart and alone.low < alone.mean < alone.high


def test_other_modes_can_be_measured(figures):
    pair, quality = figures
    modes = modes_of(pair)
    again = measure(pair, cut_windows(DOCUMENTS, 20, 5), {**modes, "twice": modes["predicted"]})
    twice, once = (again.modes[name] for name in ("twice", "predicted"))
    assert all(twice[m] == once[m] for m in METRICS if m != "cross_entropy_per_byte")
    assert again.modes["auxiliary"]["cross_entropy"].mean == pytest.approx(
        quality.modes["auxiliary"]["cross_entropy"].mean, rel=1e-4
    )


def test_card_holds_the_figures(figures):
    text = card_text(CardFacts("org/pair", "org/base", "org/aux", ["Made by hand."]), [figures[1]])
    predicted = figures[1].modes["predicted"]["cross_entropy"]
    assert f"{predicted.mean:.3f} ({predicted.low:.3f} to {predicted.high:.3f})" in text
    assert "org/base" in text and "Made by hand." in text


def test_documents_are_read_and_split(tmp_path):
    (tmp_path / "a.txt").write_text("one\n" * 20000)
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    (tmp_path / ".hidden").write_text("no")
    documents = list(data.read_documents(tmp_path))
    assert "".join(documents) == "one\n" * 20000 + "twothree"
    assert max(map(len, documents)) <= data.DOCUMENT_CHARACTERS
    many = [f"document {i}" for i in range(2000)]
    training, held_out = data.split(many)
    assert sorted(training + held_out) == sorted(many) and 60 < len(held_out) < 140
    assert data.split(reversed(many))[1] == held_out[::-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", "not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": 1}\n', r"line 1: no text under 'text', found \['text'\]"),
        ("a.jsonl", b'{"body": "x"}\n', r"line 1: no text under 'text', found \['body'\]"),
        ("a.jsonl", b'{"text": "x"}\n{"te', "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: no text under 'text', found list"),
    ],
)
def test_bad_data(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(data.read_documents(tmp_path / name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_recall_prompts(demo_pair, kind, depth):
    tokenizer = demo_pair[1]
    text = [f"line {i} of some text\n" * 3 for i in range(200)]
    task = RecallTask(tokenizer, text, seed=1)
    question = task.question(kind, 256, depth)
    prompt, answer = tokenizer.decode(question.prompt), tokenizer.decode(question.answer)
    assert len(question.prompt) == 256
    asked = prompt.splitlines()[-1]
    assert f"{asked}{answer}\n" in prompt  # the fact stands in the prompt
    place = prompt.index(f"{asked}{answer}\n") / len(prompt)
    assert abs(place - depth) < 0.2
    assert RecallTask(tokenizer, text, seed=1).question(kind, 256, depth) == question
    for _ in range(10):
        row = task.row(300)
        assert len(row) == 300
        lines = tokenizer.decode(row).splitlines()
        facts = Counter(
            line for line in lines if re.fullmatch(r"# the (pass key|code of \w+ \w+) is \d{4}", line)
        )
        assert facts and max(facts.values()) <= 4 and sum(facts.values()) >= 2 * len(facts)
    with pytest.raises(ValueError, match="20 tokens, expected at least"):
        task.question("key-value", 20, depth)


@pytest.mark.parametrize(("tokens", "prompts"), [(128, 8), (512, 8), (1984, 2), (5000, 1)])
def test_long_prompts_are_read_fewer_at_a_time(tokens, prompts):
    """Eight of 1,984 tokens, read by two models of 1.5 and 0.5 billion parameters, ran out of 24 GB."""
    assert prompts_at_once(tokens) == prompts
