"""Calibrated preference optimization of text-to-image diffusion models with many rewards at once."""

import os

# transformers otherwise reports at import, before anything of ours, that torchvision is missing, which nothing here uses
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
