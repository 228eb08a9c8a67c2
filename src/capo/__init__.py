"""Calibrated preference optimization of text-to-image diffusion models with many rewards at once."""

import os

# otherwise transformers reports at import that torchvision is missing, which this package does not use
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
