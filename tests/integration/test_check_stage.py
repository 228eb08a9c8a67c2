"""`python train.py check=true`.

On the shapes model everything passes, on random weights two checks fail by name.
"""

import json
import math
import shutil

import pytest

from capo.cli import train
from capo.cli.resolvers import shipped
from capo.errors import InputError
from capo.preflight.step_check import Watch, check_steps
from fixtures.tiny_pipelines import CONFIGURED

SHAPES = {
    name: (
        f"model={name}",
        f"model.backbone.weights={shipped(folder)}",
        f"model.name={name}",
        "trainer.batch=4",
    )
    for name, folder in (("shapes_unet", "unet"), ("shapes_mmdit", "mmdit"))
}
NAMES = ["VAE round trip", "denoising error", "sample", "reference = policy", "first loss", "one step"]


def findings(folder):
    return {check["name"]: check["passed"] for check in json.loads((folder / "check.json").read_text())}


@pytest.mark.parametrize(
    ("model", "objective"), [("shapes_unet", "capo"), ("shapes_unet", "dpo"), ("shapes_mmdit", "capo")]
)
def test_the_shapes_models_pass(tiny_run, model, objective):
    name = f"check-{model}-{objective}"
    assert math.isnan(train.run(tiny_run(name, *SHAPES[model], "check=true", f"objective={objective}")))
    folder = tiny_run.folder / name
    assert findings(folder) == dict.fromkeys(NAMES, True)
    assert (folder / "check" / "sample.png").is_file() and not (
        folder / "config.yaml"
    ).exists()  # no run was begun


@pytest.mark.parametrize("name", list(CONFIGURED))
def test_random_weights_fail_two_checks_by_name(tiny_run, tiny_folders, name):
    here = (
        *CONFIGURED[name],
        f"model.backbone.weights={tiny_folders[name]}",
        "prompts=text",
        "trainer.micro_batch=1",
    )
    with pytest.raises(InputError, match="2 of 6 failed: VAE round trip, denoising error"):
        train.run(tiny_run(f"check-{name}", *here, "check=true"))
    failed = ["VAE round trip", "denoising error"]
    assert findings(tiny_run.folder / f"check-{name}") == {check: check not in failed for check in NAMES}


def test_a_folder_with_a_wrong_scaling_factor_fails_by_name(tiny_run, tmp_path):
    """A VAE's config as it may come from elsewhere.

    Pictures come back, but their latents are not those that the denoiser knows.
    """
    folder = shutil.copytree(shipped("unet"), tmp_path / "unet")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(
        json.dumps(config | {"scaling_factor": 2.5 * config["scaling_factor"]})
    )
    with pytest.raises(InputError, match=r"of 6 failed: VAE round trip"):
        train.run(
            tiny_run("check-scaled", *SHAPES["shapes_unet"], "check=true", f"model.backbone.weights={folder}")
        )
    found = json.loads((tiny_run.folder / "check-scaled" / "check.json").read_text())
    assert "scaling_factor or shift_factor in vae/config.json is not this VAE's" in found[0]["remedy"]
    assert {"sample", "reference = policy", "first loss", "one step"} <= {
        check["name"] for check in found if check["passed"]
    }


def test_a_batch_that_does_not_divide_is_refused_before_weights_load(tiny_run, monkeypatch):
    monkeypatch.setattr("capo.cli.check.base_of", lambda cfg: pytest.fail("the weights were loaded first"))
    with pytest.raises(InputError, match=r"trainer\.micro_batch=3"):
        train.run(tiny_run("check-batch", *SHAPES["shapes_unet"], "check=true", "trainer.micro_batch=3"))


def test_weights_that_are_not_there_come_before_any_check(tiny_run, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        train.run(tiny_run("check-missing", "check=true", f"model.backbone.weights={tmp_path / 'none'}"))
    assert not (tiny_run.folder / "check-missing" / "check.json").exists()


def watched(**seen) -> Watch:
    watch = Watch()
    watch.largest, watch.gap, watch.loss, watch.expected, watch.seconds = 0.0, 0.5, 0.25, 0.25, 2.0
    for name, value in seen.items():
        setattr(watch, name, value)
    return watch


@pytest.mark.parametrize(("seen", "failed"), [
    ({}, []), ({"largest": 1e-6}, ["reference = policy"]), ({"loss": 0.26}, ["first loss"]),
    ({"peak": 119}, []), ({"peak": 121}, ["one step"]), ({"peak": 79}, ["one step"]),
])  # fmt: skip
def test_verdicts_by_hand(seen, failed):
    """A plan of 100 bytes is met from 80 to 120."""
    checks = check_steps(watched(**seen), planned_bytes=100, flops=4e9, pairs=8)
    assert [check.name for check in checks if not check.passed] == failed
    assert "2.00 s for 8 pairs, 2.0 GFLOP/s" in checks[-1].found  # 4e9 / 2 s


def test_the_plans_seconds_stand_beside_the_measured_ones():
    """4e9 operations at 0.4 of 20e9 a second take 0.5 s, here 2 s: said, and no fault."""
    *_, step = check_steps(watched(), planned_bytes=None, flops=4e9, pairs=8, rate=0.4 * 20e9)
    assert step.passed and "2.00 s for 8 pairs, 2.0 GFLOP/s (the plan: 0.5 s at 8 GFLOP/s)" in step.found
    assert "plan" not in check_steps(watched(), None, None, 8, rate=8e9)[-1].found
