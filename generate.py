"""Make or complete the pools that `train.py` of the same configuration needs: candidates, validation, test and zero line.

    python generate.py pool.candidates=32
    python generate.py stage=score rewards=looks
    python generate.py stage=report

Or make a pool of existing images, or write the selected pairs for other trainers (docs/preference-data.md):

    python generate.py stage=import import=pickapic import.files=FOLDER
    python generate.py stage=export
"""

import hydra
from omegaconf import DictConfig

from capo.cli.messages import start


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    from capo.cli.generate import (
        main as generate,  # after Hydra has composed: the libraries behind it take seconds
    )

    generate(cfg)


if __name__ == "__main__":
    start(main)
