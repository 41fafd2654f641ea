"""When the scans here are used, and when mlx-lm's own."""

from __future__ import annotations

import inspect
import os
from typing import Any

import mlx.core as mx

OPT_OUT = "KVPRED_MLX_NO_SCANS"
FEW_TOKENS = 8  # decode steps, drafts: mlx-lm's own


def on_cpu() -> bool:
    """Whether MLX computes on its CPU backend."""
    return mx.default_device() == mx.Device(mx.cpu)


def applies(tokens: int) -> bool:
    """Whether a call of so many tokens is made here; looked at anew for each call."""
    return tokens > FEW_TOKENS and on_cpu() and not os.environ.get(OPT_OUT)


def takes(function: Any, parameters: str) -> bool:
    """Whether `function` is there and has exactly these parameters, in this order: else it is left as it is."""
    return callable(function) and list(inspect.signature(function).parameters) == parameters.split()
