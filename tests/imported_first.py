"""What one process of `test_imports` does: import a name first, then mlx-lm, and load a pair through mlx-lm alone.

Nothing of ours, of mlx-lm's or of MLX may be imported at the top of this file.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

OURS = {"kvpred_mlx", "mlx_lm", "mlx"}
# What takes seconds to import and is neither mlx-lm's nor ours: imported once, by the process that is forked.
NEUTRAL = [
    "torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.dynamic_module_utils", "tokenizers", "sentencepiece", "huggingface_hub", "scipy.stats",
    "matplotlib.pyplot", "typer", "rich.progress", "yaml",
]  # fmt: skip


def process_kind():
    """A multiprocessing context whose processes have imported nothing but what is neutral."""
    if sys.platform != "linux":  # macOS's frameworks do not survive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEUTRAL)
    return context


def report(name: str, pair: str, connection: Connection) -> None:
    """Send why `check` failed, or that it passed (""), or what is not installed (a ModuleNotFoundError's name)."""
    try:
        check(name, pair)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        connection.send(("failed", traceback.format_exc()) if missing in OURS else ("missing", missing))
    except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
        connection.send(("failed", traceback.format_exc()))
    else:
        connection.send(("passed", ""))


def check(name: str, pair: str) -> None:
    """Import `name`, a module or a public name of one (module:name), and load `pair` through mlx-lm."""
    assert not OURS & sys.modules.keys()
    module, _, public = name.partition(":")
    found = importlib.import_module(module)
    if public:
        assert getattr(found, public) is not None
    import mlx_lm

    if public:
        model, tokenizer = mlx_lm.load(pair)
        assert tokenizer.encode("x = 1")
    else:  # there are many modules: no weights, no tokenizer
        model, _ = mlx_lm.utils.load_model(Path(pair), lazy=True)
    assert (type(model).__module__, type(model).__name__) == ("kvpred_mlx.pair.saved_model", "Model")
    assert mlx_lm.models.cache.AuxiliaryCache.__module__ == "kvpred_mlx.pair.auxiliary_cache"
