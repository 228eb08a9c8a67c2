"""Fixtures: tiny pipelines of the real classes (`fixtures.tiny_pipelines`), and runs on them.

pytest reads this file in the process that hands out the tests too, which needs no torch: heavy imports stand
in the fixtures.
"""

import gc
import importlib
import os
import signal
import sys
from pathlib import Path

# for the libraries, which read them when they are imported, and for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # workers share the cores

import pytest

from fixtures import ROOT

RAY_LIMIT = 900  # seconds of a test, on a busy machine


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A worker for each core, unless -n says otherwise; not in addopts, which would need pytest-xdist.

    A file stays on one worker, so that what its tests share is made once; files come in their order, whole
    runs first.
    """
    option = config.option
    if not hasattr(option, "numprocesses") or hasattr(config, "workerinput"):
        return
    if option.numprocesses is None:
        option.numprocesses, option.maxprocesses = "auto", option.maxprocesses or 8
    if option.numprocesses and option.dist == "no":
        option.dist, option.loadscopereorder = "loadfile", False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test on a Ray cluster that hangs fails."""
    if item.get_closest_marker("ray") is None:
        return (yield)

    def late(*signaled):
        raise TimeoutError(f"the test took longer than {RAY_LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(RAY_LIMIT)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_collectstart():
    """Importing the tests and what they test makes objects that stay, and no garbage worth looking for."""
    gc.disable()


def pytest_collection_finish():
    """What importing has made stays: no collection of garbage need look through it again.

    Garbage is looked for after more objects than Python's 700, which a tiny run makes many times over.
    """
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def looked_through_once():
    """What is left when a file ends, such as modules that its tests imported, stays too.

    A run collects garbage at its end, which would look through all of it each time.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def composed_once():
    """Hydra reads and merges the files of conf/ once."""
    from fixtures.composing import merged_once, parsed_once

    with parsed_once(), merged_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    """A file counts as written before the disk has it, which only a machine that fails could tell apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def build_tiny():
    """The function that builds a tiny pipeline, for tests that need another variety of it."""
    from fixtures.tiny_pipelines import build_tiny_pipeline

    return build_tiny_pipeline


@pytest.fixture(scope="session")
def tiny_folder(build_tiny, tmp_path_factory) -> Path:
    """Folder of the tiny pipeline, as save_pretrained writes it. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    build_tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folders(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """Folders of all tiny pipelines: sdxl, sd15, sd3 (with a T5), sd3_bare (without). Read only."""
    from fixtures.tiny_pipelines import build_tiny_sd3, build_tiny_sd15

    root = tmp_path_factory.mktemp("families")
    built = {"sd15": build_tiny_sd15(), "sd3": build_tiny_sd3(), "sd3_bare": build_tiny_sd3(t5=False)}
    for name, pipeline in built.items():
        pipeline.save_pretrained(root / name)
    return {"sdxl": tiny_folder, **{name: root / name for name in built}}


@pytest.fixture(scope="session")
def tiny_backbones(tiny_folders) -> dict:
    """All tiny pipelines behind the backbone interface. Read only."""
    from capo.backbones import MMDiTBackbone, UNetBackbone

    return {
        "sdxl": UNetBackbone(str(tiny_folders["sdxl"]), name="sdxl"),
        "sd15": UNetBackbone(str(tiny_folders["sd15"]), name="sd15"),
        "sd3": MMDiTBackbone(str(tiny_folders["sd3"]), name="sd3", sequence_length=9),
        "sd3_bare": MMDiTBackbone(
            str(tiny_folders["sd3_bare"]), name="sd3_bare", t5=False, sequence_length=3
        ),
    }


@pytest.fixture(scope="session")
def tiny_backbone(tiny_folder):
    """The tiny pipeline behind the backbone interface. Read only: train a `trainable_copy()` of it."""
    from capo.backbones import UNetBackbone

    return UNetBackbone(str(tiny_folder), name="tiny")


RUN_PROMPTS = {
    "train": "a red cat\na blue dog\na red dog\na blue cat\n",
    "validation": "red cat\nblue dog\n",
    "test": "cat\ndog\n",
}


def brightness(channel: int) -> dict:
    return {"scorer": {"_target_": "fixtures.fake_rewards.Brightness", "channel": channel}, "scale": 20.0}


@pytest.fixture(scope="session")
def drawn_once():
    """Pictures of calibration reports, by report.

    Runs on one pool have the same, and drawing it takes a quarter of a tiny run.
    """
    from capo.evaluation.reports import calibration_page

    pictures, draw = {}, calibration_page.picture

    def picture(report):
        key = repr(report)
        if key not in pictures:
            pictures[key] = draw(report)
        return pictures[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_page, "picture", picture)
        yield pictures


@pytest.fixture(scope="module")
def tiny_run(tiny_folder, drawn_once, tmp_path_factory):
    """Makes the configuration of a run on the tiny pipeline; all share one pool root."""
    from omegaconf import OmegaConf

    from capo.cli.compose import composed

    folder = tmp_path_factory.mktemp("runs")
    for split, text in RUN_PROMPTS.items():
        (folder / f"{split}.txt").write_text(text)

    def make(name: str, *overrides: str, config: str = "train", rewards: int = 2):
        cfg = composed(
            config,
            [
                f"run_dir={folder / name}",
                f"model.backbone.weights={tiny_folder}",
                f"pool.root={folder / 'pools'}",
                "prompts=text",
                *(f"prompts.{split}={folder / split}.txt" for split in RUN_PROMPTS),
                "pool.candidates=4",
                "sampling.steps=2",
                "trainer.max_steps=2",
                "trainer.batch=2",
                "trainer.log_every=1",
                "validation.every=2",
                "validation.images=2",
                "evaluation.images=2",
                "evaluation.zero_prompts=2",
                "evaluation.oracle=null",
                "threads=1",
                "model.name=tiny",
                *overrides,
            ],
        )
        scorers = {name: brightness(channel) for channel, name in enumerate(("r", "g", "b")[:rewards])}
        OmegaConf.update(cfg, "rewards", scorers, merge=False)
        OmegaConf.update(cfg, "evaluation.rewards", {"r": brightness(0)}, merge=False)
        return cfg

    make.folder = folder
    return make


@pytest.fixture(scope="module")
def command_line(tiny_run, tiny_folder, tmp_path_factory):
    """Arguments that make the entry scripts run on the tiny pipeline, pools in the root of `tiny_run`'s."""
    from omegaconf import OmegaConf

    groups = tmp_path_factory.mktemp("groups")
    (groups / "rewards").mkdir()
    OmegaConf.save({"r": brightness(0), "g": brightness(1)}, groups / "rewards" / "fake.yaml")
    values = {
        "hydra.searchpath": f"[file://{groups}]",
        "rewards": "fake",
        "rewards@evaluation.rewards": "fake",
        "model.name": "tiny",
        "model.backbone.weights": tiny_folder,
        "pool.root": tiny_run.folder / "pools",
        "prompts": "text",
        **{f"prompts.{split}": tiny_run.folder / f"{split}.txt" for split in RUN_PROMPTS},
        "pool.candidates": 4,
        "sampling.steps": 2,
        "trainer.max_steps": 2,
        "trainer.batch": 2,
        "trainer.log_every": 1,
        "validation.every": 1,
        "validation.images": 2,
        "evaluation.images": 2,
        "evaluation.zero_prompts": 2,
        "evaluation.oracle": "null",
        "threads": 1,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="session")
def helper(tmp_path_factory):
    """Runs scripts in processes of their own, forked from one that has imported what they need."""
    from fixtures.forked import Helper

    helper = Helper(tmp_path_factory.mktemp("processes"))
    yield helper
    helper.close()


@pytest.fixture(scope="module")
def typed(command_line):
    """Calls an entry script's `main` as `python NAME.py *arguments` would, on the tiny pipeline."""

    def call(name: str, *arguments: str) -> None:
        script = importlib.import_module(name)
        flags = [argument for argument in arguments if argument.startswith("-")]
        values = [argument for argument in arguments if argument not in flags]
        given = ["--config-path", str(ROOT / "conf"), *flags, *command_line, *values]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script.__file__, *given])
            script.main()

    return call
