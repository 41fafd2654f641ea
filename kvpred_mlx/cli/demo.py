"""`kvpred-mlx demo`: the bundled pair on a bundled prompt, with prediction and without."""

from __future__ import annotations

from typing import Any

MAX_TOKENS = 40


def demo() -> None:
    """Generate with the bundled pair, predicted and exact, and show both times to first token."""
    from kvpred_mlx.cli.opening import DEMO_NOTE
    from kvpred_mlx.pair.loading import load
    from kvpred_mlx.pair.locating import DEMO_PAIR

    pair, tokenizer = load(DEMO_PAIR)
    prompt = (DEMO_PAIR / "prompt.txt").read_text(encoding="utf-8")
    modes = {"predicted": False, "exact": True}
    for exact in modes.values():  # the first call of each mode pays for what is only built once
        _run(pair, tokenizer, prompt, exact, max_tokens=1)
    runs = {mode: _run(pair, tokenizer, prompt, exact, MAX_TOKENS) for mode, exact in modes.items()}
    print(DEMO_NOTE)
    print(f"\n--- prompt, {runs['exact'][1].prompt_tokens} tokens ---\n{prompt}")
    for mode, (text, _) in runs.items():
        print(f"\n--- continued, {mode} prompt cache ---\n{text}")
    predicted, exact_ttft = (runs[mode][1].ttft for mode in modes)
    print(
        f"\nTTFT: predicted {predicted:.3f} s, exact {exact_ttft:.3f} s, "
        f"{exact_ttft / predicted:.1f} times sooner (one run each; `kvpred-mlx generate --exact` repeats it)"
    )


def _run(pair: Any, tokenizer: Any, prompt: str, exact: bool, max_tokens: int) -> tuple[str, Any]:
    from kvpred_mlx.generation.stream import stream_generate

    pair.exact = exact
    responses = list(stream_generate(pair, tokenizer, prompt, max_tokens))
    return "".join(r.text for r in responses), responses[-1]
