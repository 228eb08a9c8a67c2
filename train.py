"""Tune a base model on calibrated preference pairs, keep the policy with the best win-rate, and evaluate it.

python train.py objective=capo pairs=frs
python train.py -m objective.beta=10,30,100
"""

import hydra
from omegaconf import DictConfig

from capo.cli.messages import start
from capo.runtime.imports import heavy_imports


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run the composed configuration; return the best validation win-rate."""
    with heavy_imports():  # after Hydra has composed, since it takes seconds
        from capo.cli.train import main as train

    return train(cfg)


if __name__ == "__main__":
    start(main)
