"""What `train.py` would be given, for benchmarks that run on a model."""

import argparse
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from capo.cli.compose import composed
from capo.cli.process import prepare_process


def configuration(model: str, prompts: int) -> DictConfig:
    """`python train.py model=MODEL` with `prompts` prompts of the shapes world to train on."""
    sizes = {"train": prompts, "validation": 1, "test": 1}
    return composed(
        "train", [f"model={model}", *(f"prompts.{split}={size}" for split, size in sizes.items())]
    )


def model_and_sizes(
    description: str, defaults: Mapping[str, int], arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, DictConfig]:
    """Options of a benchmark that runs on a model, `threads` and `prompts` among them, and what they configure.

    `defaults` are those of its whole numbers; `description` is the script's docstring. The process gets its threads.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--model", default="shapes_unet", help="of conf/model; default shapes_unet")
    args = parser.parse_args(arguments)
    prepare_process(args.threads)
    return args, configuration(args.model, args.prompts)
