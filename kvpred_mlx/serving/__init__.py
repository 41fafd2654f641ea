"""mlx-lm's server with a pair."""
