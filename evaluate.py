"""Compare tuned policies with their base, reward by reward, on prompts that were used nowhere before.

python evaluate.py run=outputs/DATE/TIME
python evaluate.py runs=[outputs/A,outputs/B]
python evaluate.py policy=FOLDER base=FOLDER model=shapes_unet
"""

import hydra
from omegaconf import DictConfig

from capo.cli.messages import start


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    from capo.cli.evaluate import (
        main as evaluate,  # after Hydra has composed: the libraries behind it take seconds
    )

    evaluate(cfg)


if __name__ == "__main__":
    start(main)
