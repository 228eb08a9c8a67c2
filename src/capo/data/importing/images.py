"""Images of imported data: cell of a table -> image of the model's size -> pixels."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from capo.errors import first_line


class BrokenImage(Exception):
    """Error for an image that is missing or cannot be decoded; the message says why."""


def opened(cell: object, folder: Path) -> Image.Image:
    """Open the image in a cell, without decoding it; raises BrokenImage.

    A cell has encoded bytes, a mapping `{bytes, path}`, of which the bytes are used, or a path relative to
    `folder`.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes")  # the path belongs to the machine that wrote the table
    if not cell:
        raise BrokenImage("there is none")
    if not isinstance(cell, bytes | str):
        raise BrokenImage(f"a {type(cell).__name__} where encoded bytes or a path should be")
    with decoding():
        if isinstance(cell, str) and (folder / cell).exists() and not (folder / cell).is_file():
            raise BrokenImage("it is no ordinary file")  # a pipe would be waited for
        return Image.open(io.BytesIO(cell) if isinstance(cell, bytes) else folder / cell)


@contextmanager
def decoding() -> Iterator[None]:
    """Turn what goes wrong in the block into BrokenImage; each of Pillow's decoders has errors of its own."""
    try:
        yield
    except (BrokenImage, MemoryError):
        raise
    except Exception as error:
        raise BrokenImage(_reason(error)) from error


def check(cell: object, folder: Path) -> None:
    """Decode an image to check that it is complete; raises BrokenImage.

    A JPEG is decoded at an eighth of its size, which also detects a truncated file.
    """
    with opened(cell, folder) as image, decoding():
        image.draft("RGB", (1, 1))
        _flat(image)


def picture(cell: object, folder: Path, size: tuple[int, int]) -> Image.Image:
    """Read an image as RGB in `size` (width, height); raises BrokenImage.

    It is rotated by its EXIF orientation, composited on white, cropped to the largest centered box of that
    aspect ratio, and resized with Lanczos.
    """
    with opened(cell, folder) as image, decoding():
        flat = _flat(ImageOps.exif_transpose(image))
        return flat.crop(middle(flat.size, size)).resize(size, Image.Resampling.LANCZOS)


def middle(has: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """Largest centered box of an image of size `has` with the aspect ratio of the size `wanted`.

    Sizes are (width, height); the box is (left, upper, right, lower), in pixels.
    """
    width = min(has[0], max(1, round(has[1] * wanted[0] / wanted[1])))
    height = min(has[1], max(1, round(has[0] * wanted[1] / wanted[0])))
    left, upper = (has[0] - width) // 2, (has[1] - height) // 2
    return left, upper, left + width, upper + height


def _flat(image: Image.Image) -> Image.Image:
    """Convert to RGB, with transparent parts composited on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """B RGB images of one size -> (B, 3, H, W) float32 in [-1, 1], the input of a VAE."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def _reason(error: Exception) -> str:
    # Pillow's message contains the address of the buffer, which differs between runs
    return "it is no image that can be read" if "identify image" in str(error) else first_line(error)
