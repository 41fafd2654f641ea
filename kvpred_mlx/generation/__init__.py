"""mlx-lm's generation with a pair: time to first token, drafts, repair, conversations."""
