"""`python train.py check=true`.

On the shapes model everything passes, on random weights two checks fail by name.
"""

import io
import json
import math
import shutil

import pytest
from rich.console import Console

from capo.cli import check as check_stage
from capo.cli import train
from capo.cli.plan import run_plan
from capo.cli.resolvers import shipped
from capo.errors import InputError
from capo.preflight.model_check import Check
from capo.preflight.step_check import Watch, check_checkpointing, check_steps
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
NAMES = [
    "VAE round trip", "denoising error", "sample", "reference = policy", "first loss", "one step",
    "gradient checkpointing",
]  # fmt: skip


@pytest.fixture(autouse=True)
def measured_at_once(monkeypatch):
    """A rate is that of one call, and not of as many as a second takes."""
    monkeypatch.setattr("capo.preflight.rates.LEAST", 0.0)


@pytest.fixture
def no_rates(monkeypatch):
    """Rates are not measured."""
    monkeypatch.setattr(check_stage, "measure_base", lambda *_: ({}, []))
    monkeypatch.setattr(check_stage, "measure_rewards", lambda *_: {})
    monkeypatch.setattr(check_stage, "keep_rates", lambda *_: None)


def findings(folder):
    return {check["name"]: check["passed"] for check in json.loads((folder / "check.json").read_text())}


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ("shapes_unet", "capo"),
        pytest.param("shapes_unet", "dpo", marks=pytest.mark.slow),
        pytest.param("shapes_mmdit", "capo", marks=pytest.mark.slow),
    ],
)
def test_the_shapes_models_pass(tiny_run, model, objective):
    name = f"check-{model}-{objective}"
    assert math.isnan(train.run(tiny_run(name, *SHAPES[model], "check=true", f"objective={objective}")))
    folder = tiny_run.folder / name
    assert findings(folder) == dict.fromkeys(NAMES, True)
    assert (folder / "check" / "sample.png").is_file() and not (
        folder / "config.yaml"
    ).exists()  # no run was begun
    same = tiny_run(f"{name}-plan", *SHAPES[model], f"objective={objective}")
    told = io.StringIO()
    hours = run_plan(same, Console(file=told, width=300))["hours"]
    assert set(hours["rates"]) == {"text", "latents", "decoding", "training", "r", "g"}
    assert hours["without"] == {} and hours["total"] > 0
    assert "text, latents, decoding, training, g, r: measured here" in told.getvalue()
    other = run_plan(tiny_run(f"{name}-plan", *SHAPES[model], "sampling.batch=3"), Console(file=told))
    assert {"text", "training"} <= set(other["hours"]["rates"]) and "latents" not in other["hours"]["rates"]


@pytest.mark.parametrize(
    "name", ["sdxl", "sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd15", "sd3_bare"))]
)
def test_random_weights_fail_two_checks_by_name(tiny_run, tiny_folders, name, no_rates):
    here = (
        *CONFIGURED[name],
        f"model.backbone.weights={tiny_folders[name]}",
        "prompts=text",
        "trainer.micro_batch=1",
    )
    with pytest.raises(InputError, match="2 of 7 failed: VAE round trip, denoising error"):
        train.run(tiny_run(f"check-{name}", *here, "check=true"))
    failed = ["VAE round trip", "denoising error"]
    assert findings(tiny_run.folder / f"check-{name}") == {check: check not in failed for check in NAMES}


def test_a_folder_with_a_wrong_scaling_factor_fails_by_name(tiny_run, tmp_path, no_rates):
    """A VAE's config as it may come from elsewhere.

    Pictures come back, but their latents are not those that the denoiser knows.
    """
    folder = shutil.copytree(shipped("unet"), tmp_path / "unet")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(
        json.dumps(config | {"scaling_factor": 2.5 * config["scaling_factor"]})
    )
    with pytest.raises(InputError, match=r"of 7 failed: VAE round trip"):
        train.run(
            tiny_run("check-scaled", *SHAPES["shapes_unet"], "check=true", f"model.backbone.weights={folder}")
        )
    found = json.loads((tiny_run.folder / "check-scaled" / "check.json").read_text())
    assert "scaling_factor or shift_factor in vae/config.json is not this VAE's" in found[0]["remedy"]
    assert {"sample", "reference = policy", "first loss", "one step"} <= {
        check["name"] for check in found if check["passed"]
    }


def test_what_cannot_be_measured_or_kept_is_refused_before_weights_load(tiny_run, monkeypatch, tmp_path):
    monkeypatch.setattr("capo.cli.check.base_of", lambda cfg: pytest.fail("the weights were loaded first"))
    with pytest.raises(InputError, match=r"trainer\.micro_batch=3"):
        train.run(tiny_run("check-batch", *SHAPES["shapes_unet"], "check=true", "trainer.micro_batch=3"))
    (tmp_path / "pools").mkdir()
    (tmp_path / "pools" / "rates").symlink_to(tmp_path)
    with pytest.raises(InputError, match="pools/rates is a link to"):
        train.run(tiny_run("check-batch", "check=true", f"pool.root={tmp_path / 'pools'}"))


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


GB, ON, OFF = 1e9, (2.0, 30e9), (1.6, 60e9)  # seconds and bytes of a step


@pytest.mark.parametrize(("now", "on", "off", "memory", "measured", "advice"), [
    # 2.0 / 1.6 = 1.25 x; 60 of 80 GB leave 25 %
    (True, ON, OFF, 80 * GB, "on: 2.00 s and 30.00 GB, off: 1.60 s and 60.00 GB",
     "set trainer.gradient_checkpointing=false, which is 1.25 x as fast and leaves 25% of 80.0 GB free"),
    (False, ON, OFF, 80 * GB, "off: 1.60 s and 60.00 GB, on: 2.00 s and 30.00 GB",
     "keep trainer.gradient_checkpointing=false, which is 1.25 x as fast and leaves 25% of 80.0 GB free"),
    # 76 of 80 GB leave 5 %
    (True, ON, (1.6, 76 * GB), 80 * GB, "on: 2.00 s and 30.00 GB, off: 1.60 s and 76.00 GB",
     "keep trainer.gradient_checkpointing=true, since 5% of 80.0 GB would stay free without it"),
    # 1.65 / 1.6 = 1.03 x
    (False, (1.65, 30 * GB), OFF, 80 * GB, "off: 1.60 s and 60.00 GB, on: 1.65 s and 30.00 GB",
     "set trainer.gradient_checkpointing=true, "
     "since a step without it is only 1.03 x as fast and takes more memory"),
    (True, ON, None, 80 * GB, "on: 2.00 s and 30.00 GB, off: out of memory",
     "keep trainer.gradient_checkpointing=true, since a step does not fit otherwise"),
    (False, (2.0, None), (1.6, None), None, "off: 1.60 s, on: 2.00 s",
     "keep trainer.gradient_checkpointing=false, "
     "which is 1.25 x as fast, if memory allows (it is measured on a GPU only)"),
])  # fmt: skip
def test_gradient_checkpointing_is_recommended_or_not(now, on, off, memory, measured, advice):
    found = {
        kind: seen and watched(seconds=seen[0], peak=seen[1]) for kind, seen in ((True, on), (False, off))
    }
    told = f"{measured}: {advice}"
    assert check_checkpointing(found, now, memory) == [Check("gradient checkpointing", True, told)]


@pytest.mark.parametrize(
    ("now", "fits"),
    [
        (True, [True, False]),
        (True, []),
        (False, [True]),
        pytest.param(True, [False], marks=pytest.mark.slow),
        pytest.param(False, [False], marks=pytest.mark.slow),
    ],
)
def test_steps_with_and_without_checkpointing_are_both_measured(tiny_run, monkeypatch, no_rates, now, fits):
    """Also where one of them, or both, run out of memory."""
    monkeypatch.setattr(check_stage, "check_base", lambda *_: [])  # the other checks are not of the step
    seen, steps = [], check_stage.take_steps

    def measured(module, *arguments):
        kind = module.execution.gradient_checkpointing
        seen.append(kind)
        watch = steps(module, *arguments)
        assert module.policy.is_gradient_checkpointing == kind
        return watch if kind in fits else None

    monkeypatch.setattr(check_stage, "take_steps", measured)
    name = "-".join(map(str, ["check-both", now, *fits]))
    cfg = tiny_run(name, *SHAPES["shapes_unet"], "check=true", f"trainer.gradient_checkpointing={now}")
    if now in fits:
        train.run(cfg)
    else:
        remedy = (
            "trainer.gradient_checkpointing=true" if True in fits else "a smaller trainer.micro_batch (now 4)"
        )
        with pytest.raises(InputError, match="failed: one step"):
            train.run(cfg)
        checks = json.loads((tiny_run.folder / name / "check.json").read_text())
        assert next(check["remedy"] for check in checks if check["name"] == "one step") == remedy
    assert seen == [now, not now]
    assert ("gradient checkpointing" in findings(tiny_run.folder / name)) == bool(fits)


def test_the_plans_seconds_stand_beside_the_measured_ones():
    """4e9 operations at 0.4 of 20e9 a second take 0.5 s, here 2 s: said, and no fault."""
    *_, step = check_steps(watched(), planned_bytes=None, flops=4e9, pairs=8, rate=0.4 * 20e9)
    assert step.passed and "2.00 s for 8 pairs, 2.0 GFLOP/s (the plan: 0.5 s at 8 GFLOP/s)" in step.found
    assert "plan" not in check_steps(watched(), None, None, 8, rate=8e9)[-1].found
