"""What `train.py` would be given, for benchmarks that run on a model."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import capo.config  # noqa: F401  its resolvers

CONF = Path(__file__).parents[1] / "conf"


def configuration(model: str, prompts: int) -> DictConfig:
    """`python train.py model=MODEL` with `prompts` prompts of the shapes world to train on."""
    sizes = {"train": prompts, "validation": 1, "test": 1}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"model={model}", *(f"prompts.{split}={size}" for split, size in sizes.items())])
