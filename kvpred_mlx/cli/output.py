"""Where `fit` and `train` put a pair, and the figures that are shown of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpred_mlx.cli.making import Begun
    from kvpred_mlx.making.card import CardFacts
    from kvpred_mlx.making.quality import Quality


@dataclass(frozen=True)
class Output:
    """Where a pair goes: a directory, and a repository on the Hugging Face hub if one is named."""

    mlx_path: Path
    overwrite: bool
    upload_repo: str | None

    def check(self) -> None:
        """Refuse a path or a repository that cannot be written before hours are spent on what should go there."""
        import os

        from kvpred_mlx.files import check_absent
        from kvpred_mlx.making.hub import check_access

        if self.upload_repo is not None:
            check_access(self.upload_repo)
        check_absent(self.mlx_path, self.overwrite)
        parent = next(p for p in self.mlx_path.absolute().parents if p.exists())
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"{self.mlx_path}: no permission to write in {parent}")

    def save(self, made: Begun) -> None:
        """Save a pair with a model card that has no figures yet: measuring them takes long, and may be interrupted."""
        from kvpred_mlx.making.card import write_card
        from kvpred_mlx.pair.loading import save

        save(
            self.mlx_path, made.pair, made.tokenizer, overwrite=self.overwrite,
            extras=lambda folder: write_card(folder, self._facts(made)),
        )  # fmt: skip
        self.tell_size()

    def tell_size(self) -> None:
        """Print what was written, and how large it is."""
        print(f"{self.mlx_path}: {sum(f.stat().st_size for f in self.mlx_path.iterdir()) / 1e6:.1f} MB")

    def finish(self, made: Begun, measured: Callable[[], list[Quality]]) -> None:
        """Add figures to the card of a saved pair, show them, and upload the pair if that was asked for."""
        from kvpred_mlx.making.card import write_card
        from kvpred_mlx.making.hub import upload

        try:
            figures = measured()
        except KeyboardInterrupt:
            print(f"interrupted: {self.mlx_path} is saved, its card has no figures", file=sys.stderr)
            raise
        write_card(self.mlx_path, self._facts(made), figures)
        show_figures(figures)
        if self.upload_repo is not None:
            print(upload(self.mlx_path, self.upload_repo))

    def _facts(self, made: Begun) -> CardFacts:
        from kvpred_mlx.making.card import CardFacts

        return CardFacts(self.upload_repo or self.mlx_path.name, *made.names, made.made)


def show_figures(figures: list[Quality], mode: str = "predicted") -> None:
    """Tables on the terminal, 80 columns wide; `mode` is how the pair reads prompts."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from kvpred_mlx.making.card import TITLES

    console = Console()
    for quality in figures:
        table = Table(
            title=f"prompt {quality.prompt_tokens} tokens, {quality.score_tokens} scored, {quality.windows} windows of "
            f"{quality.documents} held-out documents" + ("" if mode == "predicted" else f", read with {mode}"),
            caption="means over documents, 95 % bootstrap intervals",
            box=SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False,
        )  # fmt: skip
        table.add_column("", no_wrap=True, min_width=13)
        for name in quality.modes:
            table.add_column(name, justify="right", no_wrap=True)
        for metric, title in TITLES.items():
            estimates = (modes[metric] for modes in quality.modes.values())
            table.add_row(title, *(f"{e.mean:.3f} {e.low:.2f}-{e.high:.2f}" for e in estimates))
        console.print(table)
        for name, layers in quality.explained().items():
            every = len(layers) == len(quality.explained_variance["keys"])
            shown = " ".join(f"{v:.2f}" if every else f"{i}: {v:.2f}" for i, v in layers.items())
            console.print(f"explained variance of {name} by layer: {shown}", markup=False, highlight=False)
