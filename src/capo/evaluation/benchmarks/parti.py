"""PartiPrompts: prompts in 12 categories, without an official scorer (google-research/parti, Apache-2.0)."""

from __future__ import annotations

from capo.data.prompts import make_prompt
from capo.data.prompts.files import read_tsv
from capo.errors import InputError
from capo.evaluation.benchmarks.layout import Benchmark, numbered
from capo.evaluation.benchmarks.reading import official_file
from capo.evaluation.categories import groups_of

WHAT = "PartiPrompts.tsv (https://github.com/google-research/parti)"
FILE = "PartiPrompts.tsv"


def parti(
    path: str | None = None,
    hub: str | None = "nateraw/parti-prompts",
    revision: str | None = None,
    category: str = "Category",
    images: int = 4,
) -> Benchmark:
    """PartiPrompts by category; images are called `00000_0.png` by row and number.

    Args:
        path: PartiPrompts.tsv, which has no quoting; None: from the hub.
        hub: data set that has it.
        revision: its commit; None: main.
        category: column of the groups, `Category` or `Challenge`.
        images: images of a prompt.

    Raises:
        InputError: the list is not there, or lacks a column.
    """
    file, place = official_file(path, WHAT, hub, FILE, revision)

    def chosen(names):
        if missing := [name for name in ("Prompt", category) if name not in names]:
            raise InputError(f"{place}: no column '{missing[0]}'; there are {', '.join(names)}")
        return ["Prompt", category]

    texts: list[str] = []
    names: list[str] = []
    for batch in read_tsv(file, place, chosen):
        texts += batch["Prompt"]
        names += batch[category]
    prompts = [make_prompt(text, name) for text, name in zip(texts, names, strict=True)]
    return Benchmark("parti", prompts, images, numbered(len(prompts), images), groups=groups_of(names))
