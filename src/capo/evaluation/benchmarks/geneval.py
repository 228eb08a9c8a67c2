"""GenEval: objects, counts, colors and positions, judged by an object detector (djghosh13/geneval, MIT)."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.evaluation.benchmarks.layout import Benchmark, Official, Picture
from capo.evaluation.benchmarks.reading import add_figure, means, official_file, read_records, text_of
from capo.evaluation.categories import groups_of

WHAT = "GenEval's prompts/evaluation_metadata.jsonl (https://github.com/djghosh13/geneval)"
# end of an image's path in the results
FOLDER = re.compile(r"\b(\d{1,9})[/\\]samples[/\\](\d{1,9})\.png$", re.ASCII)


def geneval(path: str | None = None, images: int = 4) -> Benchmark:
    """GenEval's list and layout; the published protocol draws 4 images of each of 553 prompts.

    Folder `00000` holds line 0 of the list as `metadata.jsonl`, and the images in `samples/`. The overall
    figure is the mean over the tags.

    Args:
        path: `evaluation_metadata.jsonl`.
        images: images of a prompt.

    Raises:
        InputError: the list is not given, or cannot be read.
    """
    file, place = official_file(path, WHAT)
    records = read_records(file, place)
    lines = [f"{place}: line {number}" for number in range(1, len(records) + 1)]
    tags = [text_of(record, "tag", line) for line, (_, record) in zip(lines, records, strict=True)]
    texts = [text_of(record, "prompt", line) for line, (_, record) in zip(lines, records, strict=True)]
    return Benchmark(
        "geneval",
        [make_prompt(text, tag) for text, tag in zip(texts, tags, strict=True)],
        images,
        [
            Picture(f"{number:05d}/samples/{image:05d}.png", number, (image,))
            for number in range(len(records))
            for image in range(images)
        ],
        {f"{number:05d}/metadata.jsonl": f"{line}\n" for number, (line, _) in enumerate(records)},
        groups_of(tags),
        overall="groups",
        official=Official(
            "https://github.com/djghosh13/geneval",
            "python evaluation/evaluate_images.py {tree} --outfile {results}/{row}.jsonl "
            "--model-path OBJECT_DETECTOR_FOLDER",
            (
                "It needs a GPU, mmdet 2 and an environment of its own (its environment.yml).",
                "The reference images were drawn with 50 steps and guidance 9.",
            ),
            read_results,
        ),
        notes={"geneval-hf": "GenEval's rules on another detector: not comparable with published figures."},
    )


def read_results(place: Path, benchmark: Benchmark) -> dict[str, Tensor]:
    """Read results.jsonl of evaluate_images.py: the share of a prompt's images that are correct."""
    key = f"results={place}"
    found: dict[int, dict[int, float]] = {}
    for number, (_, record) in enumerate(read_records(place, key), start=1):
        line = f"{key}: line {number}"
        folder = FOLDER.search(text_of(record, "filename", line))
        if folder is None or not isinstance(record.get("correct"), bool):
            raise InputError(
                f"{line}: no result of evaluate_images.py (filename, correct); give its --outfile"
            )
        prompt = int(folder[1])
        if prompt < len(benchmark.prompts) and (
            make_prompt(text_of(record, "prompt", line)).id != benchmark.prompts[prompt].id
        ):
            raise InputError(
                f"{line}: folder {folder[1]} has the prompt '{record['prompt']}', the list has "
                f"'{benchmark.prompts[prompt].text}'; give the list with which the images were drawn"
            )
        add_figure(found, prompt, int(folder[2]), float(record["correct"]), line)
    return {"geneval": means(found, len(benchmark.prompts), benchmark.images, key)}
