"""Write the images of a benchmark in the layout of its official scorer, with their seeds and its command."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from capo.data.images import GeneratedImages
from capo.data.prompts import candidate_seed
from capo.errors import DamagedFile, InputError
from capo.evaluation.benchmarks.layout import Benchmark, Picture
from capo.runtime.files import ELSEWHERE, check_inside, whole_file, write_json, write_table, write_whole
from capo.runtime.reading import read_bytes, read_json
from capo.runtime.run_folder import REPORT, RESULTS

IMAGES, SEEDS, README = "images", "images.csv", "README.md"
FILES = (README, SEEDS, RESULTS, REPORT)  # that are written beside the images
MARK = "benchmark.json"  # what the images of a folder belong to
COLUMNS = 2  # of a picture that shows several images
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}


def claim(folder: Path, row: str, settings: Mapping[str, object]) -> None:
    """Note in `folder` what the images of `row` follow from, or compare it with what stands there.

    Raises InputError, with the differences, for images of another benchmark, model or seed, and for files and
    a folder of images that this package did not write, or that lie elsewhere.
    """
    check_inside(folder, [IMAGES])
    mark = folder / MARK
    try:
        stored = read_json(mark, f"move the folder away, or {ELSEWHERE}")
    except FileNotFoundError:
        stored = {}
        if held := [name for name in FILES if os.path.lexists(folder / name)]:
            raise InputError(
                f"{folder} holds {', '.join(held)}, but no {MARK} of a benchmark, which would replace "
                f"{'it' if len(held) == 1 else 'them'}: move that away, or {ELSEWHERE}"
            ) from None
    if row not in stored:
        if os.path.lexists(folder / IMAGES / row):
            raise InputError(
                f"{folder / IMAGES / row} is there, but {MARK} does not name it, so this package did not "
                f"write it: move it away, or {ELSEWHERE}"
            )
        write_json(mark, {**stored, row: settings})
        return
    before = stored[row] if isinstance(stored[row], dict) else {}
    differing = [
        f"{key}: {before.get(key)} -> {settings.get(key)}"
        for key in dict.fromkeys([*before, *settings])
        if before.get(key) != settings.get(key)
    ]
    if differing:
        raise InputError(
            "\n  ".join([f"{folder / IMAGES / row} holds other images:", *differing])
            + f"\nmove {folder} away, or, unless it is in the directory of a run=DIR, {ELSEWHERE}"
        )


def write_tree(
    benchmark: Benchmark, drawn: GeneratedImages, tree: Path, progress: bool = True
) -> tuple[int, int]:
    """Write the files of `benchmark` that `tree` lacks, from images in their pool.

    A picture appears under its name complete or not at all, and nothing else stands in the tree meanwhile.

    Args:
        benchmark: prompts and layout.
        drawn: the images, in the pool of one model; its prompts are `benchmark.drawn`.
        tree: the folder.
        progress: whether to show a progress bar.

    Returns:
        Width and height of an image, in pixels.

    Raises:
        InputError: the scorer takes square images, and these are not.
    """
    for path, content in benchmark.texts.items():
        if not _holds(tree / path, content):
            write_whole(tree / path, content)
    todo: dict[int, list[Picture]] = {}
    for picture in benchmark.pictures:
        if not (tree / picture.path).exists():
            todo.setdefault(benchmark.places[picture.prompt], []).append(picture)
    unfinished = tree.with_name(f".{tree.name}.unfinished")
    backbone = drawn.generator.backbone
    with backbone.placed(backbone.vae):
        size = drawn.images(0)[0].size
        if benchmark.square and size[0] != size[1]:
            raise InputError(
                f"benchmark {benchmark.name}: its scorer takes square images, the model draws {size[0]} x "
                f"{size[1]}; choose a model that draws square ones"
            )
        for place, pictures in tqdm(
            todo.items(), desc=f"{benchmark.name} of {tree.name}", unit="prompt", disable=not progress
        ):
            images = drawn.images(place)
            for picture in pictures:
                with whole_file(tree / picture.path, unfinished=unfinished) as file:
                    _save([images[number] for number in picture.images], file, picture.path)
    return size


def _holds(path: Path, content: str) -> bool:
    try:
        return read_bytes(path, "") == content.encode()
    except (OSError, DamagedFile):  # what is no ordinary file is refused where it would be replaced
        return False


def _save(images: Sequence[Image.Image], file: Path, name: str) -> None:
    kept = JPEG if name.endswith((".jpg", ".jpeg")) else {"format": "PNG"}
    (images[0] if len(images) == 1 else tiled(images)).convert("RGB").save(file, **kept)


def tiled(images: Sequence[Image.Image]) -> Image.Image:
    """Put images of one size side by side, two in a row, from the top left."""
    width, height = images[0].size
    whole = Image.new("RGB", (COLUMNS * width, -(-len(images) // COLUMNS) * height))
    for number, image in enumerate(images):
        row, column = divmod(number, COLUMNS)
        whole.paste(image, (column * width, row * height))
    return whole


def write_seeds(benchmark: Benchmark, seed: int, folder: Path) -> None:
    """Write images.csv: a row for each image, with its file in the trees, its prompt and its seed."""
    rows = []
    for picture in benchmark.pictures:
        prompt = benchmark.prompts[picture.prompt]
        rows += [
            {
                "file": picture.path,
                "image": image,
                "seed": candidate_seed(seed, prompt.id, image),
                "prompt_id": prompt.id,
                "category": prompt.category,
                "prompt": prompt.text,
            }
            for image in picture.images
        ]
    write_table(folder / SEEDS, list(rows[0]), rows)


def readme(
    benchmark: Benchmark,
    folder: Path,
    settings: Mapping[str, Mapping[str, object]],
    size: tuple[int, int],
    asked: Sequence[str],
) -> str:
    """README of a benchmark's folder: what was drawn, from which seeds, and how it is scored officially.

    Args:
        benchmark: what was drawn.
        folder: the folder.
        settings: row -> what its images follow from (`claim`).
        size: width and height of an image, in pixels.
        asked: the command line's arguments for the benchmark.
    """
    keys = list(next(iter(settings.values())))
    lines = [
        f"# {benchmark.name}",
        "",
        f"{len(benchmark.prompts)} prompts, {benchmark.images} images of each by {' and '.join(settings)}, "
        f"{size[0]} x {size[1]} pixels.",
        f"`{SEEDS}` has the seed of each image, a function of `seed`, the prompt and the image's number.",
        "What is drawn is the official prompt in Unicode NFC, with each run of white space as one space.",
        "",
        f"| | {' | '.join(settings)} |",
        f"|---|{'---|' * len(settings)}",
        *(f"| {key} | {' | '.join(str(known[key]) for known in settings.values())} |" for key in keys),
        "",
    ]
    official = benchmark.official
    if official is None:
        return "\n".join([*lines, f"There is no official scorer: the figures are those of {REPORT}.", ""])
    lines += [f"Official scorer: {official.source}; in its own folder and environment:", "", "```"]
    for row in settings:
        places = {"tree": folder / IMAGES / row, "folder": folder / IMAGES, "results": folder / "results"}
        known = {name: shlex.quote(str(place.absolute())) for name, place in places.items()}
        lines.append(official.command.format(row=row, width=size[0], prompts=len(benchmark.prompts), **known))
    lines += ["```", "", *official.remarks, ""]
    if official.read is not None:
        command = shlex.join(["python", "evaluate.py", *asked])
        lines += [
            "What it wrote becomes a table with intervals and tests:",
            "",
            "```",
            f"{command} 'results=[{','.join(row.upper() for row in settings)}]'",
            "```",
            "",
        ]
    return "\n".join(lines)
