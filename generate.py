"""Fill the pools that `train.py` needs: candidates, and images for validation, test and zero line.

    python generate.py pool.candidates=32
    python generate.py stage=score rewards=looks
    python generate.py stage=report

It also imports existing images into a pool, and exports selected pairs (docs/preference-data.md):

    python generate.py stage=import import=pickapic import.files=FOLDER
    python generate.py stage=export
"""

import hydra
from omegaconf import DictConfig

from capo.cli.messages import start
from capo.runtime.imports import heavy_imports


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    """Run the configured stage."""
    with heavy_imports():  # after Hydra has composed, since it takes seconds
        from capo.cli.generate import main as generate

    generate(cfg)


if __name__ == "__main__":
    start(main)
