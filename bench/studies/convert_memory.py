"""Peak memory of a conversion: `python -m kvpred_mlx.bench.studies.convert_memory -q --dtype float16`.

Makes a CoreNet checkpoint of the paper's 1.1B base and 270M auxiliary with random float32 weights (5.4 GB on
disk), converts it in a process of its own with the arguments given here, and prints that process's peak
resident memory beside the size of what it wrote.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from kvpred_mlx.bench.common import command, machine
from kvpred_mlx.console import progress_bar
from kvpred_mlx.convert.published import OpenELMShape, facts, openelm_shape

PAIR = "OpenELM-1_1B<-OpenELM-270M"


def main(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="For kvpred-mlx convert: -q, --dtype float16, ...")
    ] = None,
) -> None:
    """Measure the peak memory of one conversion."""
    if find_spec("torch") is None:
        raise ImportError("a checkpoint needs torch: pip install 'kvpred-mlx[convert]'")
    with tempfile.TemporaryDirectory() as folder, progress_bar("writing a checkpoint") as progress:
        checkpoint, config, out = (Path(folder, name) for name in ("model.pt", "model.yaml", "out"))
        write_checkpoint(checkpoint, config)
        progress(1, 2, "converting")
        peak = convert(checkpoint, config, out, arguments or [])
        size = sum(file.stat().st_size for file in out.iterdir())
    more = f"{(peak - size) / 1e9:+.2f} GB"
    print(f"peak resident memory {peak / 1e9:.2f} GB, output {size / 1e9:.2f} GB, {more}")


def convert(checkpoint: Path, config: Path, out: Path, arguments: list[str]) -> int:
    """Convert in a process of its own: its peak resident memory, in bytes.

    Raises:
        ChildProcessError: the conversion failed; it has said why.
    """
    files = ["--checkpoint", str(checkpoint), "--config", str(config), "--mlx-path", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "kvpred_mlx", "convert", *files, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ChildProcessError("the conversion failed")
    return machine.peak_resident_bytes(usage)


def write_checkpoint(checkpoint: Path, config: Path) -> None:
    """Write a random checkpoint of `PAIR` and its YAML.

    Raises:
        ChildProcessError: it could not be written; the process that tried has said why.
    """
    # In a process of its own: Linux counts a parent's memory into the peak of the children it starts.
    code = "import sys; from kvpred_mlx.bench.studies.convert_memory import _save; _save(sys.argv[1])"
    if subprocess.run([sys.executable, "-c", code, checkpoint], check=False).returncode:
        raise ChildProcessError(f"{checkpoint}: the checkpoint could not be written")
    pair = facts()["pairs"][PAIR]

    def model(name: str) -> list[dict[str, Any]]:
        return [{"model": {"language_modeling": {"general_gpt": {"model_name": name}}}}]

    kv_prediction = {
        "auxkv_num_layers_to_basekv_num_layers": pair["layer_map"],
        "base_model": model(pair["base"]),
        "auxiliary_model": model(pair["auxiliary"]),
    }
    gpt = {"model_name": pair["base"], "vocab_size": 32128, "max_context_length": 2048}
    models = {"kv_prediction": kv_prediction, "general_gpt": gpt}
    config.write_text(yaml.safe_dump({"model": {"language_modeling": models}}))


def _save(path: str) -> None:
    import torch

    pair = facts()["pairs"][PAIR]
    base, auxiliary = openelm_shape(pair["base"]), openelm_shape(pair["auxiliary"])
    assert base is not None and auxiliary is not None
    shapes = {f"base.{k}": v for k, v in _shapes(base).items()}
    shapes |= {f"auxiliary.{k}": v for k, v in _shapes(auxiliary).items()}
    for i, m in enumerate(pair["layer_map"]):
        width, source = base.kv_heads[i] * base.head_dim, auxiliary.kv_heads[m] * auxiliary.head_dim
        for kind in ("key", "value"):
            name = f"predicter.auxkv_to_basekv.{kind}_transforms.{i}"
            shapes |= {f"{name}.weight": (width, source), f"{name}.bias": (width,)}
    torch.save({name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}, path)


def _shapes(model: OpenELMShape) -> dict[str, tuple[int, ...]]:
    dim, head_dim = model.model_dim, model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embeddings.weight": (32128, dim), "norm.weight": (dim,)}
    layers = zip(model.query_heads, model.kv_heads, model.ffn_dims, strict=True)
    for i, (query, kv, ffn) in enumerate(layers):
        tensors: dict[str, tuple[int, ...]] = {
            "attn.qkv_proj": ((query + 2 * kv) * head_dim, dim),
            "attn.q_norm": (head_dim,),
            "attn.k_norm": (head_dim,),
            "attn.out_proj": (dim, query * head_dim),
            "ffn.proj_1": (2 * ffn, dim),
            "ffn.proj_2": (dim, ffn),
            "attn_norm": (dim,),
            "ffn_norm": (dim,),
        }
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in tensors.items()}
    return shapes


if __name__ == "__main__":
    command.run(main, pass_on=True)
