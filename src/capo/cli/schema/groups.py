"""Groups whose choice calls a function: objectives, pairs, prompts, imports and loggers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from capo.cli.schema.kinds import Argument, Called, Count, Positive, Scenes, Seed, Text, TwoOrMore
from capo.runtime import limits
from capo.runtime.schema import Said, Section, key


class Beta(Section):
    """Arguments of CaPO, DPO and IPO."""

    beta: Positive = key("strength of the pull towards the reference; the model's own by default")


class Sft(Section):
    """Arguments of SFT."""

    beta: Positive | None = key("is ignored", None)


class Dmpo(Beta):
    """Arguments of DMPO."""

    flip: Annotated[float, Field(gt=0, lt=0.5), Said("a number above 0 and below 0.5")] = key(
        "chance with which the preference that is aimed at is wrong", 0.01
    )


class LinearDpo(Beta):
    """Arguments of Linear-DPO."""

    eta: Annotated[float, Field(ge=0, lt=0.5), Said("a number from 0 to less than 0.5")] = key(
        "bounds of the factor of a pair: from eta to 1 - eta", 0.001
    )


class Mapo(Section):
    """Arguments of MaPO, whose beta is a share of the loss."""

    beta: Positive = key("share of the preference in the loss")
    scale: Positive = key("factor of an error in its odds", 0.5)
    factor: Positive = key("factor of the difference of the odds", 1000.0)


class Sdpo(Beta):
    """Arguments of Diffusion-SDPO."""

    mu: Annotated[float, Field(ge=0, le=1)] = key("share of the winner's progress that is kept")


class Smpo(Beta):
    """Arguments of SmPO."""

    gamma: Positive = key("factor of dR; dpo where dR = 1 / gamma", 1.0)


OBJECTIVES = {
    "capo.objectives.capo": Beta,
    "capo.objectives.capo_group": Beta,
    "capo.objectives.dmpo": Dmpo,
    "capo.objectives.dpo": Beta,
    "capo.objectives.hinge": Beta,
    "capo.objectives.ipo": Beta,
    "capo.objectives.kto": Beta,
    "capo.objectives.linear_dpo": LinearDpo,
    "capo.objectives.mapo": Mapo,
    "capo.objectives.sdpo": Sdpo,
    "capo.objectives.sft": Sft,
    "capo.objectives.smpo": Smpo,
}


class NoArguments(Section):
    """Arguments of a strategy that takes none."""


class Sum(Section):
    """Arguments of pairs=sum."""

    weights: Annotated[list[float], Said("a list of finite numbers")] | None = key(
        "one number per reward, in the order of their names; null: equal", None
    )


class Frs(Section):
    """Arguments of pairs=frs."""

    lower: Literal["frontier", "all_dominated"] = key(
        "all_dominated: every dominated candidate is a loser", "frontier"
    )
    depth: Count | None = key(
        "smallest number of winners, and of losers, of a prompt: further fronts fill them up; null: the "
        "frontiers as they are",
        None,
    )


PAIRS = {
    "capo.pairs.best_worst": NoArguments,
    "capo.pairs.frs": Frs,
    "capo.pairs.random_pair": NoArguments,
    "capo.pairs.reward_sum": Sum,
}


class PromptFile(Section):
    """Source of one split's prompts."""

    name: str = key("name of the set in the report; empty: the file's name", "")
    origin: Text = key("what the set is and where to get it, for messages", "a file of prompts")
    path: Text | None = key("a file, a folder or a pattern with * here; null: read from the hub", None)
    hub: Text | None = key("id of a data set", None)
    file: (
        Annotated[
            Text | Annotated[list[Text], Field(min_length=1)],
            Said("the name of a file in the data set, or a list of them"),
        ]
        | None
    ) = key("name of a file in the data set, or a list of names", None)
    revision: Text | None = key("commit of the data set; null: the newest", None)
    format: Literal["text", "folder", "csv", "tsv", "jsonl", "parquet"] | None = key(
        "format of the file; null: by its ending", None
    )
    column: Text | None = key("column of the prompts; null: the one called prompt, in any case", None)
    category: Text | None = key("column by which reports are divided; null: none", None)
    nsfw: Positive | None = key(
        "leaves out prompts whose score reaches it, whose switch is on, or without a value; null: no filter",
        0.5,
    )
    nsfw_columns: Annotated[list[Text], Said("a list of columns")] | None = key(
        "columns to filter by; null: all with nsfw or unsafe in their names", None
    )
    where: Annotated[dict[Text, Any], Said("a mapping {column: value}")] | None = key(
        "only rows with these values count; null: all", None
    )
    max_length: Annotated[int, Field(ge=1, le=limits.LETTERS)] | None = key(
        f"characters of a prompt; null: up to {limits.LETTERS:,}", 2000
    )
    limit: Count | None = key("number of prompts to keep, drawn by the seed; null: all", None)
    published_size: Count | None = key(
        "number of prompts in the published set, for plans; null: unknown", None
    )


KINDS = "the path of a file or folder of prompts, or a mapping with a path"
Split = Annotated[Any, Argument(PromptFile, Text, KINDS)]


class FilePrompts(Section):
    """Arguments of prompts in files or on the hub."""

    train: Split = key("where prompts of training come from", later=True)
    validation: Split = key("where prompts come from on which checkpoints are chosen", later=True)
    test: Split = key("where prompts of the evaluation come from", later=True)
    seed: int | None = key("draws the limits and the order; null: the order of the files", 0)
    priority: Annotated[
        list[Literal["train", "validation", "test"]], Said("[train, validation, test] in some order")
    ] = key("a prompt that several splits hold stays in the first of these", ["test", "validation", "train"])


class TextPrompts(Section):
    """Arguments of prompts=text."""

    train: Text = key("text file with one prompt per line", later=True)
    validation: Text = key("text file with one prompt per line", later=True)
    test: Text = key("text file with one prompt per line", later=True)


class ShapesPrompts(Section):
    """Arguments of the prompts of the shapes world."""

    train: Scenes = key("number of prompts of training")
    validation: Scenes = key("number of prompts on which checkpoints are chosen")
    test: Scenes = key("number of prompts of the evaluation")
    seed: Seed = key("seed of the prompts", 0)


PROMPTS = {
    "capo.data.prompts.split_sets": FilePrompts,
    "capo.data.prompts.text_files": TextPrompts,
    "capo.shapes.prompts.prompt_sets": ShapesPrompts,
}

Tables = Annotated[
    Text | Annotated[list[Text], Field(min_length=1)], Said("a file, a folder or a list of files")
]


class Pickapic(Section):
    """Arguments of import=pickapic."""

    files: Tables = key("a parquet file, a folder of them, or a list of files", later=True)
    caption: Text = key("column of the captions", "caption")
    image_0: Text = key("column of the first images", "jpg_0")
    image_1: Text = key("column of the second images", "jpg_1")
    label: Text = key("column; 1: the first image was chosen; 0: the second; 0.5: a tie", "label_0")
    limit: Count | None = key("number of comparisons, from the first on; null: all", None)
    outside: bool = key("true: paths of images may lead out of their folder, by .., / or links", False)


class Rankings(Section):
    """Arguments of import=rankings."""

    files: Tables = key("a table (json, jsonl, parquet), or a list of tables", later=True)
    images: Text | None = key(
        "folder to which the paths of images are relative; null: the table's folder", None
    )
    caption: Text = key("column of the captions", "prompt")
    image: Text = key("column of lists of paths, or of encoded images", "image_path")
    order: Text = key("column of lists of numbers", "rank")
    better: Literal["lower", "higher"] = key(
        "lower: the numbers are ranks, 1 the best; higher: they are scores", "lower"
    )
    candidates: TwoOrMore | None = key("images per caption; null: as many as the smallest ranking has", None)
    outside: bool = key("true: paths of images may lead out of their folder, by .., / or links", False)


class ImageFolder(Section):
    """Arguments of import=folder."""

    files: Text = key("folder of the images", later=True)
    table: Text | None = key("file in the folder; null: metadata.csv, .tsv, .jsonl or .parquet", None)
    caption: Text = key("column of the captions", "caption")
    image: Text = key("column of the paths in the folder", "file_name")
    score: Text | None = key("column of ratings; null: unrated, so that rewards must score it", None)
    better: Literal["lower", "higher"] = key("lower: the ratings are ranks, 1 the best", "higher")
    candidates: TwoOrMore | None = key(
        "images per caption; null: as many as the caption with the fewest has", None
    )
    outside: bool = key("true: paths of images may lead out of their folder, by .., / or links", False)


IMPORTS = {
    "capo.data.importing.pickapic": Pickapic,
    "capo.data.importing.rankings": Rankings,
    "capo.data.importing.folder": ImageFolder,
}


class FileLogger(Section):
    """Arguments of the loggers csv and tensorboard."""

    folder: Text = key("folder of the logger's files")


class WandbLogger(FileLogger):
    """Arguments of logger=wandb; further ones are those of wandb.init."""

    model_config = ConfigDict(extra="allow")

    project: Text = key("project at W&B; further arguments of wandb.init may follow")


LOGGERS = {
    "capo.training.loggers.csv_logger": FileLogger,
    "capo.training.loggers.tensorboard_logger": FileLogger,
    "capo.training.loggers.wandb_logger": WandbLogger,
}

Objective = Annotated[Any, Called(OBJECTIVES)]
Pairs = Annotated[Any, Called(PAIRS)]
Prompts = Annotated[Any, Called(PROMPTS)]
Import = Annotated[Any, Called(IMPORTS)]
Loggers = Annotated[dict[Text, Annotated[Any, Called(LOGGERS)]], Said("loggers by name")]
