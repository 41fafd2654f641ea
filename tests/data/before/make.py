"""Makes this folder's files with the code of the commit that README.md names; run from a checkout of that commit."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
from families import build
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import save_prompt_cache
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvpred_mlx import ExactPositions, KVPredictionModel, Predictor, save

VOCABULARY, WIDTH, HEAD, SEED = 96, 16, 8, 1


def model(family: str, layers: int):
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": HEAD, "vocab_size": VOCABULARY,
    }  # fmt: skip
    return build(family, sizes, noise=0.5)


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def answer(pair, prompt: mx.array, cache) -> tuple[mx.array, mx.array]:
    """Sixteen greedy tokens, and the log-probabilities that each was chosen by."""
    steps = list(generate_step(prompt, pair, max_tokens=16, prompt_cache=cache))
    return mx.array([token for token, _ in steps]), mx.stack([logprobs for _, logprobs in steps])


def main(folder: Path) -> None:
    base, auxiliary = model("qwen3", 3), model("qwen2", 2)
    width = (HEAD, HEAD)
    predictor = Predictor([0, 0, 1], [width] * 2, [width] * 3)
    pair = KVPredictionModel(base, auxiliary, predictor, 8, ExactPositions(first=2, last=0.2))
    save(folder / "pair", pair, tokenizer())
    prompts = [mx.random.randint(0, VOCABULARY, (n,), key=mx.random.key(SEED)) for n in (40, 24)]
    cache = pair.make_cache()
    expected = {"prompt": prompts[0], "second_prompt": prompts[1], "teacher_forced": pair(prompts[0][None])}
    expected["answer"], expected["answer_logprobs"] = answer(pair, prompts[0], cache)
    save_prompt_cache(str(folder / "prompt_cache.safetensors"), cache, {"model": "before"})
    expected["second_answer"], expected["second_logprobs"] = answer(pair, prompts[1], cache)
    mx.save_safetensors(str(folder / "expected.safetensors"), expected)
    for name in ("answer_logprobs", "second_logprobs"):
        best = mx.sort(expected[name], axis=-1)[:, -2:]
        print(name, "closest two:", (best[:, 1] - best[:, 0]).min().item())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
