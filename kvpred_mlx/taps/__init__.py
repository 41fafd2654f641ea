"""Any mlx-lm model, seen and replaced from outside; nothing here knows of pairs."""
