"""Quality of a pair on tasks, mode by mode: `kvpred-mlx eval`."""
