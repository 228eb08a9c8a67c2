"""Nothing is written outside run directory and pool root, under any name."""

import copy
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from capo.cli import evaluate as evaluate_script
from capo.cli import generate as generate_script
from capo.cli import train as train_script
from capo.errors import InputError
from fixtures.fake_rewards import BRIGHTNESS

HOSTILE = ["../escaped", "..", ".", "/tmp/absolute", "a/../../b", "a\\b", "a\nb", "a b", "", "x" * 300]
# place of the name -> what is said of it
PLACES = {
    "model.name": "model.name={}: must be a name",
    "rewards": "rewards={}: must be a name",
    "evaluation.rewards": "evaluation.rewards={}: must be a name",
    "evaluation.oracle": "evaluation.oracle={}: must be a name",
    "validation.held_out": "validation.held_out={}: must be a name",
}


@pytest.fixture(scope="module")
def configured(tiny_run):
    return {config: tiny_run("named", config=config) for config in ("train", "generate", "evaluate")}


def named(cfg: DictConfig, place: str, name: str) -> DictConfig:
    cfg = copy.deepcopy(cfg)
    value = name if place == "model.name" else {name: {"scorer": {"_target_": BRIGHTNESS}}}
    OmegaConf.update(cfg, place, value, merge=False)
    return cfg


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_written(configured, tiny_run, place, name):
    before, outside = entries(tiny_run.folder.parent), [*Path("/tmp").glob("absolute*")]
    scripts = {
        "train": train_script.run,
        "generate": generate_script.run,
        "evaluate": lambda cfg: evaluate_script.run(cfg, [], tiny_run.folder / "evaluated"),
    }
    for config, run in scripts.items():
        cfg = named(configured[config], place, name)
        cfg.update({"policy": "/nowhere"} if config == "evaluate" else {})
        with pytest.raises(InputError) as error:
            run(cfg)
        assert PLACES[place].format(name) in str(error.value)
    assert entries(tiny_run.folder.parent) == before and [*Path("/tmp").glob("absolute*")] == outside


def test_what_a_plain_name_writes_lies_in_the_run_and_under_the_root(configured, tiny_run):
    cfg = named(named(configured["train"], "model.name", "..tiny-1.5"), "evaluation.rewards", "-r.1_")
    before = {path for path in entries(tiny_run.folder.parent) if path.is_file()}
    train_script.run(cfg)
    places = (Path(cfg.run_dir), Path(cfg.pool.root))
    written = [path for path in entries(tiny_run.folder.parent) if path.is_file() and path not in before]
    assert written and all(any(place in path.parents for place in places) for path in written)
