"""Preprocessing of CLIP's published code, on Pillow: shortest side to the model's, center crop, normalize.

transformers' image processor crops one row or column earlier where the rest is odd.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Mean and standard deviation of the channels of CLIP's training images.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def cropped(image: Image.Image, side: int) -> Tensor:
    """Convert an image to (3, side, side): shortest side to `side` (bicubic), center crop, normalize.

    Sizes and the corner of the crop are rounded as in torchvision.
    """
    shortest = min(image.size)
    image = image.convert("RGB").resize(
        [int(side * length / shortest) for length in image.size], Image.Resampling.BICUBIC
    )
    left, top = (round((length - side) / 2) for length in image.size)
    pixels = (
        torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)))).permute(2, 0, 1).float()
        / 255
    )
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
