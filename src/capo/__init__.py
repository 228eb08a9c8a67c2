"""Calibrated preference optimization of text-to-image diffusion models with many rewards at once."""
