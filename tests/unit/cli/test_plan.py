"""`plan=true` from the configuration to plan.json, what is missing here, and the same findings without it."""

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from capo.cli import train as train_script
from capo.cli.missing import find_missing
from capo.cli.plan import (
    blueprint_of,
    float32_rewards,
    prompt_counts,
    reward_request,
    run_plan,
    shared_rooms,
    training_request,
)
from capo.cli.rates import measurements
from capo.data.pool import Manifest
from capo.data.prompts import expected_sizes
from capo.errors import InputError
from capo.preflight import shortages as lacking
from capo.preflight.rates import write_rate
from fixtures import ROOT
from fixtures.configuration import composed
from fixtures.tiny_pipelines import CONFIGURED

RECIPES = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
CARD = 80e9  # bytes of the device that the paper's recipes are meant for
DENOISERS = {
    "sdxl": 2_567_463_684,
    "sd3": 2_028_328_000,
    "sd15": 859_520_964,
    "sd35_medium": 2_243_171_520,
    "sd35_large": 8_056_627_520,
}
Usage = namedtuple("Usage", "total used free")


def configured(*overrides: str, folder=Path("/nowhere")):
    return composed(f"run_dir={folder / 'run'}", f"pool.root={folder / 'pools'}", "plan=true", *overrides)


def planned(folder, *overrides: str) -> tuple[dict, str]:
    return plan_of(configured(*overrides, folder=folder))


def plan_of(cfg) -> tuple[dict, str]:
    told = io.StringIO()
    run_plan(cfg, Console(file=told, width=300))
    return json.loads((Path(cfg.run_dir) / "plan.json").read_text()), told.getvalue()


# of the same models as others, or of the same size
SLOW = {
    *(f"experiment={name}" for name in ("sdxl_10k", "sdxl_single", "sd3_single", "sd3_capo_frs")),
    # which the test of a card of 24 GB plans too
    *(f"experiment={name}_quickstart" for name in ("sdxl", "sd3", "sd35_medium")),
    *(f"model={name}" for name in ("sd35_medium", "sd35_large", "sd15")),
}


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(choice, marks=[pytest.mark.slow] if choice in SLOW else [])
        for choice in [*(f"experiment={name}" for name in RECIPES), *(f"model={name}" for name in MODELS)]
    ],
)
def test_every_recipe_has_a_plan_without_weights(tmp_path, choice):
    plan, told = planned(tmp_path, choice)
    if plan["model"] in DENOISERS:
        assert plan["parameters"]["denoiser"] == DENOISERS[plan["model"]]
        assert any(entry["kind"] == "weights" for entry in plan["missing here"])
    lora = plan["config"]["model"]["lora"]
    assert (plan["parameters"]["trained"] < plan["parameters"]["denoiser"] / 5) == bool(lora)
    training = plan["device"]["training"]
    without = lora or plan["config"]["objective"]["_target_"] == "capo.objectives.sft"
    assert (training["reference"] == 0) == bool(without)
    assert (
        training["total"]
        == sum(size for part, size in training.items() if part != "total")
        <= plan["device"]["peak"]
    )
    assert plan["division"]["pairs"] == plan["config"]["trainer"]["batch"] and plan["hours"]["training"] > 0
    assert plan["model"] in told and "missing here" in told
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"] and not (
        tmp_path / "pools"
    ).exists()


def test_a_plan_tells_a_root_where_no_pool_can_stand(tmp_path):
    root = tmp_path / "root"
    root.write_text("mine")
    found = find_missing(composed(f"pool.root={root}"))
    assert [(finding.kind, finding.message) for finding in found] == [
        ("disk", f"{root} is no folder, but pools should stand there: move it away, or use another pool.root")
    ]


@pytest.mark.parametrize(("name", "told"), [
    ("manifest.json", "manifest.json cannot be read (it is not JSON"),
    ("text", "text is no folder, but files"),
])  # fmt: skip
def test_a_plan_tells_a_pool_that_the_run_would_refuse(tmp_path, name, told):
    pool = tmp_path / "shapes_unet-1234-0-train"
    (pool / ".locks").mkdir(parents=True)
    assert find_missing(composed(f"pool.root={tmp_path}")) == []
    Manifest(seed=0, generator="g", latent_space="l", text_encoders="t").write(pool)
    (pool / name).write_text("mine")
    (found,) = find_missing(composed(f"pool.root={tmp_path}"))
    assert told in found.message and found.kind == "disk" and not found.certain


def test_nothing_is_missing_for_the_shapes(tmp_path):
    plan, told = planned(tmp_path)
    assert plan["missing here"] == [] and "nothing" in told
    assert plan["prompts"] == {"train": 512, "validation": 96, "test": 256}
    # 250 steps and validation after the last: 96 x 4 images once, beside 512 x 8 + 96 x 4 + 256 x 4 twice
    # + 64 x 4
    assert plan["steps"] == 250 and plan["hours"]["images"] == 512 * 8 + 2 * 96 * 4 + 2 * 256 * 4 + 64 * 4
    assert plan["config"]["trainer"]["batch"] == 32


def test_a_plan_and_a_check_are_not_asked_for_together(tiny_run):
    with pytest.raises(InputError, match=r"^plan=true check=true: .* give them one after the other$"):
        train_script.run(tiny_run("both", "plan=true", "check=true"))


def test_a_full_disk_is_listed_by_a_plan_and_refused_by_a_run(tiny_run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 10, 10))
    plan, told = plan_of(tiny_run("full_plan", "plan=true"))
    (entry,) = plan["missing here"]
    assert entry["kind"] == "disk" and entry["certain"] and "are free there" in told
    with pytest.raises(InputError, match=r"are free there: make room, or set pool.root"):
        train_script.run(tiny_run("full"))
    assert not (tiny_run.folder / "full").exists()


def test_a_plan_counts_averaged_weights_where_they_are_kept(tiny_run):
    assert [training_request(tiny_run("unused", *ema)).averaged for ema in ([], ["trainer.ema=0.9"])] == [
        False,
        True,
    ]


def test_too_little_memory_is_listed_and_refused_where_it_is_certain(tiny_run, monkeypatch):
    held = plan_of(tiny_run("memory_plan", "plan=true"))[0]["device"]["training"]
    certain = sum(held[part] for part in ("weights", "gradients", "optimizer", "reference"))
    monkeypatch.setattr(lacking, "device_bytes", lambda accelerator: ("a small one", certain - 1))
    with pytest.raises(
        InputError, match=r"weights, gradients, optimizer and reference take .* which has .* \(a small one\)"
    ):
        train_script.run(tiny_run("small"))
    monkeypatch.setattr(lacking, "device_bytes", lambda accelerator: ("a small one", certain))
    found = [
        entry["certain"]
        for entry in plan_of(tiny_run("memory_plan", "plan=true"))[0]["missing here"]
        if entry["kind"] == "memory"
    ]
    assert found == [False]  # the activations do not fit, which is an estimate


def test_weights_and_prompts_that_are_not_there(tmp_path):
    (tmp_path / "there.txt").write_text("cat\ndog\n")
    files = {"train": "none", "validation": "there", "test": "there"}
    prompts = [f"prompts.{split}={tmp_path / name}.txt" for split, name in files.items()]
    rewards = [f"{place}=[looks,alignment]" for place in ("rewards", "rewards@evaluation.rewards")]
    # a model whose passes the plan of its recipe has traced
    plan, _ = planned(tmp_path, "experiment=sdxl_capo_frs", "prompts=text", *prompts, *rewards)
    assert [entry["kind"] for entry in plan["missing here"]][:2] == ["weights", "prompts"]
    assert (
        plan["prompts"]["train"] is None
        and plan["disk"]["pools"]["total"] is None
        and plan["hours"]["sampling"] is None
    )
    assert plan["parameters"]["denoiser"] == DENOISERS["sdxl"]


def test_a_model_that_lacks_a_part_is_told(tmp_path, tiny_folders):
    choice = [*CONFIGURED["sd3"], f"model.backbone.weights={tiny_folders['sd3_bare']}"]
    plan, _ = planned(tmp_path, *choice, "rewards=looks", "prompts=shapes", "model.published=null")
    told = [entry["message"] for entry in plan["missing here"] if entry["kind"] == "weights"]
    assert len(told) == 1 and "have no text_encoder_3 (T5): set model.backbone.t5=false" in told[0]


def test_a_model_without_configs_is_refused(tmp_path, tiny_run):
    cfg = tiny_run("unknown", "plan=true")
    OmegaConf.update(cfg, "model.backbone.weights", "owner/name")
    with pytest.raises(InputError, match=r"model.published=tiny: no configs of that name"):
        plan_of(cfg)


def test_several_times_per_pair_take_as_many_passes(tiny_run):
    one, four = (
        training_request(tiny_run("unused", f"noise.times_per_pair={times}", "trainer.micro_batch=1"))
        for times in (1, 4)
    )
    assert (one.kinds, one.images) == (2, 2) and (four.kinds, four.images) == (8, 8)


def test_a_plan_marks_no_directory_and_a_run_starts_there(tiny_run):
    folder = tiny_run.folder / "after"
    assert train_script.run(tiny_run("after", "plan=true")) != train_script.run(
        tiny_run("after", "plan=true")
    )  # nan: no run
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
    train_script.run(tiny_run("after", "evaluate=false"))
    assert (folder / "config.yaml").is_file() and (folder / "outcome.json").is_file()


def test_values_that_cannot_be_used_end_a_plan(tmp_path):
    with pytest.raises(InputError, match=r"planning.utilization=1.5: must be a number from 0.0001 to 1"):
        train_script.run(configured("planning.utilization=1.5", folder=tmp_path))


def test_hours_of_scoring_are_stated_or_said_to_be_unknown(tmp_path):
    places = ("rewards", "rewards@evaluation.rewards")
    one = (*(f"{place}=pickscore" for place in places), "pairs=best_worst", "evaluation.oracle=null")
    plan, told = planned(tmp_path, *one)
    assert plan["hours"]["without"]["scores"] == ["pickscore"]
    assert "what no rate is known of, text encoding, scoring by pickscore" in told
    stated, told = planned(tmp_path, *one, "planning.scoring={pickscore: 10}")
    # 512 x 8 candidates and 96 x 4 of the base
    more = stated["hours"]["scores"] - plan["hours"]["scores"]
    assert more == pytest.approx((4096 + 384) / 10 / 3600) and "scores" not in stated["hours"]["without"]
    assert "pickscore: stated (planning.scoring)" in told and "scoring by" not in told
    with pytest.raises(InputError, match=r"planning.scoring.pickscore=0: must be a finite number above 0"):
        train_script.run(configured(*one, "planning.scoring={pickscore: 0}", folder=tmp_path))
    with pytest.raises(InputError, match=r"planning.scoring.pickscor: no reward of .*mean pickscore\?"):
        train_script.run(configured(*one, "planning.scoring={pickscor: 3}", folder=tmp_path))
    with pytest.raises(InputError, match=r"planning.scoring=7: must be images a second by reward"):
        train_script.run(configured(*one, "planning.scoring=7", folder=tmp_path))


def test_the_peak_is_that_of_this_machines_gpu(tmp_path, monkeypatch):
    assumed, told = planned(tmp_path)
    assert assumed["hours"]["flops"] == 989.4e12 and "an H100 SXM, since there is no GPU here" in told
    monkeypatch.setattr("capo.cli.plan.gpu_name", lambda accelerator: "NVIDIA L4")
    small, told = planned(tmp_path)
    assert small["hours"]["training"] / assumed["hours"]["training"] == pytest.approx(989.4 / 121)
    assert "40% of 121 TFLOP/s per device (NVIDIA L4)" in told
    assert planned(tmp_path, "planning.flops=5e12")[0]["hours"]["flops"] == 5e12


def test_measured_rates_are_taken_up_unless_another_device_is_planned_for(tmp_path):
    cfg = configured(folder=tmp_path)
    kinds = measurements(cfg, blueprint_of(cfg), training_request(cfg))
    path = write_rate(tmp_path / "pools", kinds["training"], 16.0)
    plan, told = planned(tmp_path)
    assert plan["hours"]["training"] == pytest.approx(250 * 32 / 16 / 3600)
    assert "training: measured here" in told and "latents, decoding: 40% of" in told
    assert planned(tmp_path, "planning.flops=1e12")[0]["hours"]["rates"] == {}
    assert planned(tmp_path, "trainer.micro_batch=16")[0]["hours"]["rates"] == {}
    path.write_text("{}")
    plan, told = planned(tmp_path)
    assert plan["hours"]["rates"] == {} and f"{path} is not used" in told


def test_a_rewards_memory_is_its_yamls_and_half_of_it_in_half_precision():
    cfg = configured(
        "rewards=[mps,vqascore,vila]",
        "rewards@evaluation.rewards=[pickscore]",
        "+rewards@validation.held_out=[clipscore]",
    )
    found = reward_request(cfg)
    # the base's validation pool is scored by the trained ones and the held-out one together
    assert (found.pool, found.validation, found.evaluation) == pytest.approx(
        ((4.42 + 45.84 + 1.71) * 1e9, 45.84e9, 3.94e9)
    )
    assert found.everything == pytest.approx((4.42 + 45.84 + 3.94 + 1.71) * 1e9) and found.unknown == ["vila"]
    assert float32_rewards(cfg) == ["rewards.vqascore.scorer.precision"]
    half = reward_request(
        configured(
            *(
                f"{override}.scorer.precision=bfloat16"
                for override in ("rewards.vqascore", "evaluation.rewards.vqascore")
            ),
            "rewards=[vqascore]",
            "rewards@evaluation.rewards=[vqascore]",
        )
    )
    assert half.pool == half.evaluation == pytest.approx(22.92e9)


def test_held_out_rewards_score_the_validation_pool_with_the_trained_ones():
    held_out = "+rewards@validation.held_out=[vqascore]"
    found = reward_request(
        configured("rewards=permissive", "rewards@evaluation.rewards=[pickscore]", held_out)
    )
    # clipscore 1.71, hpsv2 3.94, vqascore 45.84; one after the other in a validation
    assert found.pool == found.everything - 3.94e9 == pytest.approx(51.49e9) and found.validation == 45.84e9


def test_a_plan_reads_no_weights_of_rewards(tmp_path, monkeypatch):
    """A reward that is trained and evaluated counts once, one of other weights or precision does not."""

    def refuse(path):
        raise AssertionError(f"{path} was read")

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"gigabytes")
    monkeypatch.setattr("capo.runtime.fingerprints.file_digest", refuse)
    names, folder = "[pickscore,vqascore]", f"rewards.pickscore.weights={tmp_path / 'weights'}"
    own, both = (f"rewards={names}", f"rewards@evaluation.rewards={names}", folder), 3.94e9 + 45.84e9
    assert reward_request(configured(*own)).everything == pytest.approx(both + 3.94e9)
    same = (*own, f"evaluation.{folder}", "evaluation.rewards.pickscore.scale=2")
    assert reward_request(configured(*same)).everything == pytest.approx(both)
    other = (*same, "evaluation.rewards.vqascore.scorer.precision=bfloat16")
    assert reward_request(configured(*other)).everything == pytest.approx(both + 22.92e9)


def test_an_unknown_key_of_a_reward_ends_a_plan_with_its_name(tmp_path):
    with pytest.raises(
        InputError, match=r"evaluation.rewards.mps: unknown key memroy; known are scorer, link"
    ):
        planned(tmp_path, "experiment=sdxl_single", "++evaluation.rewards.mps.memroy=1e9")


GB = {"peak": 92e9, "training": {"weights": 10e9, "activations": 40e9, "total": 50e9}}


@pytest.mark.parametrize(("phase", "parts", "precisions", "told"), [
    ("validation scoring", {"optimizer": 20e9, "rewards": 46e9},
     ["rewards.a.scorer.precision", "evaluation.rewards.a.scorer.precision"],
     "validation scoring, takes about 92.0 GB on a device, which has 80.0 GB (a card); its largest part is "
     "rewards, 46.0 GB: set rewards.a.scorer.precision=bfloat16 "
     "evaluation.rewards.a.scorer.precision=bfloat16 (half the memory, other scores), "
     "or take fewer or smaller rewards"),
    ("pool scoring", {"denoiser": 10e9, "rewards": 46e9}, [],
     "its largest part is rewards, 46.0 GB: take fewer or smaller rewards"),
    ("validation", {"gradients": 10e9, "optimizer": 46e9}, [],
     "part is optimizer, 46.0 GB: use an adapter (experiment=lora), trainer=fsdp"),
    ("validation", {"optimizer": 20e9, "sampling and decoding": 46e9}, [],
     "46.0 GB: lower sampling.batch, and set sampling.decode=1"),
    ("evaluation scoring", {"rewards": 20e9, "text encoders": 46e9}, ["x"],
     "46.0 GB: store the base in half precision (model.backbone.dtype="),
])  # fmt: skip
def test_the_advice_is_for_the_largest_part_of_the_largest_phase(monkeypatch, phase, parts, precisions, told):
    monkeypatch.setattr(lacking, "device_bytes", lambda accelerator: ("a card", 80e9))
    device = GB | {phase: {**parts, "total": 92e9}}
    found = lacking.likely_memory(device, {"peak": 0}, "auto", precisions)[0]
    assert (
        found.message.startswith(f"the largest phase, {phase}, takes")
        and told in found.message
        and not found.certain
    )


@pytest.mark.parametrize(("parts", "told"), [
    (["latents.devices=0.5"], None),  # 2 x 30 GB fit
    (["latents.devices=0.25"], r"\(4 of latents\) take about 120.0 GB.*\(engine.latents.devices\)"),
    (["latents.devices=0.25", "latents.workers=2"], None),
    (["latents.devices=0.3", "scores.devices=0.35"], r"\(1 of latents and 2 of scores\) take about 120.0 GB"),
    (["latents.devices=1", "scores.devices=0.6"], None),  # one worker has it alone
])  # fmt: skip
def test_workers_that_share_a_device(monkeypatch, parts, told):
    monkeypatch.setattr(lacking, "device_bytes", lambda accelerator: ("a card", 80e9))
    totals = {"text": 1e9, "pool": 30e9, "pool scoring": 45e9}
    device = {phase: {"total": size} for phase, size in totals.items()}
    rooms = shared_rooms(composed("engine=ray", *(f"engine.{part}" for part in parts)))
    found = lacking.shared_memory(device, rooms, "auto")
    assert not found if told is None else re.search(told, found[0].message) and not found[0].certain
    assert lacking.shared_memory(device, shared_rooms(composed()), "auto") == []


def test_in_training_the_micro_batch_helps_whatever_is_largest(monkeypatch):
    monkeypatch.setattr(lacking, "device_bytes", lambda accelerator: ("a card", 80e9))
    for largest in ("optimizer", "activations"):
        device = {"peak": 92e9, "training": {"weights": 10e9, largest: 46e9, "total": 92e9}}
        message = lacking.likely_memory(device, {"peak": 0}, "auto")[0].message
        assert (
            f"{largest}, 46.0 GB: lower trainer.micro_batch, or set trainer.gradient_checkpointing=true"
            in message
        )
        assert ("use an adapter" in message) == (largest == "optimizer")


@pytest.mark.parametrize(
    ("choice", "peak"),
    [
        ("experiment=sdxl_capo_frs", "validation scoring"),
        ("experiment=sd3_capo_frs", "validation scoring"),
        ("experiment=sdxl_single", "training"),
        ("experiment=sd3_single", "training"),
        ("experiment=sdxl_pickapic_prompts", "training"),
    ],
)
def test_the_papers_recipes_fit_one_card(tmp_path, choice, peak):
    plan, _ = planned(tmp_path, choice)
    assert plan["device"][peak]["total"] == plan["device"]["peak"] < CARD
    for rewards in (plan["config"]["rewards"], plan["config"]["evaluation"]["rewards"]):
        assert (
            rewards.get("vqascore", {"scorer": {"precision": "bfloat16"}})["scorer"]["precision"]
            == "bfloat16"
        )
    assert "vqascore" in plan["config"]["evaluation"]["rewards"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sd3_quickstart", "sdxl_quickstart", "sd35_medium_quickstart"])
def test_the_quickstarts_fit_a_card_of_24_gb(tmp_path, recipe):
    """With 2 GB to spare for what a plan leaves out."""
    plan, _ = planned(tmp_path, f"experiment={recipe}")
    assert plan["device"]["peak"] < 22e9


def test_without_an_evaluation_a_plan_has_no_phase_of_it(tmp_path):
    plan, told = planned(tmp_path, "evaluate=false")
    assert "evaluation" not in plan["device"] and "evaluation scoring" not in told and "pool scoring" in told


def test_sizes_of_published_sets_stand_in_for_what_is_not_read(tmp_path):
    plan, _ = planned(tmp_path, "experiment=sdxl_capo_frs")
    # 1632 PartiPrompts, of which 232 are for validation
    assert plan["prompts"] == {"train": 100_000, "validation": 232, "test": 1400}
    # 16 candidates; 232 x 4 ten times and for the base; 1400 x 4 of both, 64 x 4
    assert plan["hours"]["images"] == 1_600_000 + 11 * 232 * 4 + 2 * 1400 * 4 + 64 * 4
    assert plan["hours"]["sampling"] is not None and plan["disk"]["pools"]["total"] is not None
    for choice, size in {"dpg": 1065, "geneval": 553}.items():  # whose files have to be given
        assert prompt_counts(configured("model=sd3", f"prompts={choice}"))[0]["test"] == size
    assert prompt_counts(configured("model=sdxl", "prompts.test.limit=200"))[0]["test"] == 200


@pytest.mark.parametrize(("settings", "counts"), [
    ({"train": 4, "validation": 3, "test": 2}, (4, 3, 2)),
    ({"train": "a.txt", "validation": None, "test": {"path": "b"}}, (None, None, None)),
    ({"train": {"path": "a", "published_size": 90}, "validation": {"path": "b", "limit": 7},
      "test": {"path": "c"}}, (90, 7, None)),
    # 30 rows: test comes first, then validation, and training has the rest; a limit beyond it changes nothing
    ({split: {"hub": "a", "file": ["b"], "published_size": 30, "limit": limit}
      for split, limit in {"train": 25, "validation": 10, "test": 8}.items()}
     | {"priority": ["test", "validation", "train"]}, (12, 10, 8)),
])  # fmt: skip
def test_what_is_expected_of_prompts_that_are_not_read(settings, counts):
    assert tuple(expected_sizes(settings).values()) == counts


def test_extras_and_rewards_that_are_not_here(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *package: None if name == "bitsandbytes" else find(name, *package),
    )
    plan, told = planned(
        tmp_path,
        "experiment=sdxl_capo_frs",
        "trainer.optimizer=adamw_8bit",
        f"rewards.mps.weights={tmp_path / 'none'}",
    )
    found = [(entry["kind"], entry["message"]) for entry in plan["missing here"] if entry["certain"]]
    (extra,) = [message for kind, message in found if kind == "extras"]
    assert "pip install 'capo[bitsandbytes]'" in extra and extra in told
    wanted = f"no weights at {tmp_path / 'none'}; set rewards.mps.weights"
    assert any(kind == "rewards" and wanted in message for kind, message in found)


@pytest.mark.slow
def test_a_plan_does_without_lightning_and_torchmetrics():
    """Importing them takes seconds; the checks before a run, which come first, do without them too."""
    loaded = "{'lightning', 'torchmetrics'} & set(sys.modules)"
    program = f"import sys, capo.cli.plan, capo.cli.readiness; sys.exit(bool({loaded}))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
