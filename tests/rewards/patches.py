"""How Qwen's image processors cut a picture into patches, written out."""

import numpy as np
import torch
from torch import Tensor


def cut(pixels: np.ndarray, patch: int, merge: int) -> Tensor:
    """(H, W, 3) -> (patches, 3 x 2 x patch x patch): squares of `merge` patches together, every pixel twice for the two moments of a still."""
    rows, columns = (side // patch for side in pixels.shape[:2])
    found = []
    for top in range(0, rows, merge):
        for left in range(0, columns, merge):
            for row in range(top, top + merge):
                for column in range(left, left + merge):
                    piece = pixels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].transpose(2, 0, 1)
                    found.append(np.stack([piece, piece], axis=1).ravel())
    return torch.from_numpy(np.stack(found)).float()
