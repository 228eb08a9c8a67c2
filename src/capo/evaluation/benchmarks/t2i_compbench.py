"""T2I-CompBench(++): attributes, relations, numbers and all of them (Karine-Huang/T2I-CompBench, MIT)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from capo.data.prompts import make_prompt
from capo.data.prompts.text import decoded_lines
from capo.errors import InputError
from capo.evaluation.benchmarks.layout import Benchmark, Official, Picture
from capo.evaluation.benchmarks.reading import (
    add_figure,
    entries_of,
    index_of,
    means,
    number_of,
    official_file,
    official_json,
)
from capo.evaluation.categories import groups_of

WHAT = "T2I-CompBench's lists, examples/dataset (https://github.com/Karine-Huang/T2I-CompBench)"
# category -> where its scorer writes its figures, below the folder of the category
RESULTS = {
    "color": "annotation_blip",
    "shape": "annotation_blip",
    "texture": "annotation_blip",
    "spatial": "labels/annotation_obj_detection_2d",
    "3d_spatial": "labels/annotation_obj_detection_3d",
    "numeracy": "annotation_num",
    "non_spatial": "annotation_clip",
    "complex": "annotation_3_in_1",
}
ATTRIBUTES = "python BLIPvqa_eval/BLIP_vqa.py --out_dir={{tree}}/{0}"
DETECTION = "(cd UniDet_eval && python {1} --outpath={{tree}}/{0})"
COMMANDS = {
    "color": ATTRIBUTES,
    "shape": ATTRIBUTES,
    "texture": ATTRIBUTES,
    "spatial": DETECTION.replace("{1}", "2D_spatial_eval.py"),
    "3d_spatial": DETECTION.replace("{1}", "3D_spatial_eval.py"),
    "numeracy": DETECTION.replace("{1}", "numeracy_eval.py"),
    "non_spatial": "python CLIPScore_eval/CLIP_similarity.py --outpath={{tree}}/{0}",
    "complex": "\n".join(
        (
            ATTRIBUTES,
            "(cd UniDet_eval && python 2D_spatial_eval.py --outpath={{tree}}/{0} --complex=True)",
            "cp -r {{tree}}/{0}/labels/annotation_obj_detection_2d {{tree}}/{0}/annotation_obj_detection",
            "python CLIPScore_eval/CLIP_similarity.py --outpath={{tree}}/{0} --complex=True",
            "(cd 3_in_1_eval && python 3_in_1.py --outpath={{tree}}/{0})",
        )
    ),
}


def t2i_compbench(
    path: str | None = None, categories: Sequence[str] = tuple(RESULTS), images: int = 10
) -> Benchmark:
    """T2I-CompBench's lists and layout: one folder a category, whose images are called by their prompt.

    Image k of row r is `samples/{prompt}_{images * r + k:06}.png`; the published protocol draws 10 images of
    each of 300 prompts. The scorers read the prompt from the name, up to the first `_`.

    Args:
        path: folder with `color_val.txt` and the other lists, one prompt a line.
        categories: names of the lists to draw.
        images: images of a prompt.

    Raises:
        InputError: the lists are not given, a category is unknown, or a prompt cannot be read from a name.
    """
    folder, place = official_file(path, WHAT)
    if unknown := [name for name in categories if name not in RESULTS]:
        raise InputError(
            f"benchmark.set.categories: {', '.join(map(str, unknown))} is unknown; there are "
            f"{', '.join(RESULTS)}"
        )
    lists = {name: _rows(folder / f"{name}_val.txt", f"{place}/{name}_val.txt") for name in categories}
    rows = [(name, row, text) for name, texts in lists.items() for row, text in enumerate(texts)]
    return Benchmark(
        "t2i_compbench",
        [make_prompt(text, name) for name, _, text in rows],
        images,
        [
            Picture(f"{name}/samples/{text}_{images * row + image:06d}.png", number, (image,))
            for number, (name, row, text) in enumerate(rows)
            for image in range(images)
        ],
        groups=groups_of([name for name, _, _ in rows]),
        overall=None,
        official=Official(
            "https://github.com/Karine-Huang/T2I-CompBench",
            "\n".join(COMMANDS[name].format(name) for name in categories),
            (
                "Nothing may be added to the folders `samples`: the scorers read every file in them.",
                "3_in_1.py, which scores `complex`, looks for the detections in another folder than their "
                "scorer writes them to; hence the copy.",
                "Results are read from the folder of the categories: results=FOLDER/images/policy.",
            ),
            read_results,
        ),
        factors={"clip_b32": 0.01},
        notes={
            "t2i_compbench": "Each category has a scorer of its own, so categories cannot be compared.",
            "clip_b32": "The official measure of non_spatial, the cosine of CLIP B/32.",
            "blip-vqa-hf": "BLIP-VQA on transformers' BLIP: not comparable with published figures.",
        },
        measured={"clip_b32": ("non_spatial",), "blip-vqa-hf": ("color", "shape", "texture")},
    )


def _rows(file: Path, place: str) -> list[str]:
    """Prompts of a list, in the order of its lines, some of which end in CRLF."""
    texts = [line.strip() for line in decoded_lines(file, place)]
    while texts and not texts[-1]:
        texts.pop()
    for number, text in enumerate(texts, start=1):
        if bad := [character for character in "/_" if character in text] + ([] if text else ["no text"]):
            raise InputError(
                f"{place}: line {number} ('{text[:80]}') has {bad[0]}: its scorer reads the prompt from the "
                "name of a file, up to the first _; give the official list"
            )
    return texts


def read_results(place: Path, benchmark: Benchmark) -> dict[str, Tensor]:
    """Read vqa_result.json of each category below `place`; figures of a prompt's images are averaged."""
    values = torch.zeros(len(benchmark.prompts), dtype=torch.float64)
    for name, numbers in benchmark.groups.items():
        file = place / name / RESULTS[name] / "vqa_result.json"
        key = f"results={file}"
        found: dict[int, dict[int, float]] = {}
        for number, entry in enumerate(entries_of(official_json(file, key), key)):
            here = f"{key}: entry {number}"
            if not isinstance(entry, dict) or not {"question_id", "answer"} <= entry.keys():
                raise InputError(f"{here} has no question_id with an answer; run the scorer again")
            row, image = divmod(index_of(entry["question_id"], f"{here}: question_id"), benchmark.images)
            add_figure(found, row, image, number_of(entry["answer"], f"{here}: answer"), here)
        values[list(numbers)] = means(found, len(numbers), benchmark.images, key)
    return {"t2i_compbench": values}
