"""The precision in which pure functions compute."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The tensor in float64 if it is that, else in float32; any shape."""
    return values if values.dtype == torch.float64 else values.float()
