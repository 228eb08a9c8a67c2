"""Compare tuned policies with their base, reward by reward, on prompts unused in training and validation.

python evaluate.py run=outputs/DATE/TIME
python evaluate.py runs=[outputs/A,outputs/B]
python evaluate.py policy=FOLDER base=FOLDER model=shapes_unet
python evaluate.py benchmark=shapes policy=FOLDER
"""

import hydra
from omegaconf import DictConfig

from capo.cli.messages import start
from capo.runtime.imports import heavy_imports


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Run the configured evaluation or comparison."""
    with heavy_imports():  # after Hydra has composed, since it takes seconds
        from capo.cli.evaluate import main as evaluate

    evaluate(cfg)


if __name__ == "__main__":
    start(main)
