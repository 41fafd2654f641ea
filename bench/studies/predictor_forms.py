"""Forms of a predictor, compared on what a study of first layers has recorded.

`python -m kvpred_mlx.bench.studies.predictor_forms --base BASE --folder FOLDER --depth 14 --joined 7,10`, with the
folder of `kvpred_mlx.bench.studies.first_layers`: the linear map, features of several layers joined, regression
weighted by the attention that the base pays to each token, low-rank maps, and a small gated MLP beside the linear map;
differences from the linear map are paired, window by window.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import typer
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.bench.common import command
from kvpred_mlx.console import numbers, progress_bar
from kvpred_mlx.dial.importance import Importance
from kvpred_mlx.files import write_file
from kvpred_mlx.making.as_used import AsUsedLoss
from kvpred_mlx.making.moments import Moments, Ridge
from kvpred_mlx.making.pairing import load_part
from kvpred_mlx.making.recorded_quality import Scores, estimates, score
from kvpred_mlx.making.recording import Batch, Recording
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps

RIDGES = (1e-4, 1e-3, 1e-2)
HELD_OUT = 8  # one window in so many chooses the ridge
SHOWN = ("retention", "agreement", "first_token_agreement", "divergence")
Form = Callable[[Batch], mx.array]  # keys and values behind the depth, side by side, `[B, P - 1, width]`


def main(
    base: Annotated[str, typer.Option(help="The model of the study.")],
    folder: Annotated[Path, typer.Option(help="Of the study.")],
    depth: Annotated[int, typer.Option(help="How many layers read.")],
    joined: Annotated[list[str], typer.Option(help="Recorded layers to join with it, 7,10.")],
    ranks: Annotated[list[str] | None, typer.Option(help="Of low-rank maps.")] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the gated MLP.")] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="Of the MLP's training.")] = 8,
    held_out: Annotated[str, typer.Option(help="The recording to measure on.")] = "held-448",
) -> None:
    """Compare forms of the predictor at one depth, at equal or nearly equal TTFT."""
    others = [k for k in numbers("--joined", joined, 1) if k < depth]
    study = Forms(
        KVTaps(load_part(base).model), Recording(folder / "train"), Recording(folder / held_out), depth
    )
    rows: dict[str, Any] = {}
    linear: Scores | None = None
    for name, form in study.forms(others, numbers("--ranks", ranks or ["64,256"], 1), hidden, epochs):
        scores = study.score(form)
        linear = linear or scores
        found = {
            "itself": estimates(study.held, scores),
            "over linear": estimates(study.held, scores, over=linear),
        }
        rows[name] = {
            which: {m: dataclasses.asdict(values[m]) for m in SHOWN} for which, values in found.items()
        }
        print(name, json.dumps(rows[name]["over linear"]), flush=True)
        text = json.dumps({"base": base, "depth": depth, "forms": rows}, indent=1)
        write_file(folder / f"forms-{depth}.json", lambda beside, text=text: beside.write_text(text))  # type: ignore[misc]


class Forms:
    """What maps the input of a layer to the keys and values behind it.

    Args:
        taps: of the base.
        train, held: recordings to fit and to measure on.
        depth: the layer.
    """

    def __init__(self, taps: KVTaps, train: Recording, held: Recording, depth: int):
        self._taps, self._train, self.held, self._depth = taps, train, held, depth
        predictor = FirstLayersPredictor([depth], taps.input_widths, taps.widths)
        self._pair = KVPredictionModel(taps, None, predictor)
        self._before = sum(sum(widths) for widths in taps.widths[: depth + 1])  # columns that need no map

    def forms(
        self, joined: list[int], ranks: list[int], hidden: int, epochs: int
    ) -> Iterator[tuple[str, Form]]:
        """Each form by name; the linear map first."""
        own = [self._depth]
        sums = self._sums(own)
        weight, bias = self._solve(*sums)
        yield "linear", self._linear(own, weight, bias)
        whole = sums[0] + sums[1]
        for rank in ranks:
            yield f"rank {rank}", self._linear(own, _low_rank(weight, whole, rank), bias)
        for extra in joined:
            yield f"joined with layer {extra}", self._fitted([extra, *own])
        if len(joined) > 1:
            yield "joined with " + ", ".join(map(str, joined)), self._fitted([*joined, *own])
        yield "weighted by attention", self._fitted(own, self._attention())
        yield f"gated MLP, {hidden} wide", self._mlp(weight, bias, hidden, epochs)

    def score(self, form: Form) -> Scores:
        """Of the held-out windows."""
        return score(self._pair, self.held, loss=_FormLoss(self.held, form, self._depth))

    def _fitted(self, layers: list[int], weights: np.ndarray | None = None) -> Form:
        return self._linear(layers, *self._solve(*self._sums(layers, weights)))

    def _linear(self, layers: list[int], weight: np.ndarray, bias: np.ndarray) -> Form:
        w, b = mx.array(weight.T.astype(np.float32)), mx.array(bias.astype(np.float32))
        return lambda batch: _features(batch, layers) @ w + b

    def _sums(self, layers: list[int], weights: np.ndarray | None = None) -> tuple[Moments, Moments]:
        """Of the windows that are fitted, and of those that choose the ridge; tokens may be weighted [W, P - 1]."""
        sums: list[Moments] = []
        with progress_bar("summing up") as progress:
            for i in range(len(self._train)):
                batch = self._train.rows([i])
                x = np.array(_features(batch, layers))[0].astype(float)
                y = np.array(batch["kv"])[0, :, self._before :].astype(float)
                sums = sums or [Moments.zeros(x.shape[1], y.shape[1]) for _ in range(2)]
                of = sums[i % HELD_OUT == HELD_OUT - 1]
                w = np.ones(len(x)) if weights is None else weights[i]
                _add_weighted(of, x, y, w)
                progress(i + 1, len(self._train))
        return sums[0], sums[1]

    def _solve(self, fitted: Moments, choosing: Moments) -> tuple[np.ndarray, np.ndarray]:
        errors = Ridge(fitted).squared_errors(choosing, RIDGES).sum(axis=1)
        weight, bias = Ridge(fitted + choosing).solve(RIDGES[int(errors.argmin())])
        return weight, bias

    def _attention(self) -> np.ndarray:
        """How much the answers' last tokens attend to each token, `[W, P - 1]`: and half as much again to all alike."""
        found, listener = [], Importance(self._taps.model)
        for i in range(len(self._train)):
            batch = self._train.rows([i])
            cache = make_prompt_cache(self._taps.model)
            kv = self._train.split_kv(batch["kv"])
            self._taps.inject(kv, batch["prompts"][:, :-1], cache, logits=False)
            answers = mx.concatenate([batch["prompts"][:, -1:], batch["continuations"][:, :-1]], axis=1)
            with listener.listen() as heard:
                self._taps.model(answers, cache=cache)
            n = kv[0].keys.shape[1]
            scores = heard.scores(n + answers.shape[1], answers.shape[1], [0])[:, :n]
            found.append(np.array(scores)[0])
        weights = np.stack(found)
        return 0.5 + 0.5 * weights / weights.mean(axis=1, keepdims=True)

    def _mlp(self, weight: np.ndarray, bias: np.ndarray, hidden: int, epochs: int) -> Form:
        """A gated MLP for what the linear map leaves, on standardized features and targets, by Adam."""
        width, columns = weight.shape[1], weight.shape[0]
        mx.random.seed(0)
        gated = _Gated(width, hidden, columns)
        linear = self._linear([self._depth], weight, bias)
        spread = mx.maximum(self._train.rows([0])["kv"][0, :, self._before :].std(0), 1e-3)
        scale = mx.maximum(self._train.rows([0])[f"layer_{self._depth}"][0].std(0), 1e-3)
        optimizer = optim.Adam(optim.cosine_decay(2e-3, epochs * len(self._train)))

        def loss(model: _Gated, x: mx.array, left: mx.array) -> mx.array:
            return ((model(x / scale) - left / spread) ** 2).mean()

        step = nn.value_and_grad(gated, loss)
        order = np.random.default_rng(0)
        for epoch in range(epochs):
            for i in order.permutation(len(self._train)).tolist():
                batch = self._train.rows([i])
                left = batch["kv"][..., self._before :] - linear(batch)
                value, gradient = step(gated, batch[f"layer_{self._depth}"], left)
                optimizer.update(gated, gradient)
                mx.eval(value, gated.parameters(), optimizer.state)
            print(f"epoch {epoch + 1} of {epochs}: {value.item():.4f}", flush=True)
        return lambda batch: linear(batch) + gated(batch[f"layer_{self._depth}"] / scale) * spread


class _Gated(nn.Module):
    """`W3 (silu(W1 x) * W2 x)`, zero at first."""

    def __init__(self, width: int, hidden: int, columns: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, columns)
        self.down.weight = mx.zeros_like(self.down.weight)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(nn.silu(self.gate(x)) * self.up(x))


class _FormLoss(AsUsedLoss):
    """Entries behind the depth as a form makes them."""

    def __init__(self, recording: Recording, form: Form, depth: int):
        super().__init__(recording, depth=depth)
        self._form = form

    def entries(self, pair: KVPredictionModel, batch: Batch) -> tuple[list[KV], list[KV]]:
        true = self.recording.split_kv(batch["kv"])
        made = self._form(batch)
        before = batch["kv"][..., : batch["kv"].shape[-1] - made.shape[-1]]
        return self.recording.split_kv(mx.concatenate([before, made], axis=-1)), true


def _features(batch: Batch, layers: list[int]) -> mx.array:
    return mx.concatenate([batch[f"layer_{k}"] for k in layers], axis=-1)


def _add_weighted(moments: Moments, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> None:
    wx, wy = x * weights[:, None], y * weights[:, None]
    moments.n += weights.sum()
    moments.x += wx.sum(0)
    moments.y += wy.sum(0)
    moments.xx += wx.T @ x
    moments.xy += wx.T @ y
    moments.yy += (wy * y).sum(0)


def _low_rank(weight: np.ndarray, moments: Moments, rank: int) -> np.ndarray:
    """The map of that rank whose predictions are nearest to the full one's on the fitted features."""
    mean = moments.x / moments.n
    values, vectors = np.linalg.eigh(moments.xx / moments.n - np.outer(mean, mean))
    root = np.sqrt(np.maximum(values, 1e-9))
    u, s, vt = np.linalg.svd(weight @ (vectors * root), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ (vectors / root).T


if __name__ == "__main__":
    command.run(main)
