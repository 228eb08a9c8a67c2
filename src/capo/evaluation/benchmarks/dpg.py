"""DPG-Bench: long prompts, about which a visual question answerer is asked (TencentQQGYLab/ELLA)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from capo.data.prompts import make_prompt
from capo.data.prompts.text import decoded_lines
from capo.errors import InputError
from capo.evaluation.benchmarks.layout import Benchmark, Official, Picture
from capo.evaluation.benchmarks.reading import add_figure, means, official_file

WHAT = "DPG-Bench's folder of text files, dpg_bench/prompts (https://github.com/TencentQQGYLab/ELLA)"
IMAGES = 4  # that the scorer cuts out of a picture


def dpg(path: str | None = None) -> Benchmark:
    """DPG-Bench's list and layout: for each of 1065 text files, four images in one picture of its name.

    They stand from the top left to the bottom right, each as wide and high as the scorer's `RESOLUTION`.

    Args:
        path: folder with a text file for each prompt.

    Raises:
        InputError: the folder is not given or holds no text file, or a file's name has a dot in it, up to
            which alone the scorer reads it.
    """
    folder, place = official_file(path, WHAT)
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise InputError(f"{place}: it holds no *.txt; give the path of {WHAT}")
    for file in files:
        if "." in file.stem:
            raise InputError(
                f"{place}: of the name '{file.name}' the scorer reads '{file.stem.split('.')[0]}' alone; "
                "rename it"
            )
    return Benchmark(
        "dpg",
        [make_prompt("".join(decoded_lines(file, f"{place}/{file.name}"))) for file in files],
        IMAGES,
        [Picture(f"{file.stem}.png", number, tuple(range(IMAGES))) for number, file in enumerate(files)],
        square=True,
        official=Official(
            "https://github.com/TencentQQGYLab/ELLA",
            "mkdir -p {results} && accelerate launch --num_processes 1 --mixed_precision fp16 "
            "dpg_bench/compute_dpg_bench.py --image-root-path {tree} --resolution {width} --pic-num 4 "
            "--vqa-model mplug --res-path {results}/{row}.txt",
            (
                "dpg_bench/dist_eval.sh does the same, but writes its results among the images.",
                "Its scores by category count the last of the four images alone, a fault of the scorer; its "
                "overall score counts all four.",
            ),
            read_results,
        ),
    )


def read_results(place: Path, benchmark: Benchmark) -> dict[str, Tensor]:
    """Read the scorer's --res-path: the mean score of the images in each picture."""
    key = f"results={place}"
    found: dict[int, dict[int, float]] = {}
    numbers = {Path(picture.path).stem: picture.prompt for picture in benchmark.pictures}
    for line in decoded_lines(place, key):
        path, *figures = line.strip().rsplit(", ", IMAGES + 1)
        if len(figures) != IMAGES + 1:
            continue  # the summary
        stem = path.replace("\\", "/").rsplit("/", 1)[-1].split(".")[0]
        if stem not in numbers:
            raise InputError(
                f"{key}: it has a picture '{stem}', but no text file has that name; give this list's results"
            )
        try:
            read = [float(figure) for figure in figures[:IMAGES]]
        except ValueError as error:
            raise InputError(
                f"{key}: of '{stem}' it has no figures ({error}); run the scorer again"
            ) from error
        for image, figure in enumerate(read):
            add_figure(found, numbers[stem], image, figure, f"{key}: '{stem}'")
    return {"dpg": means(found, len(benchmark.prompts), IMAGES, key)}
