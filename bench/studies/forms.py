"""Forms of a predictor, fitted on a recording: `kvpred_mlx.bench.studies.predictor_forms` compares them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.studies.adapted import Adapted
from kvpred_mlx.console import progress_bar
from kvpred_mlx.dial.importance import Importance
from kvpred_mlx.making.as_used import AsUsedLoss
from kvpred_mlx.making.layer_maps import even
from kvpred_mlx.making.loop import Trainer
from kvpred_mlx.making.moments import Moments, Ridge
from kvpred_mlx.making.recorded_quality import Scores, score
from kvpred_mlx.making.recording import Batch, Recording
from kvpred_mlx.making.settings import TrainingSettings
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps

# As the cache is used: by far the longest, so only if asked for.
TRAINED = ("trained", "joined-trained", "adapted-trained")
FITTED = ("rank", "joined", "attention", "joined-attention", "mlp")  # to the true keys and values
KINDS = FITTED + TRAINED
RIDGES = (1e-4, 1e-3, 1e-2)
HELD_OUT = 8  # one window in so many chooses the ridge
Form = Callable[[Batch], mx.array]  # the predicted keys and values, side by side, `[B, P - 1, width]`


class Part(NamedTuple):
    """Columns of the recorded keys and values, and the features that they are predicted from."""

    features: str
    columns: slice


Map = tuple[np.ndarray, np.ndarray]  # weight and bias


class Forms:
    """What maps the input of a layer to the keys and values behind it.

    Args:
        taps: of the base.
        depth: the layer.
        train, held: recordings to fit and to measure on.
    """

    def __init__(self, taps: KVTaps, depth: int, train: Recording, held: Recording):
        self.taps, self.train, self.held = taps, train, held
        self._depth = depth
        predictor = FirstLayersPredictor([depth], taps.input_widths, taps.widths)
        self._pair = KVPredictionModel(taps, None, predictor)

    def parts(self) -> list[Part]:
        """What is predicted from what, in the order of the columns."""
        before = sum(sum(widths) for widths in self.taps.widths[: self._depth + 1])  # they need no map
        return [Part(f"layer_{self._depth}", slice(before, None))]

    def joined(self, part: Part, others: list[int]) -> list[str]:
        """Features of a part, those of other layers before its own."""
        return [*(f"layer_{k}" for k in others if k < self._depth), part.features]

    def forms(
        self,
        kinds: list[str],
        others: list[int],
        ranks: list[int],
        hidden: int,
        epochs: int,
        training: TrainingSettings,
        adapter_rank: int,
    ) -> Iterator[tuple[str, Form]]:
        """Each form of these kinds by name; the linear map first."""
        sums = self._sums([])
        maps = [_solve(*s) for s in sums]
        linear = self._linear([], maps)
        yield "linear", linear
        for rank in ranks if "rank" in kinds else []:
            low = [(_low_rank(w, a + b, rank), bias) for (w, bias), (a, b) in zip(maps, sums, strict=True)]
            yield f"rank {rank}", self._linear([], low)
        choices = [[k] for k in others] + ([others] if len(others) > 1 else [])
        if "trained" in kinds:
            yield "linear, trained", self._trained(copy.deepcopy(linear), training)
        if "adapted-trained" in kinds:
            adapted = Adapted(self.taps.model, self._depth, copy.deepcopy(linear), adapter_rank)
            yield f"adapters of rank {adapter_rank}, trained", self._trained(adapted, training)
        joined: _Maps | None = None
        for chosen in choices if "joined" in kinds else []:
            joined = self._fitted(chosen)  # the last choice joins all of them
            yield _joined_with(chosen), joined
        if "joined-trained" in kinds:
            begun = self._fitted(others) if joined is None else joined
            yield f"{_joined_with(others)}, trained", self._trained(copy.deepcopy(begun), training)
        weights = self._attention() if {"attention", "joined-attention"} & {*kinds} else None
        if "attention" in kinds:
            yield "weighted by attention", self._fitted([], weights)
        if "joined-attention" in kinds:
            yield f"{_joined_with(others)}, weighted by attention", self._fitted(others, weights)
        if "mlp" in kinds:
            yield f"gated MLP, {hidden} wide", self._mlp(linear, hidden, epochs)

    def score(self, form: Form) -> Scores:
        """Of the held-out windows."""
        return score(self._pair, self.held, loss=_FormLoss(self.held, form))

    def _fitted(self, others: list[int], weights: np.ndarray | None = None) -> _Maps:
        return self._linear(others, [_solve(*s) for s in self._sums(others, weights)])

    def _linear(self, others: list[int], maps: list[Map]) -> _Maps:
        return _Maps([self.joined(part, others) for part in self.parts()], maps)

    def _trained(self, form: nn.Module, settings: TrainingSettings) -> Form:
        """The form itself, trained as the cache is used, on the windows that it was fitted on."""
        loss = _FormLoss(self.train, form)
        trainer = Trainer(
            form, lambda _, batch: loss(self._pair, batch), self.train, settings, compiled=False
        )
        trainer.run(command.tell)
        return form

    def _sums(self, others: list[int], weights: np.ndarray | None = None) -> list[tuple[Moments, Moments]]:
        """Of each part: of the windows that are fitted, and of those that choose the ridge.

        Args:
            weights: of the tokens `[W, P - 1]`.
        """
        parts, sums = self.parts(), list[tuple[Moments, Moments]]()
        with progress_bar("summing up") as progress:
            for i in range(len(self.train)):
                batch = self.train.rows([i])
                kv = np.array(batch["kv"])[0]
                for place, part in enumerate(parts):
                    x = np.array(_features(batch, self.joined(part, others)))[0].astype(float)
                    y = kv[:, part.columns].astype(float)
                    if i == 0:
                        zeros = (Moments.zeros(x.shape[1], y.shape[1]) for _ in range(2))
                        sums.append(tuple(zeros))  # type: ignore[arg-type]
                    chosen = sums[place][i % HELD_OUT == HELD_OUT - 1]
                    chosen.add(x, y, None if weights is None else weights[i])
                progress(i + 1, len(self.train))
        return sums

    def _attention(self) -> np.ndarray:
        """How much the answers' last tokens attend to each token, `[W, P - 1]`: and half as much again to all alike."""
        found, listener = [], Importance(self.taps.model)
        for i in range(len(self.train)):
            batch = self.train.rows([i], features=[])
            cache = make_prompt_cache(self.taps.model)
            kv = self.train.layout.split_kv(batch["kv"])
            self.taps.inject(kv, batch["prompts"][:, :-1], cache, logits=False)
            answers = mx.concatenate([batch["prompts"][:, -1:], batch["continuations"][:, :-1]], axis=1)
            with listener.listen() as heard:
                self.taps.model(answers, cache=cache)
            n = kv[0].keys.shape[1]
            scores = heard.scores(n + answers.shape[1], answers.shape[1], [0])[:, :n]
            found.append(np.array(scores)[0])
        weights = np.stack(found)
        return 0.5 + 0.5 * weights / weights.mean(axis=1, keepdims=True)

    def _mlp(self, linear: Form, hidden: int, epochs: int) -> Form:
        """Gated MLPs for what the linear maps leave, on standardized features and targets, by Adam."""
        mx.random.seed(0)
        parts, first = self.parts(), self.train.rows([0])
        columns = [first["kv"][0, :, part.columns] for part in parts]
        gated = [
            _Gated(first[p.features].shape[-1], hidden, c.shape[-1])
            for p, c in zip(parts, columns, strict=True)
        ]
        both = nn.Sequential(*gated)  # for its parameters' sake
        spread = mx.maximum(mx.concatenate([c.std(0) for c in columns], axis=-1), 1e-3)
        scales = [mx.maximum(first[part.features][0].std(0), 1e-3) for part in parts]
        steps = epochs * len(self.train)
        rate = optim.join_schedules(
            [optim.linear_schedule(0, 5e-4, 10), optim.cosine_decay(5e-4, steps)], [10]
        )
        optimizer = optim.Adam(rate)

        def correction(batch: Batch) -> mx.array:
            inputs = (mx.clip(batch[p.features] / s, -8, 8) for p, s in zip(parts, scales, strict=True))
            made = (module(x) for module, x in zip(both.layers, inputs, strict=True))
            return mx.concatenate(list(made), axis=-1)

        def loss(model: nn.Module, batch: Batch, left: mx.array) -> mx.array:
            return ((correction(batch) - left / spread) ** 2).mean()

        step = nn.value_and_grad(both, loss)
        order = np.random.default_rng(0)
        for epoch in range(epochs):
            for i in order.permutation(len(self.train)).tolist():
                batch = self.train.rows([i])
                left = mx.concatenate([batch["kv"][..., p.columns] for p in parts], axis=-1) - linear(batch)
                value, gradient = step(both, batch, left)
                optimizer.update(both, optim.clip_grad_norm(gradient, 1.0)[0])
                mx.eval(value, both.parameters(), optimizer.state)
            print(f"epoch {epoch + 1} of {epochs}: {value.item():.4f}", flush=True)
        return lambda batch: linear(batch) + correction(batch) * spread


class TwoModelForms(Forms):
    """What maps the hidden states of a second model to the base's keys and values, by the even layer map.

    Args:
        taps: of the base.
        layers: of the auxiliary.
        train, held: recordings with what it reads (`read_by`).
    """

    def __init__(self, taps: KVTaps, layers: int, train: Recording, held: Recording):
        super().__init__(taps, 1, train, held)
        self._map = even(len(taps), layers)

    def parts(self) -> list[Part]:
        ends = np.cumsum([0, *(sum(widths) for widths in self.taps.widths)]).tolist()
        of = {j: [i for i, m in enumerate(self._map) if m == j] for j in dict.fromkeys(self._map)}
        return [Part(f"auxiliary_{j}", slice(ends[i[0]], ends[i[-1] + 1])) for j, i in of.items()]

    def joined(self, part: Part, others: list[int]) -> list[str]:
        own = int(part.features.rpartition("_")[2])
        names = [f"auxiliary_{max(own - k, 0)}" for k in others]
        return list(dict.fromkeys([*names, part.features]))


class BothForms(Forms):
    """What maps the input of a layer and the hidden states of a second model to the keys and values behind it.

    Args:
        taps: of the base.
        depth: the layer.
        layers: of the auxiliary.
        train, held: recordings with what it reads (`read_by`).
    """

    def __init__(self, taps: KVTaps, depth: int, layers: int, train: Recording, held: Recording):
        super().__init__(taps, depth, train, held)
        self._two = TwoModelForms(taps, layers, train, held)

    def parts(self) -> list[Part]:
        first = super().parts()[0].columns.start
        parts = [
            Part(p.features, slice(max(p.columns.start, first), p.columns.stop)) for p in self._two.parts()
        ]
        return [part for part in parts if part.columns.start < part.columns.stop]

    def joined(self, part: Part, others: list[int]) -> list[str]:
        own = [f"layer_{self._depth}"]
        return [*self._two.joined(part, [0, *others]), *own] if others else own


class _Maps(nn.Module):
    """One linear map for each part, from the features named."""

    def __init__(self, named: list[list[str]], maps: list[Map]):
        super().__init__()
        self._named = named
        self.weights = [mx.array(weight.T.astype(np.float32)) for weight, _ in maps]
        self.biases = [mx.array(bias.astype(np.float32)) for _, bias in maps]

    def __call__(self, batch: Batch) -> mx.array:
        made = (
            _features(batch, names) @ weight + bias
            for names, weight, bias in zip(self._named, self.weights, self.biases, strict=True)
        )
        return mx.concatenate(list(made), axis=-1)


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
    """Entries as a form makes them; those before its columns are true."""

    def __init__(self, recording: Recording, form: Form):
        super().__init__(recording)
        self._form = form

    def entries(self, pair: KVPredictionModel, batch: Batch) -> tuple[list[KV], list[KV]]:
        true = self.recording.layout.split_kv(batch["kv"])
        made = self._form(batch)
        before = batch["kv"][..., : batch["kv"].shape[-1] - made.shape[-1]]
        return self.recording.layout.split_kv(mx.concatenate([before, made], axis=-1)), true


def _joined_with(layers: list[int]) -> str:
    return "joined with " + ", ".join(map(str, layers))


def _features(batch: Batch, names: list[str]) -> mx.array:
    return mx.concatenate([batch[name] for name in names], axis=-1)


def _solve(fitted: Moments, choosing: Moments) -> Map:
    errors = Ridge(fitted).squared_errors(choosing, RIDGES).sum(axis=1)
    weight, bias = Ridge(fitted + choosing).solve(RIDGES[int(errors.argmin())])
    return weight, bias


def _low_rank(weight: np.ndarray, moments: Moments, rank: int) -> np.ndarray:
    """The map of that rank whose predictions are nearest to the full one's on the fitted features."""
    mean = moments.x / moments.n
    values, vectors = np.linalg.eigh(moments.xx / moments.n - np.outer(mean, mean))
    root = np.sqrt(np.maximum(values, 1e-9))
    u, s, vt = np.linalg.svd(weight @ (vectors * root), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ (vectors / root).T
