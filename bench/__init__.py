"""Measurements: what the engine costs, side by side with what it replaces."""
