"""A pair of models as one mlx-lm model: its parts, its prompt cache, loading and saving."""
