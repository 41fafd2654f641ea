"""The family `kvpred` as mlx-lm finds it, under the name `mlx_lm.models.kvpred` (see `kvpred_mlx._registration`)."""

from kvpred_mlx.pair.model import Model, ModelArgs

__all__ = ["Model", "ModelArgs"]
