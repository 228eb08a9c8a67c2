"""A cell of a table -> a picture of the model's size -> pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Pillow raises all of these for bytes that are no picture, or half of one
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class BrokenImage(Exception):
    """An image that is missing or cannot be decoded; the message says why."""


def opened(cell: object, folder: Path) -> Image.Image:
    """The picture of a cell, not yet decoded: encoded bytes, `{bytes, path}` of which the bytes count, or a path in `folder`.

    Raises BrokenImage.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes")  # a path beside them names a file of the machine that wrote the table
    if not cell:
        raise BrokenImage("there is none")
    if not isinstance(cell, bytes | str):
        raise BrokenImage(f"a {type(cell).__name__} where encoded bytes or a path should be")
    try:
        return Image.open(io.BytesIO(cell) if isinstance(cell, bytes) else folder / cell)
    except UNREADABLE as error:
        raise BrokenImage(_reason(error)) from error


def check(cell: object, folder: Path) -> None:
    """Decodes the whole image, a JPEG at an eighth of its size, which shows a truncated file too. Raises BrokenImage."""
    with opened(cell, folder) as image:
        try:
            image.draft("RGB", (1, 1))
            _flat(image)
        except UNREADABLE as error:
            raise BrokenImage(_reason(error)) from error


def picture(cell: object, folder: Path, size: tuple[int, int]) -> Image.Image:
    """RGB image of `size` (width, height): turned as its EXIF says, alpha on white, the largest middle part of that shape, Lanczos.

    Raises BrokenImage.
    """
    with opened(cell, folder) as image:
        try:
            flat = _flat(ImageOps.exif_transpose(image))
            return flat.crop(middle(flat.size, size)).resize(size, Image.Resampling.LANCZOS)
        except UNREADABLE as error:
            raise BrokenImage(_reason(error)) from error


def middle(has: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """Box (left, upper, right, lower) of the largest middle part of an image of size `has` that has the shape of `wanted`."""
    width = min(has[0], max(1, round(has[1] * wanted[0] / wanted[1])))
    height = min(has[1], max(1, round(has[0] * wanted[1] / wanted[0])))
    left, upper = (has[0] - width) // 2, (has[1] - height) // 2
    return left, upper, left + width, upper + height


def _flat(image: Image.Image) -> Image.Image:
    """RGB; what shows through transparency is white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """B RGB images of one size -> (B, 3, H, W) float32 in [-1, 1], what an autoencoder takes."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def _reason(error: Exception) -> str:
    # Pillow names the buffer by its address, which differs from run to run
    return "it is no image that can be read" if "identify image" in str(error) else str(error)
