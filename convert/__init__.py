"""Checkpoints in: CoreNet's KV Prediction and OpenELM checkpoints become MLX models."""
