"""GenAI-Bench: prompts of designers by skill, judged by VQAScore (linzhiqiu/t2v_metrics, Apache-2.0)."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.evaluation.benchmarks.layout import Benchmark, Official, Picture
from capo.evaluation.benchmarks.reading import official_file, official_json, text_of

WHAT = (
    "the folder with genai_image.json and genai_skills.json, GenAI-Image-1600 or -527, which the scorer "
    "downloads to its --root_dir (https://github.com/linzhiqiu/t2v_metrics, version 3.0)"
)
PUBLISHED = (527, 1600)  # prompts


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
    if odd := [key for key in records if not key.isdigit()]:
        raise InputError(f"{place}/genai_image.json: '{odd[0]}' is no number of a prompt; get the file again")
    numbers = {int(key): number for number, key in enumerate(records)}
    texts = [text_of(record, "prompt", f"{place}/genai_image.json: {key}") for key, record in records.items()]
    try:
        groups = {str(skill): [numbers[int(key)] for key in keys] for skill, keys in skills.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{place}/genai_skills.json: a skill has the prompt {error}, which genai_image.json lacks; get "
            "both from one set"
        ) from error
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
        scores = torch.load(place, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"results={place}: cannot be read ({error.strerror}); give the scorer's .pt"
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"results={place}: holds more or less than tensors; give the scorer's .pt"
        ) from error
    count = len(benchmark.prompts)
    if (
        not isinstance(scores, Tensor)
        or scores.ndim < 1
        or len(scores) != count
        or not scores.isfinite().all()
    ):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"results={place}: holds {shape}, not finite scores of {count} prompts; run the scorer again"
        )
    return {"genai": scores.double().reshape(count, -1).mean(1)}
