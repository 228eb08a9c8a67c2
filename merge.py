"""Merge tuned policies of one base into one, a soup, and write it as a policy folder.

python merge.py policies=[outputs/A/policy,outputs/B/policy,outputs/C/policy]
python merge.py policies=[A,B] method=linear weights=[0.7,0.3] model=sdxl
"""

import hydra
from omegaconf import DictConfig

from capo.cli.messages import start
from capo.runtime.imports import heavy_imports


@hydra.main(version_base="1.3", config_path="conf", config_name="merge")
def main(cfg: DictConfig) -> None:
    """Merge the configured policies."""
    with heavy_imports():  # after Hydra has composed, since it takes seconds
        from capo.cli.merge import main as merge

    merge(cfg)


if __name__ == "__main__":
    start(main)
