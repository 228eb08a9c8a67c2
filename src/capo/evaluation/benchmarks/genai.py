"""GenAI-Bench: prompts of designers by skill, judged by VQAScore (linzhiqiu/t2v_metrics, Apache-2.0)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from capo.data.prompts import make_prompt
from capo.errors import DamagedFile, InputError
from capo.evaluation.benchmarks.layout import Benchmark, Official, Picture
from capo.evaluation.benchmarks.reading import entries_of, index_of, official_file, official_json, text_of
from capo.runtime.reading import open_ordinary
from capo.runtime.schema import shown

WHAT = (
    "the folder with genai_image.json and genai_skills.json, GenAI-Image-1600 or -527, which the scorer "
    "downloads to its --root_dir (https://github.com/linzhiqiu/t2v_metrics, version 3.0)"
)
PUBLISHED = (527, 1600)  # prompts
NUMBER = re.compile(r"[0-9]{1,15}")
REMEDY = "give the scorer's .pt"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def genai(path: str | None = None) -> Benchmark:
    """GenAI-Bench's list and layout: one JPEG a prompt, called by its key, `00000.jpeg`.

    Groups are the skills of genai_skills.json, which overlap; the overall figure counts each prompt of any
    skill once.

    Args:
        path: folder with genai_image.json and genai_skills.json.

    Raises:
        InputError: the files are not given or cannot be read, or a skill has a prompt that is not listed.
    """
    folder, place = official_file(path, WHAT)
    records = official_json(folder / "genai_image.json", f"{place}/genai_image.json")
    skills = official_json(folder / "genai_skills.json", f"{place}/genai_skills.json")
    if not isinstance(records, dict) or not isinstance(skills, dict):
        raise InputError(
            f"{place}: genai_image.json and genai_skills.json must hold entries by name; get them again"
        )
    numbers: dict[int, int] = {}
    for number, key in enumerate(records):
        if not NUMBER.fullmatch(key):
            told = f"'{shown(key)}' is no number of a prompt"
            raise InputError(f"{place}/genai_image.json: {told}; get the file again")
        if numbers.setdefault(int(key), number) != number:
            raise InputError(f"{place}/genai_image.json: two entries are of prompt {key}; get the file again")
    texts = [text_of(record, "prompt", f"{place}/genai_image.json: {key}") for key, record in records.items()]
    groups = {
        str(skill): _listed(keys, numbers, f"{place}/genai_skills.json: {skill}")
        for skill, keys in skills.items()
    }
    remarks = ["Its environment needs t2v-metrics 3.0: later versions no longer have clip-flant5."]
    if len(texts) not in PUBLISHED:
        remarks.append(
            f"This list has {len(texts)} prompts; the scorer takes {' or '.join(map(str, PUBLISHED))}."
        )
    return Benchmark(
        "genai",
        [make_prompt(text) for text in texts],
        1,
        [Picture(f"{key}.jpeg", number) for number, key in enumerate(records)],
        groups=groups,
        official=Official(
            "https://github.com/linzhiqiu/t2v_metrics",
            "python genai_bench/evaluate.py --model clip-flant5-xxl --output_dir {folder} --gen_model {row} "
            "--num_prompts {prompts} --result_dir {results}",
            remarks,
            read_results,
        ),
        notes={
            "vqascore": "VQAScore with CLIP-FlanT5 as this package computes it; the official one is bfloat16."
        },
    )


def read_results(place: Path, benchmark: Benchmark) -> dict[str, Tensor]:
    """Read the scorer's .pt: scores (P, 1) in the order of genai_image.json."""
    try:
        with open_ordinary(place, partial(DamagedFile, remedy=REMEDY)) as file:
            scores = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"results={place}: there is no such file; {REMEDY}") from error
    except (DamagedFile, MemoryError):
        raise
    except Exception as error:  # what pickle and torch raise for other bytes has no common class
        raise InputError(f"results={place}: holds more or less than tensors; {REMEDY}") from error
    count = len(benchmark.prompts)
    if not _is_scores(scores, count):
        kind = type(scores).__name__
        told = f"{tuple(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else kind
        raise InputError(
            f"results={place}: holds {told}, not finite scores of {count} prompts; run the scorer again"
        )
    return {"genai": scores.double().reshape(count, -1).mean(1)}


def _is_scores(scores: object, count: int) -> bool:
    return (
        isinstance(scores, Tensor)
        and scores.layout is torch.strided
        and scores.dtype in DTYPES
        and scores.device.type == "cpu"
        and scores.ndim >= 1
        and len(scores) == count
        and scores.numel() >= count
        and bool(scores.isfinite().all())
    )


def _listed(keys: object, numbers: Mapping[int, int], place: str) -> list[int]:
    """Numbers of the prompts that a skill lists."""
    listed = [index_of(key, f"{place}: an entry") for key in entries_of(keys, place)]
    if lacking := [key for key in listed if key not in numbers]:
        raise InputError(
            f"{place}: a skill has the prompt {lacking[0]}, which genai_image.json lacks; get both from one "
            "set"
        )
    return [numbers[key] for key in listed]
