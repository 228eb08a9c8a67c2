"""What train.py, generate.py and merge.py refuse before they load anything."""

import pytest
from omegaconf import OmegaConf

from capo.cli import generate, merge, train, tune
from capo.cli.compose import composed
from capo.errors import InputError


@pytest.mark.parametrize("inside", ["", "policy", "policy/policy", "policy/unet/soup"])
def test_a_soup_is_not_written_into_a_policy_that_is_merged(tmp_path, inside):
    (tmp_path / "policy" / "unet").mkdir(parents=True)
    with pytest.raises(InputError, match=r"would be replaced by the soup, but .*; choose another"):
        merge.check_place(tmp_path / inside, [str(tmp_path / "policy"), str(tmp_path / "other")])
    merge.check_place(tmp_path / "policy-2", [str(tmp_path / "policy"), str(tmp_path / "other")])


@pytest.mark.parametrize(("stage", "given", "message"), [
    ("status", "repair=true", "repair=true with stage=status: stage=verify alone repairs; give stage=verify"),
    ("all", "import=folder", "import with stage=all: stage=import alone imports; give stage=import, or "),
    ("export", "import=folder", "import with stage=export: stage=import alone"),
    ("all", "pair_export.images=png",
     "pair_export.images=png with stage=all: stage=export alone exports; .* leave pair_export.images out"),
])  # fmt: skip
def test_what_another_stage_reads_is_refused(tmp_path, stage, given, message):
    cfg = composed("generate", [f"run_dir={tmp_path}", f"pool.root={tmp_path}", f"stage={stage}", given])
    with pytest.raises(InputError, match=message):
        generate.run(cfg, [f"stage={stage}", given])
    assert [*tmp_path.iterdir()] == []


def test_pools_among_those_of_the_evaluation_are_refused_before_anything_is_drawn(tmp_path):
    cfg = composed("train", [f"run_dir={tmp_path}", f"pool.root={tmp_path}/evaluation/pool", "evaluate=true"])
    with pytest.raises(
        InputError, match="the images of the policy go there, and other pools would be removed"
    ):
        tune.complete_run(cfg, None, tmp_path)
    assert [*tmp_path.iterdir()] == []


NUMBERED = "${job.num}"


@pytest.mark.parametrize(("output", "subdir", "message"), [
    (".hydra", NUMBERED, None),
    (".hydra", f"job-{NUMBERED}", None),
    (None, NUMBERED, "hydra.output_subdir=None with -m"),
    (".hydra", f"a/{NUMBERED}", r"hydra.sweep.subdir=a/.* with -m: each job needs a folder of its own"),
    (".hydra", "x", r"hydra.sweep.subdir=x with -m: each job needs a folder of its own"),
])  # fmt: skip
def test_a_sweep_whose_table_would_miss_jobs_is_refused(output, subdir, message):
    own = OmegaConf.create(
        {"job": {"num": 3}, "output_subdir": output, "sweep": {"dir": "s", "subdir": subdir}}
    )
    if message is None:
        train.check_sweep(own)
        return
    with pytest.raises(InputError, match=message):
        train.check_sweep(own)
