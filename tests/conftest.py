"""Fixtures that several test files use; importing kvpred_mlx first loads a fast BLAS on Linux."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvpred_mlx  # noqa: F401

DATA = Path(__file__).with_name("data")


@pytest.fixture(scope="session")
def golden_pair(tmp_path_factory):
    """The reference's tiny checkpoint, converted."""
    from kvpred_mlx.convert.checkpoint import convert_checkpoint

    path = tmp_path_factory.mktemp("golden") / "pair"
    convert_checkpoint(DATA / "golden_tiny/checkpoint.pt", DATA / "golden_tiny/config.yaml", path)
    return path


@pytest.fixture(scope="session")
def demo_pair():
    """The bundled pair, loaded once: (model, tokenizer)."""
    from kvpred_mlx import load
    from kvpred_mlx.loading import DEMO_PAIR

    return load(DEMO_PAIR)
