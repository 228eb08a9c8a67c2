"""Sections of evaluate.py and of studies: benchmarks, and how people are asked."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from capo.cli.schema.kinds import Called, Count, Folder, Images, Natural, Scenes, Seed, Text
from capo.cli.schema.rewards import Rewards
from capo.runtime.schema import Said, Section, key

Category = Literal["color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"]


class ListOnDisk(Section):
    """Arguments of a benchmark whose prompts the user has."""

    path: Text | None = key("file or folder of the prompts", None)


class GenEval(ListOnDisk):
    """Arguments of benchmark=geneval."""

    images: Images = key("images of a prompt", 4)


class Compbench(ListOnDisk):
    """Arguments of benchmark=t2i_compbench."""

    categories: Annotated[list[Category], Field(min_length=1)] = key(
        "categories that are drawn", list(get_args(Category))
    )
    images: Images = key("images of a prompt", 10)


HUB, REVISION = "id of a data set, used where path is null", "commit of the data set; null: the newest"


class Hpsv2(ListOnDisk):
    """Arguments of benchmark=hpsv2."""

    hub: Text | None = key(HUB, "zhwang/HPDv2")
    revision: Text | None = key(REVISION, None)


class Parti(ListOnDisk):
    """Arguments of benchmark=parti."""

    hub: Text | None = key(HUB, "nateraw/parti-prompts")
    revision: Text | None = key(REVISION, None)
    category: Literal["Category", "Challenge"] = key("column by which the table is divided", "Category")
    images: Images = key("images of a prompt", 4)


class ShapesBenchmark(Section):
    """Arguments of benchmark=shapes."""

    prompts: Scenes = key("number of prompts", 256)
    seed: Seed = key("seed of the prompts", 0)
    images: Images = key("images of a prompt", 4)


BENCHMARKS = {
    "capo.evaluation.benchmarks.dpg": ListOnDisk,
    "capo.evaluation.benchmarks.genai": ListOnDisk,
    "capo.evaluation.benchmarks.geneval": GenEval,
    "capo.evaluation.benchmarks.hpsv2": Hpsv2,
    "capo.evaluation.benchmarks.parti": Parti,
    "capo.evaluation.benchmarks.t2i_compbench": Compbench,
    "capo.shapes.benchmark.shapes": ShapesBenchmark,
}


class Benchmark(Section):
    """A benchmark whose images are drawn in the layout of its official scorer."""

    set: Annotated[Any, Called(BENCHMARKS)] = key("the benchmark's prompts and layout")
    seed: Seed = key("seed of the images")
    base: bool = key("also draw the base; false: the policy alone")
    rewards: Annotated[
        Literal["evaluation.rewards", "evaluation.oracle"] | Rewards,
        Said("evaluation.rewards, evaluation.oracle, or rewards by name (rewards@benchmark.rewards=NAME)"),
    ] = key("scorers in this process", group="rewards")


class Study(Section):
    """How people are asked which image looks better."""

    against: Folder | None = key("folder of another exported policy, in place of the base")
    prompts: Count = key("of the test prompts; each rater sees one pair for each")
    seed: Seed = key("which prompts, in which order, and which image on the left")
    checks: Natural = key("attention checks among a rater's pairs: an image beside a copy of it under noise")
    ties: bool = key("false: left or right, as in the paper")
    names: (
        Annotated[
            Annotated[list[Text], Field(min_length=2, max_length=2)],
            Said("two names, those of the policy and of what it is compared with"),
        ]
        | None
    ) = key("both sides in tables; null: tuned, and the model's name")
    host: Text = key("address on which the page is served; another one is open to whoever reaches it")
    port: Annotated[int, Field(ge=0, le=65535)] = key("port of the page; 0: any free one")
