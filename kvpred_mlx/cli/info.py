"""`kvpred-mlx info`: what a pair is made of."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.opening import locate, one_pair


def info(
    pair: o.PairArgument = None,
    model: o.ModelOption = None,
    base: o.OtherBase = None,
    auxiliary: o.OtherAuxiliary = None,
    force: o.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of text.")] = False,
) -> None:
    """Show a pair's models, layer map, types and sizes."""
    from kvpred_mlx.pair.description import describe

    _, path = locate(one_pair(model, pair))
    facts = describe(path, base=base, auxiliary=auxiliary, force=force)
    print(json.dumps(facts) if as_json else _text(facts))


def _text(facts: dict[str, Any]) -> str:
    lines = [f"{facts['path']}: {facts['bytes'] / 1e6:.1f} MB on disk"]
    for role in ("base", "auxiliary", "predictor"):
        part = facts[role]
        if part is None:
            continue
        family = f"{part['model_type']}, {part['layers']} layers, " if "layers" in part else ""
        lines.append(
            f"{role + ':':<11}{family}{part['parameters'] / 1e6:.2f} M parameters, "
            f"{part['bytes'] / 1e6:.2f} MB, {part['dtype']}{_quantization(part)}"
        )
        if link := part.get("link"):
            at = f" at {link['revision']}" if "revision" in link else ""
            lines.append(f"{'':<11}linked to {link['path_or_hf_repo']}{at}")
    if facts["first_layers"]:
        lines.append(f"read by:   the base's first layers: {' or '.join(map(str, facts['first_layers']))}")
    else:
        lines.append(f"layer map: {','.join(map(str, facts['layer_map']))}")
        lines.append(f"source:    {facts['source']}")
    lines += _places(facts["places"])
    context = facts["context_length"]
    lines.append(f"context:   {f'{context} tokens' if context else 'not stated'}")
    lines.append(f"predicts prompts of more than {facts['min_prompt_tokens']} tokens")
    if facts["exact_positions"]:
        dial = ", ".join(f"{name} {value}" for name, value in facts["exact_positions"].items())
        lines.append(f"exact positions by default: {dial}")
    lines.append(f"tokenizer: {'yes' if facts['tokenizer'] else 'none, token ids only'}")
    return "\n".join(lines)


def _places(places: list[dict[str, Any]]) -> list[str]:
    """What is predicted, if it is not the same kind of thing in all layers."""
    layers: dict[str, list[int]] = {}
    for place in places:
        window = f", some of it of the last {place['window']} positions only" if place["window"] else ""
        layers.setdefault(", ".join(place["projections"]) + window, []).append(place["layer"])
    if len(layers) == 1:
        return []
    return [
        f"{'predicts:' if not i else '':<11}{what} (layers {','.join(map(str, of))})"
        for i, (what, of) in enumerate(layers.items())
    ]


def _quantization(part: dict[str, Any]) -> str:
    q = part["quantization"]
    return f", {q['bits']} bits in groups of {q['group_size']} ({q['mode']})" if q else ""
