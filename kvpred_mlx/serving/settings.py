"""What a server is started with."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START

from kvpred_mlx.errors import check_ranges


@dataclass
class ServerSettings(Namespace):
    """mlx-lm's server flags, with its names and defaults; mlx-lm's classes read them as their `cli_args`.

    Args:
        draft: "auxiliary" for speculative decoding with the pair's auxiliary (requests are then answered one by
            one), None for none; the default that a request's `draft_model` overrides.

    Raises:
        ValueError: naming what was given and what was expected.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    allowed_origins: list[str] = field(default_factory=lambda: ["*"])
    draft: str | None = None
    num_draft_tokens: int = 3
    chat_template: str = ""
    use_default_chat_template: bool = False
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 512
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    prefill_step_size: int = 2048
    prompt_cache_size: int = 10
    prompt_cache_bytes: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START
    # What mlx-lm's classes read too, and a pair has no use for.
    model: str | None = None
    adapter_path: str | None = None
    draft_model: str | None = None
    trust_remote_code: bool = False
    pipeline: bool = False

    def __post_init__(self) -> None:
        counts = {
            "port": 0, "num_draft_tokens": 1, "top_k": 0, "max_tokens": 1, "decode_concurrency": 1,
            "prompt_concurrency": 1, "prefill_step_size": 2, "prompt_cache_size": 1, "prompt_cache_bytes": 0,
            "quantized_kv_start": 0,
        }  # fmt: skip
        shares = {"temp": 0, "top_p": 0, "min_p": 0}
        check_ranges(vars(self), counts | shares, {"port": 65535, "top_p": 1, "min_p": 1}, counts)
