"""A pair as mlx-lm builds it out of its directory, standalone or linked."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from kvpred_mlx._registration import announce_config
from kvpred_mlx.pair.config import ModelArgs, build_model
from kvpred_mlx.pair.kept_layers import KeptLayers, keep_layers
from kvpred_mlx.pair.links import ROLES, Part, Parts, check_norms, float_type, open_part, sample_norms
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor
from kvpred_mlx.pair.sources import feature_widths
from kvpred_mlx.taps.kv_taps import KVTaps


class Model(KVPredictionModel):
    """A pair as mlx-lm builds it: from its config, before the weights are there; linked models have theirs."""

    def __init__(self, args: ModelArgs):
        links = {role: link for role in ROLES if (link := args.link(role))}
        parts = Parts({role: open_part(link, role) for role, link in links.items()})
        base, auxiliary = _taps(args.base, parts.by_role.get("base")), None
        predictor: Predictor | FirstLayersPredictor
        if args.first_layers is not None:
            predictor = FirstLayersPredictor(args.first_layers, base.input_widths, base.widths)
        else:
            if args.auxiliary_layers and links:
                config = parts.by_role["base"].config
                auxiliary = KVTaps(keep_layers(base.model, config, args.auxiliary_layers)[0])
            else:
                auxiliary = _taps(args.auxiliary or {}, parts.by_role.get("auxiliary"))
            widths = feature_widths(args.source, auxiliary)
            predictor = Predictor(args.layer_map, widths, base.widths, args.source)
        super().__init__(base, auxiliary, predictor, args.min_prompt_tokens, args.dial(), args, parts)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """mlx-lm's hook between reading a pair's files and loading its weights: linked models bring their own.

        Raises:
            ValueError: a linked model is not the one that the predictor was fitted on.
        """
        args = self.args
        if args is None:
            return weights
        for role, part in self.parts.by_role.items():
            kept = weights.pop(f"norms.{role}", None)
            stored = _under(role, weights)  # of a standalone pair, whose model is replaced
            weights = {n: w for n, w in weights.items() if not n.startswith(f"{role}.")}
            link = args.link(role)
            if kept is None and stored:
                kept = sample_norms(stored)
            if link is not None and link.checked and kept is not None:
                check_norms(link, role, kept, part.weights)
            weights |= {f"{role}.{name}": array for name, array in part.weights.items()}
        if self.parts.by_role:  # the predictor may have been fitted on models of another type
            dtype = float_type(self.base)
            maps = {n: w for n, w in weights.items() if n.startswith("predictor.")}
            weights |= {n: w.astype(dtype) for n, w in maps.items() if mx.issubdtype(w.dtype, mx.floating)}
        if args.auxiliary_layers:
            shared = KeptLayers(self.base, args.auxiliary_layers).shared(_under("base", weights))
            weights |= {f"auxiliary.{name}": array for name, array in shared.items()}
        return weights


def _taps(config: dict[str, Any], part: Part | None) -> KVTaps:
    return KVTaps(build_model(config)) if part is None else part.taps


def _under(name: str, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    return {n.removeprefix(f"{name}."): w for n, w in weights.items() if n.startswith(f"{name}.")}


announce_config()
