"""The benchmark of HPSv2: prompts of four styles (tgxs002/HPSv2, Apache-2.0; prompts in zhwang/HPDv2)."""

from __future__ import annotations

from pathlib import Path

from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.evaluation.benchmarks.layout import Benchmark, Official, Picture
from capo.evaluation.benchmarks.reading import official_file, official_json
from capo.evaluation.categories import groups_of

WHAT = (
    "the folder with anime.json, concept-art.json, paintings.json and photo.json (zhwang/HPDv2, benchmark/)"
)
STYLES = ("anime", "concept-art", "paintings", "photo")
CHUNK = 80  # prompts over whose means the scorer states the spread


def hpsv2(
    path: str | None = None, hub: str | None = "zhwang/HPDv2", revision: str | None = None
) -> Benchmark:
    """HPSv2's lists and layout: `STYLE/00000.jpg`, one image of each of 800 prompts of each style.

    Args:
        path: folder with a JSON list of prompts for each style; None: from the hub.
        hub: data set whose folder `benchmark` has them.
        revision: its commit; None: main.

    Raises:
        InputError: a list is not there, or is none of texts.
    """
    lists = {}
    for style in STYLES:
        file, place = _list(path, style, hub, revision)
        texts = official_json(file, place)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{place}: must be a list of texts; get the file again")
        lists[style] = texts
    rows = [(style, row, text) for style, texts in lists.items() for row, text in enumerate(texts)]
    return Benchmark(
        "hpsv2",
        [make_prompt(text, style) for style, _, text in rows],
        1,
        [Picture(f"{style}/{row:05d}.jpg", number) for number, (style, row, _) in enumerate(rows)],
        groups=groups_of([style for style, _, _ in rows]),
        overall="groups",
        official=Official(
            "https://github.com/tgxs002/HPSv2",
            "python -c \"import hpsv2, sys; hpsv2.evaluate(sys.argv[1], hps_version='v2.1')\" {tree}",
            (
                "It prints mean and spread by style, and writes no file; the figures of `hpsv2` here are "
                "computed from the same images.",
                "Nothing else may stand in the folder: every entry is taken for a style.",
            ),
        ),
        factors={"hpsv2": 100.0},
        chunk=CHUNK,
        notes={"hpsv2": "100 x cosine by HPSv2, with the spread of the means of 80 prompts in a row."},
    )


def _list(path: str | None, style: str, hub: str | None, revision: str | None) -> tuple[Path, str]:
    if path is None:
        return official_file(None, WHAT, hub, f"benchmark/{style}.json", revision)
    folder, place = official_file(path, WHAT)
    return folder / f"{style}.json", f"{place}/{style}.json"
