"""Tune a base model: candidate pool -> calibrated pairs -> policy, the best by validation win-rate, and its evaluation.

python train.py objective=capo pairs=frs
python train.py -m objective.beta=10,30,100
"""

import hydra
from omegaconf import DictConfig

from capo.cli.messages import start


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    from capo.cli.train import main as train  # after Hydra has composed: the libraries behind it take seconds

    return train(cfg)


if __name__ == "__main__":
    start(main)
