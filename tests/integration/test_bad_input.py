"""What a user's slip gets.

One message that names value, place and remedy, an exit code that is not 0, and nothing lost.
"""

import copy
import csv
import errno
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file

import generate
from capo.cli import evaluate as evaluate_script
from capo.cli import generate as generate_script
from capo.cli import train as train_script
from capo.cli.build import built
from capo.cli.idle import refuse_training_keys
from capo.cli.messages import disk_fault, plain_errors, start, was_interrupted
from capo.cli.readiness import check_export, check_ready, check_weights
from capo.cli.schema import check_values
from capo.data.pool.files import TensorFile
from capo.errors import InputError, Unfinished, alike
from capo.runtime.run_folder import CONFIG, OUTCOME
from capo.training.checkpoints import check_checkpoint
from fixtures import ROOT
from fixtures.configuration import composed
from fixtures.fake_rewards import BRIGHTNESS
from fixtures.tiny_pipelines import tiny_unet


@pytest.fixture(scope="module")
def plain(tiny_run):
    """A configuration that runs, to be spoilt."""
    return tiny_run("spoilt")


def spoilt(cfg, **values):
    """A copy in which dotted keys (with `__` for the dots) have other values."""
    cfg = copy.deepcopy(cfg)
    for key, value in values.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False, force_add=True)
    return cfg


def refusal(run, *arguments) -> str:
    with pytest.raises(InputError) as refused:
        run(*arguments)
    return str(refused.value)


# --- values ---


@pytest.mark.parametrize(("key", "value", "message"), [
    ("objective.beta", -3, "objective.beta=-3: must be a finite number above 0"),
    ("objective.beta", 0, "objective.beta=0: must be a finite number above 0"),
    ("objective.beta", float("nan"), "objective.beta=nan: must be a finite number above 0"),
    ("objective.beta", float("inf"), "objective.beta=inf: must be a finite number above 0"),
    ("objective.beta", "thirty", "objective.beta=thirty: must be a finite number above 0"),
    ("objective.beta", None, "objective.beta=null: must be a finite number above 0; give objective.beta="),
    ("objective.betta", 3,
     "objective.betta=3: capo.objectives.capo takes no such argument; did you mean objective.beta?"),
    ("objective._target_", "capo.objectives.cap", "objective._target_=capo.objectives.cap: cannot be used"),
    ("seed", "one", "seed=one: must be a whole number from 0 to"),
    ("seed", -1, "seed=-1: must be a whole number from 0 to"),
    ("pool.candidates", 1, "pool.candidates=1: must be a whole number from 2 to 1000000"),
    ("pool.candidates", "16", "pool.candidates=16: must be a whole number"),
    ("sampling.steps", True, "sampling.steps=true: must be a whole number from 1 to 1000"),
    ("sampling.parallel", "batch",
     "sampling.parallel=batch: must be one of operations, batches; did you mean batches?"),
    ("trainer.batch", 0, "trainer.batch=0: must be a whole number from 1 to 1000000"),
    ("trainer.max_steps", 2.5, "trainer.max_steps=2.5: must be a whole number from 1 to"),
    ("trainer.lr", 0.0, "trainer.lr=0.0: must be a finite number above 0"),
    ("trainer.gradient_clip", 0, "trainer.gradient_clip=0: must be a finite number above 0, or null"),
    ("trainer.precision", "BF16-Mixed", "did you mean bf16-mixed?"),
    ("trainer.devices", "two", "trainer.devices=two: must be a number of devices"),
    ("calibration", "Win_Rate",
     "calibration=Win_Rate: must be one of win_rate, raw, zscore; did you mean win_rate?"),
    ("noise.weighting", "sigmoidal",
     "noise.weighting=sigmoidal: must be one of sigmoid, constant; did you mean sigmoid?"),
    ("noise.shared", "no", "noise.shared=no: must be true or false"),
    ("noise.times", "stratify",
     "noise.times=stratify: must be one of independent, stratified; did you mean stratified?"),
    ("noise.times_per_pair", 0, "noise.times_per_pair=0: must be a whole number from 1 to 1000"),
    ("noise.reduction", "both", "noise.reduction=both: must be one of outside, inside"),
    ("anchor.weight", -1, "anchor.weight=-1: must be a finite number of at least 0"),
    ("anchor.slack", -0.5, "anchor.slack=-0.5: must be a finite number of at least 0"),
    ("rewards.r.scale", "20", "rewards.r.scale=20: must be a finite number above 0"),
    ("pairs.lower", 3, "pairs.lower=3: must be one of frontier, all_dominated"),
    ("prompts.train", 5, "prompts.train=5: must be text"),
    ("model.backbone.dtype", "fp16", "model.backbone.dtype=fp16: must be one of float32, float16, bfloat16"),
    ("model.backbone.revisions", "main",
     "model.backbone.revisions=main: capo.backbones.UNetBackbone takes no such argument; "
     "did you mean model.backbone.revision?"),
    ("evaluate", "yes", "evaluate=yes: must be true or false"),
    ("export", "ful", "export=ful: must be one of adapter, full, single_file; did you mean full?"),
    ("export_dtype", "fp16", "export_dtype=fp16: must be one of float32, float16, bfloat16"),
])  # fmt: skip
def test_values_that_cannot_be_used(plain, key, value, message):
    cfg = copy.deepcopy(plain)
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    assert message in refusal(train_script.run, cfg)
    assert not Path(cfg.run_dir).exists()


@pytest.mark.parametrize(("values", "message"), [
    ({"pairs": {"_target_": "capo.pairs.frs", "_partial_": True, "lower": "below"}},
     "pairs.lower=below: must be one of frontier, all_dominated"),
    ({"pairs": {"_target_": "capo.pairs.reward_sum", "_partial_": True, "weights": [1.0]}},
     "pairs.weights=[1.0]: must be 2 finite numbers, one for each reward in their order, none negative"),
    ({"objective": {"_target_": "capo.objectives.capo", "_partial_": True, "beta": 1},
      "noise.draw": "logit_normal"},
     "noise.draw=logit_normal: model=tiny draws times by uniform or logsnr_normal or"),
    ({"objective": {"_target_": "capo.objectives.sft", "_partial_": True}, "anchor.weight": 0.5},
     "anchor.weight=0.5: must be 0, since the objective has no reference"),
    ({"objective": {"_target_": "capo.objectives.sft", "_partial_": True}, "noise.reduction": "inside"},
     "noise.reduction=inside: must be outside, since the objective is no function of a margin"),
    ({"objective": {"_target_": "capo.objectives.sdpo", "_partial_": True, "beta": 1, "mu": 0.9},
      "noise.shared": False},
     "noise.shared=false: must be true, since the objective compares the errors of winner and loser"),
    ({"objective": {"_target_": "capo.objectives.sdpo", "_partial_": True, "beta": 1, "mu": 1.5},
      "noise.shared": True},
     "objective.mu=1.5: must be a finite number from 0 to 1"),
    ({"noise.source": "prior", "noise.shared": True},
     "noise.shared=true: must be false, since with source=prior each candidate has noise of its own"),
    ({"noise.source": "prior", "noise.shared": False, "pool.imported": "FOLDER"},
     "noise.source=prior: must be drawn, since nobody knows from which noise imported images were made"),
    ({"noise.source": "inverse"}, "noise.source=inverse: must be one of drawn, prior, inverted"),
    ({"selection.group": 4}, "selection.group=4: objective=capo reads pairs; leave it at 2"),
    ({"objective": {"_target_": "capo.objectives.kto", "_partial_": True, "beta": 1}, "selection.group": 9},
     "selection.group=9: must be from 2 to"),
    ({"objective": {"_target_": "fixtures.fake_objectives.mean_loss", "_partial_": True, "beta": 1}},
     "losses of shape () for 3 pairs"),
    ({"objective": {"_target_": "fixtures.fake_objectives.picky", "_partial_": True, "beta": 1}},
     "objective.beta=1: must be 7"),
])  # fmt: skip
def test_what_a_function_refuses_is_said_of_its_key(plain, values, message):
    cfg = copy.deepcopy(plain)
    for key, value in values.items():
        OmegaConf.update(cfg, key, value, merge=False)
    assert message in refusal(train_script.run, cfg)
    assert not Path(cfg.run_dir).exists()


def test_the_options_of_a_family_are_checked_before_its_weights_are_looked_for():
    cfg = composed("model=sd3")
    for key, value, message in (
        ("sequence_length", 600, "must be a whole number from 0 to 512"),
        ("t5", "no", "must be true or false"),
        ("sequence_length", 2.5, "must be a whole number"),
    ):
        wrong = spoilt(cfg, **{f"model__backbone__{key}": value})
        assert f"model.backbone.{key}={value}: {message}" in refusal(check_values, wrong)


def test_a_format_that_an_adapter_cannot_have_is_refused(plain):
    lora = {"rank": 2, "alpha": 2, "seed": 0}
    cfg = spoilt(plain, export_dtype="float16", model__lora=lora)
    message = "export_dtype=float16: an adapter is always written in float32"
    assert message in refusal(train_script.run, cfg)
    assert not Path(cfg.run_dir).exists()
    check_ready(spoilt(plain, export_dtype="float16", model__lora=lora, export="full"))
    check_ready(spoilt(plain, export_dtype="float16"))


def test_a_single_file_of_an_mmdit_is_refused(plain):
    cfg = spoilt(plain, export="single_file")
    check_export(cfg)
    cfg.model = composed("model=sd3").model
    assert "export=single_file: model=sd3 is no UNet" in refusal(check_export, cfg)


def test_all_faults_stand_in_one_message(tiny_run):
    cfg = spoilt(tiny_run("faults", config="generate"), trainer__lr=-1, seed="x", rewards__g__link="exp")
    assert refusal(generate_script.run, cfg).splitlines() == [
        "these values cannot be used:",
        "  seed=x: must be a whole number from 0 to 9223372036854775806",
        "  trainer.lr=-1: must be a finite number above 0 and at most 1",
        "  rewards.g.link=exp: must be one of identity, log",
    ]


def test_a_reference_to_nothing_is_named(plain):
    assert "objective.beta cannot be resolved" in refusal(
        check_values, spoilt(plain, objective__beta="${model.beta.sft}")
    )


def test_counts_of_prompts_are_numbers():
    assert "prompts.train=many: must be a whole number" in refusal(
        check_values, composed("prompts.train=many")
    )


# --- what the configuration asks for is not there ---


@pytest.fixture(scope="module")
def sdxl():
    return composed("objective=capo", "model=sdxl", "pairs=frs")


def test_sdxl_says_where_its_weights_were_looked_for_and_how_to_provide_them(sdxl, tmp_path):
    cfg = spoilt(sdxl, run_dir=str(tmp_path / "run"))
    message = refusal(train_script.run, cfg)
    assert message.startswith(
        "model=sdxl: weights 'stabilityai/stable-diffusion-xl-base-1.0' (revision "
        "462165984030d82259a11f4367a4eed129e94a7b"
    )
    assert str(Path("stabilityai/stable-diffusion-xl-base-1.0").absolute()) in message
    assert (
        huggingface_hub.constants.HF_HUB_CACHE in message
        and "https://huggingface.co (not asked, because HF_HUB_OFFLINE" in message
    )
    for way in (
        "hf download stabilityai/stable-diffusion-xl-base-1.0 --revision 4621",
        "model.backbone.weights=FOLDER",
        "HF_HOME=FOLDER",
    ):
        assert way in message
    # 2 567 463 684 x 4, x 4, x 8, and the reference, most of it x 2: 10.3 + 10.3 + 20.5 + 5.1
    for amount in (
        "2,567,463,684",
        "weights 10.3",
        "gradients 10.3",
        "optimizer 20.5",
        "reference 5.1",
        "46.2 GB",
        "plan=true",
    ):
        assert amount in message
    assert "hour" not in message and "prompts" not in message and "scorer" not in message
    assert not (tmp_path / "run").exists()


def test_after_the_weights_come_rewards_then_prompts(sdxl, tiny_folder):
    none = {
        f"{place}rewards__{name}": {"scorer": None}
        for place in ("", "evaluation__")
        for name in ("vqascore", "vila")
    }
    there = spoilt(sdxl, model__backbone__weights=str(tiny_folder), **none)
    message = refusal(check_ready, there)
    assert message.startswith("rewards: vqascore, vila have no scorer.")
    assert "+rewards.vqascore.scorer._target_=module.Class" in message and "rewards=shapes" in message
    shapes = composed().rewards
    there = spoilt(there, rewards=shapes)
    assert "rewards@evaluation.rewards=shapes" in refusal(check_ready, there)
    files = composed("prompts=text").prompts
    there = spoilt(there, evaluation__rewards=shapes, prompts=files)
    assert refusal(check_ready, there).startswith(
        "prompts.test, prompts.train, prompts.validation: not given"
    )
    assert "model=sdxl" not in refusal(check_ready, there)


def test_a_scorer_of_ones_own_can_be_named_on_the_command_line():
    cfg = composed(
        "rewards=[]",
        "+rewards.light.scorer._target_=fixtures.fake_rewards.Brightness",
        "rewards@evaluation.rewards=looks",
    )
    check_ready(cfg)
    OmegaConf.update(cfg, "rewards.light.requires", ["nowhere"], force_add=True)
    assert "reward 'light' needs nowhere, which is not installed" in refusal(check_ready, cfg)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"prompts\.test=.*test\.txt: cannot be read \(No such file"),
        (b"\n", r"prompts\.test=.*test\.txt: the file has no prompt"),
    ],
)
def test_prompts_that_cannot_be_read_or_are_empty(plain, tmp_path, content, message):
    path = tmp_path / "test.txt"
    if content is not None:
        path.write_bytes(content)
    assert re.match(message, refusal(train_script.run, spoilt(plain, prompts__test=str(path))))


def test_best_worst_with_three_rewards_is_refused_before_anything_is_written(tiny_run):
    message = refusal(train_script.run, tiny_run("three", "pairs=best_worst", rewards=3))
    assert "best_worst" in message and "rewards=[NAME]" in message and "pairs=frs" in message
    assert not (tiny_run.folder / "three").exists()


def test_a_device_that_is_not_here(plain, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "trainer.accelerator=gpu" in refusal(check_ready, spoilt(plain, trainer__accelerator="gpu"))


@pytest.mark.parametrize(("key", "value"), [("trainer.accelerator", "mps"), ("trainer.devices", [7])])
def test_devices_are_looked_for_before_anything_is_written(plain, monkeypatch, key, value):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    cfg = copy.deepcopy(plain)
    OmegaConf.update(cfg, key, value, merge=False)
    assert f"{key}={value}: " in refusal(train_script.run, cfg)
    assert not Path(cfg.run_dir).exists()


class Same:
    """The same score for every image."""

    def __call__(self, images, prompts):
        return torch.ones(len(images))


class Broken:
    """No number for any image of a cat."""

    def __call__(self, images, prompts):
        return torch.tensor([float("nan") if "cat" in prompt else 1.0 for prompt in prompts])


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (
            Same,
            r"none of 4 prompts .* by the pairs strategy capo\.pairs\.\S+frs: own scores all candidates of a "
            "prompt alike; correct it, or leave it out",
        ),
        (
            Broken,
            r'prompt \d \("a? ?\w+ cat"\), candidate 0: reward .own. is nan, which cannot be compared; '
            r"check its weights",
        ),
    ],
)
def test_scores_that_give_no_pair(tiny_run, scorer, message):
    cfg = tiny_run(f"scores-{scorer.__name__}")
    reward = {"own": {"scorer": {"_target_": f"{__name__}.{scorer.__name__}"}}}
    assert re.search(
        message, refusal(train_script.run, spoilt(cfg, rewards=reward, evaluation__rewards=reward))
    )


def test_an_input_error_of_what_is_built_stays_one():
    cfg = composed("model.backbone.weights=/nowhere/at/all")
    assert refusal(built, cfg, "model.backbone").startswith("weights '/nowhere/at/all': no such folder")
    cfg.model.backbone.weights = "???"
    assert refusal(built, cfg, "model.backbone") == (
        "model.backbone.weights is not given; give model.backbone.weights=VALUE"
    )


# --- runs ---


@pytest.fixture(scope="module")
def finished(tiny_run):
    train_script.run(tiny_run("finished"))
    return tiny_run.folder / "finished"


def written_by(folder: Path, **values):
    """config.yaml with another writer; returns what stood there."""
    path = folder / CONFIG
    before = path.read_text()
    cfg = OmegaConf.load(path)
    cfg.written_by.update(values)
    OmegaConf.save(cfg, path)
    return before


def test_a_run_of_another_version_names_both_and_the_remedy(tiny_run, finished):
    before = written_by(finished, layout=4, capo="9.1.0")
    try:
        evaluation = tiny_run("unused", f"run={finished}", config="evaluate")
        for message in (
            refusal(train_script.run, tiny_run("finished")),
            refusal(evaluate_script.run, evaluation, [], finished),
        ):
            assert f"capo 9.1.0 (layout 4); this is capo {version('capo')}, which reads layout 3" in message
            assert "pip install capo==9.1.0" in message and "hydra.run.dir" in message
    finally:
        (finished / CONFIG).write_text(before)


def test_a_config_that_cannot_be_read_is_named(tiny_run, finished):
    before = (finished / CONFIG).read_text()
    try:
        (finished / CONFIG).write_text(before[: len(before) // 2] + ": [")
        assert f"{finished / CONFIG} cannot be read" in refusal(train_script.run, tiny_run("finished"))
    finally:
        (finished / CONFIG).write_text(before)


def test_a_finished_run_needs_neither_weights_nor_prompts(tiny_run, finished):
    cfg = tiny_run("finished")
    path = finished / CONFIG
    before = path.read_text()
    gone = spoilt(cfg, model__backbone__weights="/gone", prompts__train="/gone/train.txt")
    try:
        path.write_text(
            before.replace(str(cfg.model.backbone.weights), "/gone").replace(
                str(cfg.prompts.train), "/gone/train.txt"
            )
        )
        assert 0 <= train_script.run(gone) <= 1
    finally:
        path.write_text(before)


def test_a_checkpoint_of_another_model(finished, tmp_path):
    path = finished / "checkpoints" / "last.ckpt"
    module = torch.nn.Module()
    module.policy = tiny_unet()
    check_checkpoint(path, module)
    module.policy.conv_in = torch.nn.Conv2d(4, 16, 3)
    message = refusal(check_checkpoint, path, module)
    assert (
        "checkpoint of another model (2 of" in message
        and "policy.conv_in.bias" in message
        and "hydra.run.dir" in message
    )
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(path.read_bytes()[:1000])
    assert f"{cut} cannot be read" in refusal(check_checkpoint, cut, module)


# --- disks ---


@pytest.mark.parametrize(("error", "said"), [
    (MemoryError(), "this machine's memory .*has run out .MemoryError.: end what else is in it"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "this machine's memory .*Cannot allocate memory"),
    (torch.OutOfMemoryError("CUDA out of memory."), "the device's memory has run out .CUDA out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "this machine.*lower sampling.batch"),
])  # fmt: skip
def test_memory_that_runs_out_ends_in_a_message(error, said, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended, plain_errors():
        raise error
    assert ended.value.code == 2 and re.search(f"error: {said}", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="another fault"), plain_errors():
        raise RuntimeError("another fault")


def test_a_pool_root_that_cannot_be_written(tiny_run, monkeypatch):
    opened = os.open

    def read_only(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(root)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *arguments, **options)

    root = tiny_run.folder / "read-only"
    cfg = tiny_run("nowhere", f"pool.root={root}")
    monkeypatch.setattr(os, "open", read_only)
    message = refusal(train_script.run, cfg)
    assert (
        str(root) in message
        and "cannot be written (Read-only file system): make room, or set pool.root to a folder" in message
    )


@pytest.mark.parametrize("name", [CONFIG, "000002.ckpt", OUTCOME])
def test_a_full_disk_in_training_is_named_and_the_run_goes_on_later(tiny_run, monkeypatch, name):
    sync = os.fsync

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(f"/.{name}.tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    folder = tiny_run.folder / f"full-{name}"
    cfg = tiny_run(folder.name, "evaluate=false")
    monkeypatch.setattr(os, "fsync", full)
    message = refusal(train_script.run, cfg)
    assert re.search(
        rf"full-.*{name} cannot be written \(No space left on device\): make room there", message
    )
    assert not list(folder.rglob(name)) and not list(folder.rglob(".*.tmp"))
    monkeypatch.setattr(os, "fsync", sync)
    assert 0 <= train_script.run(cfg) <= 1


def test_a_full_disk_under_another_library_is_one_message(tmp_path, capsys):
    """Safetensors writes the policy; a limit on the size of files stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(SafetensorError) as failed:
            save_file({"weights": torch.zeros(1000)}, tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "weights cannot be written" in disk_fault(failed.value)
    with pytest.raises(SystemExit) as end, plain_errors():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/file")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: /there/file cannot be used (No space left on device): make room there"
    )


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EISDIR, errno.EIO])
def test_a_place_that_no_file_system_takes_is_one_message(number):
    fault = disk_fault(OSError(number, os.strerror(number), "/there/file"))
    assert fault.startswith(f"/there/file cannot be used ({os.strerror(number)}): ")


def test_a_terminal_that_cannot_show_a_character_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("MPLBACKEND", "agg")  # is put back after the command has replaced it
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii", write_through=True))
    start(lambda: print("win-rate \u2502 ü"))
    assert shown.getvalue() == b"win-rate \\u2502 \\xfc\n"


def test_a_message_brings_no_escape_sequence_to_the_terminal(capsys):
    with pytest.raises(SystemExit), plain_errors():
        raise InputError("prompts.train=\x1b[2Jgone: no such file")
    assert capsys.readouterr().err == "error: prompts.train=\\x1b[2Jgone: no such file\n"


# --- what stands between command line and stage ---


def test_what_was_probably_meant():
    known = ["objective", "objective.beta", "model.bias", "trainer.lr", "model.lr", "pool.root"]
    assert alike("objectiv.beta", known) == ["objective.beta"]
    assert alike("objective.betta", known) == ["objective.beta"]
    assert alike("objectve", known) == ["objective"]
    assert set(alike("lr", known)) == {"trainer.lr", "model.lr"}
    assert alike("flavor", known) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["objectiv.beta=3"], "error: there is no key 'objectiv.beta'; did you mean objective.beta?"),
        (["objective.betta=3"], "error: there is no key 'objective.betta'; did you mean objective.beta?"),
        (
            ["objective=CAPO"],
            "error: objective=CAPO: no such choice; there are capo, capo_group, dmpo, dpo, hinge, ipo, kto, "
            "linear_dpo, mapo, sdpo, sft, smpo; did you mean objective=capo?",
        ),
        (["validation.held_out=[lookz]"], "error: validation.held_out=lookz: no such choice; there are "),
        (["rewards=[looks,alignmen]"], "error: rewards=alignmen: no such choice; there are alignment, "),
        (
            ["objective.beta"],
            "error: 'objective.beta' cannot be read (missing EQUAL at '<EOF>'); write key=value",
        ),
        (
            ["hydra.run.dir=file/run"],
            "error: file/run cannot be used (Not a directory): choose another place",
        ),
        (["hydra.run.dir=file"], "error: file cannot be used (File exists): choose another place"),
    ],
)
def test_slips_that_hydra_finds(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--config-path", str(ROOT / "conf"), *arguments])
    monkeypatch.setenv("MPLBACKEND", "agg")  # is put back after the command has replaced it
    with pytest.raises(SystemExit) as end:
        start(generate.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(message) and len(error.splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_interrupts_are_known_behind_what_lightning_makes_of_them(capsys):
    def fit():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(SystemExit) as end, plain_errors("the same command"):
        fit()
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted; finished work is kept, and the same command resumes it\n"
    with pytest.raises(SystemExit) as end, plain_errors():
        sys.exit(1)
    assert end.value.code == 1 and not was_interrupted(end.value)
    assert not HydraConfig.initialized()


def test_work_of_which_a_part_failed_ends_with_code_1(capsys):
    with pytest.raises(SystemExit) as end, plain_errors():
        raise Unfinished("93 of 96 files are made")
    assert end.value.code == 1 and capsys.readouterr().err == "error: 93 of 96 files are made\n"


# --- real processes ---


@pytest.mark.parametrize(("script", "arguments", "message"), [
    pytest.param(
        "train.py", ["objective=capo", "model=sdxl", "pairs=frs"],
        "error: model=sdxl: weights 'stabilityai/stable-diffusion-xl-base-1.0'", marks=pytest.mark.slow),
    ("generate.py", ["pool.candidates=1"], "error: pool.candidates=1: must be a whole number from 2"),
    ("evaluate.py", ["run=nothing"],
     "error: run=nothing is not a run directory: it has no config.yaml; "
     "give the directory that train.py printed"),
])  # fmt: skip
def test_a_slip_ends_a_process_with_one_message(helper, tmp_path, script, arguments, message):
    code, error = helper.run(script, *arguments, cwd=tmp_path)
    assert code == 2 and error.startswith(message)
    assert "Traceback" not in error and len(error.splitlines()) <= 8
    assert (
        not list(tmp_path.rglob(f"outputs/**/run/{CONFIG}"))
        and not (tmp_path / "nothing").exists()
        and not (tmp_path / "pools").exists()
    )


def test_the_trace_comes_back_on_request(helper, tmp_path):
    code, error = helper.run("generate.py", "pool.candidates=1", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert code == 1 and "Traceback" in error and "capo.errors.InputError: pool.candidates=1" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "argument"),
    [("train.py", "model=sdxl"), ("generate.py", "seed=x"), ("evaluate.py", "run=nothing")],
)
def test_the_same_without_a_helper(tmp_path, script, argument):
    done = subprocess.run(
        [sys.executable, ROOT / script, argument], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def shards(root: Path) -> dict[str, int]:
    """Latent files and when they were written; each is whole."""
    found = {
        str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.glob("*/latents/*.safetensors")
    }
    for name in found:
        TensorFile(root / name, verify=True)
    return found


def assert_interrupted(process, goes_on: str) -> None:
    assert process.wait() == 130
    assert process.error.splitlines()[-1] == f"interrupted; finished work is kept, and {goes_on} resumes it"
    assert "Traceback" not in process.error and "Error" not in process.error


def test_ctrl_c_in_generation(helper, command_line, tmp_path):
    root = tmp_path / "pools"
    command = ["--config-path", ROOT / "conf", *command_line, f"pool.root={root}", "pool.candidates=64"]
    process = helper.start("generate.py", *command, ends="after latents/* 2", by=signal.SIGINT)
    assert_interrupted(process, "the same command")
    kept = shards(root)
    assert 2 <= len(kept) < 8 and not [path for path in root.rglob(".*") if path.is_file()]
    assert helper.run("generate.py", *command)[0] == 0
    after = shards(root)
    assert kept.items() <= after.items() and len([name for name in after if "-0-train/" in name]) == 8


def test_ctrl_c_in_training(helper, command_line, tiny_run, tmp_path):
    command = [
        "--config-path",
        ROOT / "conf",
        *command_line,
        f"hydra.run.dir={tmp_path / 'run'}",
        "trainer.max_steps=4",
        "validation.every=2",
        "evaluate=false",
    ]
    process = helper.start("train.py", *command, ends="after last.ckpt 1", by=signal.SIGINT)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert_interrupted(process, f"the same command with hydra.run.dir={tmp_path / 'run'}")
    step = torch.load(last, weights_only=True)["global_step"]
    assert 2 <= step < 4 and not (tmp_path / "run" / OUTCOME).exists()
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.is_file()]
    code, error = helper.run("train.py", *command)
    assert code == 0, error
    with (tmp_path / "run" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
def test_ctrl_c_in_evaluation(helper, finished, tiny_run, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    results = (run / "evaluation" / "results.json").read_bytes()
    command = [
        "--config-path",
        ROOT / "conf",
        f"run={run}",
        f"pool.root={tiny_run.folder / 'pools'}",
        f"trust=[{BRIGHTNESS}]",
        "evaluation.images=64",
    ]
    moment = "after evaluation/pool/*/latents/* 3"
    process = helper.start("evaluate.py", *command, ends=moment, by=signal.SIGINT)
    assert_interrupted(process, "the same command")
    assert (run / "evaluation" / "results.json").read_bytes() == results
    kept = shards(run / "evaluation" / "pool")
    code, error = helper.run("evaluate.py", *command)
    assert code == 0, error
    assert kept.items() <= shards(run / "evaluation" / "pool").items()
    assert (run / "evaluation" / "results.json").read_bytes() != results


def test_ctrl_c_ends_a_sweep(helper, command_line, tmp_path):
    command = [
        "--config-path",
        ROOT / "conf",
        "-m",
        *command_line,
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        "seed=0,1",
        "trainer.max_steps=4",
        "validation.every=2",
        "evaluate=false",
    ]
    moment = "after 0/checkpoints/last.ckpt 1"
    process = helper.start("train.py", *command, ends=moment, by=signal.SIGINT)
    assert_interrupted(process, f"the same command with hydra.sweep.dir={tmp_path / 'sweep'}")
    assert not (tmp_path / "sweep" / "0" / "error.txt").exists() and not (tmp_path / "sweep" / "1").exists()


@pytest.mark.parametrize("key", ["plan", "check"])
def test_what_only_training_knows_is_refused_elsewhere(plain, key):
    cfg = spoilt(plain, **{key: True})
    with pytest.raises(InputError, match=f"{key}=true belongs to train.py"):
        refuse_training_keys(cfg, ())
    refuse_training_keys(plain, ())


def test_an_autoencoder_that_is_nowhere_is_missed_before_the_pipeline_loads(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("nowhere/at-all", "/not/there"):
        with pytest.raises(InputError, match=f"model.backbone.vae={source}.*give its folder, or null"):
            check_weights(composed(f"+model.backbone.vae={source}"))
