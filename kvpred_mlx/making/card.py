"""Figures for people: tables of quality, and the model card of a pair."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from kvpred_mlx.files import write_file
from kvpred_mlx.making.estimates import Estimate
from kvpred_mlx.making.quality import Quality
from kvpred_mlx.pair.catalogue import TAG

CARD = "README.md"
TITLES = {
    "cross_entropy": "cross-entropy",
    "cross_entropy_per_byte": "per byte",
    "top1_accuracy": "top-1",
    "agreement": "agreement",
    "first_token_agreement": "first token",
    "retention": "retention",
}


@dataclass(frozen=True)
class CardFacts:
    """What a model card says beside the figures.

    Args:
        name: the model's.
        base, auxiliary: names of a pair's two models, as the maker gave them, if they are known.
        made: sentences on how it was made.
        licence: of the pair, if it is known.
    """

    name: str
    base: str | None = None
    auxiliary: str | None = None
    made: Sequence[str] = field(default_factory=tuple)
    licence: str | None = None


def write_card(folder: Path, facts: CardFacts, figures: Iterable[Quality] = ()) -> None:
    """Write `README.md` into a model's directory."""
    repositories = [
        name
        for name in (facts.base, facts.auxiliary)
        if name and name.count("/") == 1 and name[0] not in "./~"
    ]
    data = ModelCardData(
        library_name="mlx", tags=["mlx", TAG, "kv-prediction", "kvpred-mlx"], pipeline_tag="text-generation",
        base_model=repositories or None, license=facts.licence,
    )  # fmt: skip
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(facts, figures)}"))
    write_file(folder / CARD, lambda beside: beside.write_text(text))


def card_text(facts: CardFacts, figures: Iterable[Quality]) -> str:
    """The card's text: what it is, how to run it, how it was made, what it costs in quality."""
    models = f": base {facts.base}, auxiliary {facts.auxiliary}" if facts.base else ""
    parts = [
        f"# {facts.name}",
        f"A model for kvpred-mlx (KV Prediction, [arXiv 2410.08391](https://arxiv.org/abs/2410.08391)){models}.",
        f'```bash\npip install kvpred-mlx\nkvpred-mlx generate --model {facts.name} --prompt "..."\n```',
        *facts.made,
    ]
    tables = [quality_markdown(q) for q in figures]
    if tables:
        parts += ["## Quality", _LEGEND, *tables]
    return "\n\n".join(parts) + "\n"


def quality_markdown(quality: Quality) -> str:
    """The figures of one prompt length as a Markdown table."""
    heading = (
        f"Prompt {quality.prompt_tokens} tokens, {quality.score_tokens} scored, {quality.windows} windows of "
        f"{quality.documents} held-out documents:"
    )
    lines = [f"| prompt cache | {' | '.join(TITLES.values())} |", "| --- |" + " --- |" * len(TITLES)]
    lines += [f"| {name} | {' | '.join(quality_cells(figures))} |" for name, figures in quality.modes.items()]
    variances = [f"{name} {_range(list(layers.values()))}" for name, layers in quality.explained().items()]
    return "\n".join([heading, "", *lines, "", f"Explained variance over layers: {', '.join(variances)}."])


def quality_cells(figures: dict[str, Estimate]) -> list[str]:
    """Each metric with its interval, in the order of `TITLES`."""
    return [f"{e.mean:.3f} ({e.low:.3f} to {e.high:.3f})" for e in (figures[m] for m in TITLES)]


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


_LEGEND = (
    "Real text continued by the base after an exact prompt cache and after the predicted one, by the auxiliary alone, "
    "and by the base without the prompt. Cross-entropy in nats per token and per byte; agreement: same most likely "
    "token as the exact base; retention: (no prompt - mode) / (no prompt - exact) in cross-entropy; means over "
    "documents with 95 % bootstrap intervals."
)
