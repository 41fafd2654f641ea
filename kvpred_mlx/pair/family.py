"""The family `kvpred` as mlx-lm finds it, under the name `mlx_lm.models.kvpred` (see `kvpred_mlx._registration`)."""

from kvpred_mlx.pair.config import ModelArgs
from kvpred_mlx.pair.saved_model import Model

__all__ = ["Model", "ModelArgs"]
