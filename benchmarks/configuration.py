"""Configuration of `train.py`, for benchmarks that run on a model."""

import argparse
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from benchmarks.options import add_numbers
from capo.cli.compose import composed
from capo.cli.process import prepare_process


def configuration(model: str, prompts: int) -> DictConfig:
    """Configuration of `python train.py model=MODEL` with `prompts` training prompts of the shapes world."""
    sizes = {"train": prompts, "validation": 1, "test": 1}
    return composed(
        "train", [f"model={model}", *(f"prompts.{split}={size}" for split, size in sizes.items())]
    )


def model_and_sizes(
    description: str, defaults: Mapping[str, int], arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, DictConfig]:
    """Parse the options of a benchmark that runs on a model, and compose the configuration they describe.

    Args:
        description: docstring of the script.
        defaults: name -> default of the integer options; `threads` and `prompts` must be among them.
        arguments: command-line arguments; None: those of the process.

    Returns:
        The options and the configuration. The number of threads of the process is set.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add_numbers(parser, defaults)
    parser.add_argument("--model", default="shapes_unet", help="of conf/model; default shapes_unet")
    args = parser.parse_args(arguments)
    prepare_process(args.threads)
    return args, configuration(args.model, args.prompts)
