"""The progress bar of every command that takes long."""

from kvpred_mlx.console import progress_bar

__all__ = ["progress_bar"]
