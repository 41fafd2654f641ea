"""Numbers out of their range: one line that names what was given and what was expected."""

from __future__ import annotations

import pytest
from conftest import fails
from mlx_lm.models.cache import RotatingKVCache
from pairs import make_pair
from test_making import write_model

from kvpred_mlx import save, stream_generate
from kvpred_mlx.bench.evaluate.settings import EvaluationSettings
from kvpred_mlx.bench.front.settings import FrontSettings
from kvpred_mlx.bench.ttft.settings import BenchSettings
from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.generation.checks import check_quantized_cache
from kvpred_mlx.making.data import PackedSequences
from kvpred_mlx.making.pairing import join_first_layers, load_part
from kvpred_mlx.making.quality import measure
from kvpred_mlx.making.settings import FitSettings, TrainingSettings
from kvpred_mlx.making.windows import cut_windows
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.serving.settings import ServerSettings
from kvpred_mlx.taps.kv_taps import KVTaps

NAN = float("nan")
LENGTHS = {"prompt_lens": [64]}


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (FitSettings, {"tokens": "a"}, "tokens is 'a', expected a whole number, at least 1"),
        (FitSettings, {"seed": -1}, "seed is -1, expected 0 or more"),
        (TrainingSettings, {"iters": 1.5}, "iters is 1.5, expected a whole number, at least 1"),
        (TrainingSettings, {"end_learning_rate": 2}, "end_learning_rate is 2, expected 0 to 1"),
        (BenchSettings, {"prompt_lens": []}, r"prompt_lens is \[\], expected at least one"),
        (BenchSettings, {"prompt_lens": [64, 1]}, "prompt_lens is 1, expected at least 2"),
        (BenchSettings, LENGTHS | {"trials": 0}, "trials is 0, expected at least 1"),
        (FrontSettings, LENGTHS | {"budgets": [0.1, 2]}, "budgets is 2, expected 0 to 1"),
        (
            FrontSettings,
            LENGTHS | {"methods": ["magic"]},
            r"methods \['magic'\], expected some of .*dial-last",
        ),
        (FrontSettings, LENGTHS | {"questions": -1}, "questions is -1, expected 0 or more"),
        (EvaluationSettings, {"tasks": []}, r"tasks are \[\]"),
        (EvaluationSettings, {"tasks": ["triviaqa"], "temp": NAN}, "temp is nan, expected 0 or more"),
        (
            EvaluationSettings,
            {"tasks": ["triviaqa"], "num_samples": 3},
            "num_samples is 3, expected 0, or at least 10",
        ),
        (ServerSettings, {"port": 70_000}, "port is 70000, expected 0 to 65535"),
        (ServerSettings, {"top_p": 2.0, "max_tokens": 0}, "top_p is 2.0, expected 0 to 1"),
    ],
)
def test_settings(settings, given, message):
    with pytest.raises(ValueError, match=message):
        settings(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1, or -1"),
        ({"max_tokens": -2}, "max_tokens is -2, expected at least 1, or -1"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0, expected at least 1"),
        ({"max_kv_size": 3}, "max_kv_size is 3, expected at least 8"),
        ({"num_draft_tokens": 1.5}, "num_draft_tokens is 1.5, expected a whole number"),
        ({"quantized_kv_start": -1}, "quantized_kv_start is -1, expected 0 or more"),
        ({"kv_bits": 7}, "kv_bits is 7, expected 2, 3, 4, 6 or 8"),
        ({"kv_bits": True}, "kv_bits is True"),
        (
            {"kv_bits": 8, "kv_group_size": 0},
            "kv_group_size is 0, expected 32, 64 or 128",
        ),  # MLX divides by it
        ({"kv_bits": 8, "max_kv_size": 64}, "kv_bits is 8 and max_kv_size 64, expected one of the two"),
        (
            {"kv_bits": 8, "prompt_cache": [RotatingKVCache(64)]},
            "kv_bits is 8, but the cache of .* is a window",
        ),
    ],
)
def test_generation(demo_pair, given, message):
    with pytest.raises(ValueError, match=message):
        next(stream_generate(*demo_pair, [1, 2, 3], **given))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("qwen3", "heads of qwen3 are 16 wide, expected no --kv-bits: no group fits"),
        ("gemma3_text", "kv_bits is 8, but the cache of gemma3_text is a window"),
    ],
)
def test_models_without_a_quantized_cache(base, message):
    with pytest.raises(ValueError, match=message):
        check_quantized_cache(make_pair(base), 8, 32)


def test_an_attention_that_takes_no_quantized_cache(demo_pair, monkeypatch):
    base = type(demo_pair[0].base)
    whole = base.__call__

    def call(self, tokens, cache=None):
        if any(hasattr(c, "bits") for c in cache or []):
            raise AttributeError("no keys")
        return whole(self, tokens, cache=cache)

    monkeypatch.setattr(base, "__call__", call)
    with pytest.raises(UnsupportedModelError, match="cannot compute with a quantized cache: no keys"):
        check_quantized_cache(demo_pair[0], 8, 32)


def test_windows_and_sequences(demo_pair):
    ids = [list(range(100))]
    for given, message in (
        ((0, 8), "prompt_tokens is 0"), ((8, 0), "score_tokens is 0"), ((8, 8, None, 0), "most is 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{message}, expected at least 1"):
            cut_windows(ids, *given)
    with pytest.raises(ValueError, match="length is -1, expected at least 1"):
        PackedSequences.of(ids, -1, None)
    with pytest.raises(
        ValueError, match="batch_size is 0, expected at least 1; seed is -1, expected 0 or more"
    ):
        measure(demo_pair[0], cut_windows(ids, 16, 8), batch_size=0, seed=-1)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["generate", "-p", "x", "--kv-bits", 7], ["--kv-bits", "7", "2, 3, 4, 6 or 8"]),
        (
            ["generate", "-p", "x", "--kv-bits", 8, "--kv-group-size", 0],
            ["--kv-group-size", "0", "32, 64 or 128"],
        ),
        (["serve", "--kv-bits", 8, "--kv-group-size", 16], ["--kv-group-size", "16", "32, 64 or 128"]),
        (["generate", "-p", "x", "--temp", "nan"], ["--temp", "nan"]),
        (["generate", "-p", "x", "--temp", "hot"], ["--temp", "hot"]),
        (["generate", "-p", "x", "--top-p", "nan"], ["--top-p", "nan"]),
        (["chat", "--xtc-threshold", "nan"], ["--xtc-threshold", "nan"]),
        (["generate", "-p", "x", "--temp", "-1"], ["--temp", "-1"]),
        (["generate", "-p", "x", "--seed", -7], ["--seed", "-7"]),
        (["chat", "--seed", 1 << 65], ["--seed", str(1 << 65)]),
        (["bench", "--seed", -7], ["--seed", "-7"]),
        (["serve", "--port", 70_000], ["--port", "70000", "65535"]),
        (["serve", "--top-p", 2.5], ["--top-p", "2.5"]),
        (["fit", "--max-seq-length", -3], ["--max-seq-length", "-3"]),
        (["quality", "--batch-size", 1.5], ["--batch-size", "1.5"]),
    ],
)
def test_options(run, arguments, parts):
    fails(run(*arguments), 2, *parts)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory, demo_pair):
    """A pair whose heads are 16 wide."""
    root = tmp_path_factory.mktemp("narrow")
    base = load_part(str(write_model(root / "base", "qwen3", demo_pair[1])))
    taps = KVTaps(base.model)
    predictor = FirstLayersPredictor([1], taps.input_widths, taps.widths)
    save(root / "pair", join_first_layers(base, predictor, linked=True), base.tokenizer)
    return root / "pair"


@pytest.mark.parametrize("command", [["generate", "-p", "x"], ["serve"]])
def test_groups_that_do_not_fit_the_heads(run, narrow, command):
    fails(
        run(*command, "--model", narrow, "--kv-bits", 8), 1,
        "kv_group_size is 64, but heads of qwen3 are 16 wide, expected no --kv-bits: no group fits",
    )  # fmt: skip


def test_a_window_and_bits(run):
    code, _, err = run("generate", "-p", "x", "--kv-bits", 8, "--max-kv-size", 64)
    assert code == 1 and "kv_bits is 8 and max_kv_size 64, expected one of the two" in err
