"""Show images of base and policy for the same prompts and seeds, in a PNG grid or in a report's gallery."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from capo.data.images import Scores, Side
from capo.evaluation.diversity import Pictures, sampled_rows
from capo.runtime.files import write_whole
from capo.win_rates import win_rate

SMALL = 160  # pixels; images with sides up to this are embedded in a page losslessly
LONGEST = 10_000  # characters of a prompt that are measured for its label
LARGEST = 384  # pixels; longest side of images embedded in a page
INK, FAINT, PAPER = (28, 30, 34), (110, 114, 122), (255, 255, 255)
PAD, LINE = 8, 15  # pixels; space between the cells of a grid, and line height of its text


@dataclass(frozen=True)
class Change:
    """A reward or oracle measure on one prompt: means over images, and for a reward the win-rate `rate`."""

    name: str
    base: float
    policy: float
    rate: float | None = None


@dataclass(frozen=True)
class Exhibit:
    """A prompt in the gallery: images of base and policy with the same seeds, and the changes of its scores.

    `gain` is the win-rate minus 1/2, averaged over rewards. `places` maps each order of the gallery that
    shows the prompt ("gain", "loss", "plain") to the prompt's rank in it.
    """

    prompt: str
    category: str
    gain: float
    changes: Sequence[Change]
    base: Sequence[Image.Image]
    policy: Sequence[Image.Image]
    places: Mapping[str, int]


def gains(policy_scores: Scores, base_scores: Scores) -> Tensor:
    """Win-rate of each prompt minus 1/2, averaged over rewards: raw scores (P, K) per reward -> (P,)."""
    rates = [win_rate(policy_scores[name], base_scores[name]).double() for name in policy_scores]
    return torch.stack(rates).mean(0) - 0.5


def ranking(policy_scores: Scores, base_scores: Scores) -> list[int]:
    """Indices of the prompts from the largest gain to the smallest.

    K images per prompt give few distinct gains. Ties are broken by the mean change of scores, in standard
    deviations of the base's scores, then by the order of the prompts.
    """
    moved = [
        (policy_scores[name].double().mean(1) - base.double().mean(1)) / base.double().std().clamp_min(1e-12)
        for name, base in base_scores.items()
    ]
    first, second = gains(policy_scores, base_scores).tolist(), torch.stack(moved).mean(0).tolist()
    return sorted(range(len(first)), key=lambda place: (-first[place], -second[place], place))


def chosen_prompts(order: Sequence[int], count: int) -> dict[str, list[int]]:
    """Choose at most `count` prompts for each order of the gallery.

    "gain" holds the first of `order`, "loss" the last, worst first, and "plain" prompts evenly spaced over
    the whole set, as an unselected sample.
    """
    plain = sampled_rows(len(order), count)
    return {"gain": list(order[:count]), "loss": list(order[::-1][:count]), "plain": plain}


def exhibits(
    policy: Side, base: Side, chosen: Mapping[str, Sequence[int]], pictures: Pictures
) -> list[Exhibit]:
    """Return the prompts of the gallery, in the set's order.

    Args:
        policy: one side of the comparison.
        base: the other one.
        chosen: rows of the prompts in each order, by `chosen_prompts`.
        pictures: row -> images of policy and base.
    """
    margins = gains(policy.scores, base.scores)

    def exhibit(row: int) -> Exhibit:
        prompt = policy.drawn.spec.prompts[row]
        places = {order: rows.index(row) for order, rows in chosen.items() if row in rows}
        ours, theirs = pictures(row)
        moved = changes(policy, base, row)
        return Exhibit(prompt.text, prompt.category, margins[row].item(), moved, theirs, ours, places)

    return [exhibit(row) for row in sorted({row for rows in chosen.values() for row in rows})]


def changes(policy: Side, base: Side, row: int) -> list[Change]:
    """Changes of prompt `row`: of all rewards, then of all oracle measures."""

    def change(name: str, ours: Tensor, theirs: Tensor, rate: float | None = None) -> Change:
        return Change(name, theirs[row].double().mean().item(), ours[row].double().mean().item(), rate)

    found = []
    for name, ours in policy.scores.items():
        theirs = base.scores[name]
        found.append(change(name, ours, theirs, win_rate(ours[row, None], theirs[row, None]).item()))
    for name, ours in (policy.measures or {}).items():
        found.append(change(f"oracle: {name}", ours, base.measures[name]))
    return found


def data_uri(image: Image.Image) -> str:
    """Encode an image as a data URI: PNG if small, else JPEG scaled to at most LARGEST pixels a side."""
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.convert("RGB")
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_grid(
    base_images: Sequence[Image.Image],
    policy_images: Sequence[Image.Image] | None,
    prompts: Sequence[str],
    path: str | Path,
    columns: int = 8,
    cell: int = 128,
) -> None:
    """Write a PNG with one column per prompt: the base's image, the policy's below it, then the prompt.

    Image i of both belongs to `prompts[i]` and has the same seed; if `policy_images` is None, only the base
    is shown. Images are reduced to `cell` pixels, or enlarged by a whole factor up to that size. Beyond
    `columns` prompts the grid continues in further bands. Raises ValueError if the numbers of images and
    prompts differ or are 0.
    """
    rows = {"base": base_images} | ({} if policy_images is None else {"tuned": policy_images})
    if not prompts or any(len(images) != len(prompts) for images in rows.values()):
        raise ValueError(
            f"a grid needs an image for each prompt: {len(prompts)} prompts, "
            f"{ {name: len(images) for name, images in rows.items()} } images"
        )
    columns = math.ceil(len(prompts) / math.ceil(len(prompts) / columns))  # bands of nearly equal length
    sheets = []
    for part in (slice(start, start + columns) for start in range(0, len(prompts), columns)):
        sheets.append(
            _sheet({name: images[part] for name, images in rows.items()}, prompts[part], columns, cell)
        )
    whole = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())


def _sheet(
    rows: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str], columns: int, cell: int
) -> Image.Image:
    """Draw one band of a grid: the rows' images in columns of width `cell`, their prompts below."""
    font, margin = ImageFont.load_default(12), 50
    labels = [wrapped(prompt, font, cell) for prompt in prompts]
    height = len(rows) * (cell + PAD) + max(map(len, labels)) * LINE + 2 * PAD
    sheet = Image.new("RGB", (margin + columns * (cell + PAD), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        top = PAD + row * (cell + PAD)
        draw.text((PAD, top + cell // 2 - LINE // 2), name, FAINT, font)
        for column, image in enumerate(images):
            picture = _fitted(image, cell)
            offset = (cell - picture.width) // 2, (cell - picture.height) // 2
            sheet.paste(picture, (margin + column * (cell + PAD) + offset[0], top + offset[1]))
    for column, lines in enumerate(labels):
        for number, line in enumerate(lines):
            left, top = margin + column * (cell + PAD), len(rows) * (cell + PAD) + PAD + number * LINE
            draw.text((left, top), line, INK, font)
    return sheet


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """Resize to at most `cell` pixels a side: by a whole factor without interpolation, or reduced."""
    image = image.convert("RGB")
    factor = cell // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return image


def wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int = 6
) -> list[str]:
    """Wrap `text` into lines of at most `width` pixels; split longer words, and cut after `lines` lines."""
    result = [""]
    for word in text[:LONGEST].split():
        if len(result) > lines + 1:  # more than are shown, although the first may be empty
            break
        while font.getlength(word) > width and len(result) <= lines + 1:
            cut = max(math.floor(len(word) * width / font.getlength(word)) - 1, 1)
            result, word = [*result, word[:cut]], word[cut:]
        longer = f"{result[-1]} {word}".strip()
        result = [*result[:-1], longer] if font.getlength(longer) <= width else [*result, word]
    result = [line for line in result if line] or [""]
    return result if len(result) <= lines else [*result[: lines - 1], result[lines - 1][:-2] + "..."]
