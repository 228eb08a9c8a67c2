"""Ask people which image looks better, policy's or base's, and read what they answered (docs/study.md).

    python -m capo.cli.study run=outputs/DATE/TIME
    python -m capo.cli.study policy=FOLDER base=FOLDER model=shapes_unet
    python -m capo.cli.study serve FOLDER
    python -m capo.cli.study results FOLDER [FOLDER ...]
    python -m capo.cli.study export FOLDER --images-at https://HOST/PATH
    python -m capo.cli.study import FOLDER RESULTS.csv

The first two make a study, or open it, and serve its page; the others need its folder alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from capo.cli.compose import REPOSITORY
from capo.cli.messages import plain_errors, start
from capo.cli.study_files import main as files_main


@hydra.main(version_base="1.3", config_path=str(REPOSITORY / "conf"), config_name="study")
def main(cfg: DictConfig) -> None:
    """Make or open the configured study, and serve its page."""
    # imported after Hydra has composed, since it takes seconds
    from capo.cli.study_files import serve
    from capo.cli.study_images import build_study

    own = HydraConfig.get()
    with plain_errors():
        study = build_study(cfg, list(own.overrides.task), Path(own.runtime.output_dir))
        serve(study, cfg.study.host, cfg.study.port)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].isalpha():  # a word is a command
        sys.exit(files_main(sys.argv[1:]))
    start(main)
