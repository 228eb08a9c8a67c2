"""Files of a run that were damaged, edited or moved: each is a message, or read as what it is."""

import json
import os
import shutil
import time
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file

from capo.backbones import UNetBackbone
from capo.backbones.export import export_policy, load_policy, policy_fingerprint
from capo.backbones.lora import LORA_FILE, add_lora
from capo.backbones.model_card import ModelCard
from capo.cli import tune
from capo.cli.compose import composed
from capo.cli.run_config import open_run, read_config
from capo.cli.run_labels import read_values
from capo.cli.sweep import found_figures, read_job
from capo.cli.yaml_files import read_yaml
from capo.errors import DamagedFile, InputError
from capo.evaluation.evaluate import stored_results
from capo.evaluation.held_out import alarms
from capo.evaluation.reports.charts import read_curves
from capo.evaluation.seeds import read_rates
from capo.rewards.weights import read_state
from capo.runtime.run_folder import read_outcome
from capo.training.checkpoints import WholeCheckpoints, check_checkpoint, read_checkpoint
from capo.training.fit import trained_steps
from capo.training.loggers import CurvesFile, logged_step, pool_seconds
from capo.training.strength import read_strength
from fixtures.damage import damaged, examples, put

FAST, SLOW = 30, 300
BUDGETS = [FAST, pytest.param(SLOW, marks=pytest.mark.slow)]
RATE = {"mean": 0.75, "low": 0.4, "high": 0.9}
CARD = {"objective": "capo", "data": "d"}
SETTINGS = {"prompts": ["x"], "seed": 0, "images_per_prompt": 2, "rewards": {}, "policy_generator": "g"}
FILES = {
    "config.yaml": "trainer: {max_steps: 3}\nmodel: {name: tiny}\nwritten_by: {layout: 3, capo: '0.2'}\n",
    "outcome.json": json.dumps({"val/win_rate": 0.5, "policy": "p", "card": CARD}),
    "metrics.csv": "alarm/b,step,val/win_rate\n0.0,1,0.5\n1.0,2,\n",
    "pools.csv": "pool/train/latents,time/pool/seconds\n0.5,30.0\n1.0,62.5\n",
    "strength.json": json.dumps({"chosen": 1.0, "curve": []}),
    "evaluation/results.json": json.dumps(
        {"win_rate": {"a": RATE}, "zero": {"a": RATE}, "score": {}, "policy": "p", "base": "b"}
    ),
    "evaluation/settings.json": json.dumps(SETTINGS),
    "evaluation/win_rates.csv": "prompt_id,prompt,win_rate/a\nx,a cat,0.5\ny,\"a, b\",1.0\n",
    "evaluation/report.html": "<html>",
    ".hydra/overrides.yaml": "- seed=1\n- objective.beta=3\n",
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


READERS = {
    "config.yaml": [lambda folder: read_config(folder).trainer.max_steps, read_values],
    "outcome.json": [read_outcome],
    "metrics.csv": [
        lambda folder: alarms(folder / "metrics.csv"),
        lambda folder: read_curves(folder / "metrics.csv"),
        logged_step,
        lambda folder: CurvesFile(folder).drop_after(1),
    ],
    "pools.csv": [pool_seconds],
    "strength.json": [read_strength],
    "evaluation/results.json": [lambda folder: stored_results(folder / "evaluation", SETTINGS)],
    "evaluation/settings.json": [lambda folder: stored_results(folder / "evaluation", SETTINGS)],
    "evaluation/win_rates.csv": [read_rates],
    ".hydra/overrides.yaml": [read_job],
}


@pytest.mark.parametrize("number", BUDGETS)
@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_are_a_message_or_read_as_what_they_are(run, name, number):
    path, whole = run / name, FILES[name].encode()

    @examples(number)
    @given(damaged(whole))
    def holds(content):
        for read in READERS[name]:
            put(path, content)
            try:
                read(run)
            except InputError as error:  # of another layout: the whole directory is named
                assert path.name in str(error) or f"{run} is a run of capo" in str(error)

    for read in READERS[name]:
        read(run)
        put(path, whole)
    holds()


NOTHING_OF_IT = [rb'{"a": "\ud800"}', b"\xff\xfe\x00", b"[" * 100_000, b"", b"3", b'"text"', b"\x00" * 50]


@pytest.mark.parametrize("content", NOTHING_OF_IT)
@pytest.mark.parametrize("name", ["outcome.json", "strength.json", "evaluation/results.json"])
def test_json_that_is_no_object_names_the_file(run, name, content):
    (run / name).write_bytes(content)
    read = {"outcome.json": read_outcome, "strength.json": read_strength}.get(name, found_figures)
    with pytest.raises(DamagedFile, match=rf"{name.split('/')[-1]} cannot be read \(it "):
        read(run)


def test_strengths_of_another_form_are_named(run):
    (run / "strength.json").write_text('{"curve": [{"strength": "a"}]}')
    with pytest.raises(DamagedFile, match=r"strength.json cannot be read .*curve.*strength.*; remove it"):
        read_strength(run)


def test_damaged_strengths_are_told_before_training(tmp_path, monkeypatch):
    (tmp_path / "strength.json").write_text("{")
    monkeypatch.setattr(tune, "open_run", lambda *_: pytest.fail("the run has begun"))
    with pytest.raises(DamagedFile, match=r"strength\.json cannot be read \(it is not JSON"):
        tune.complete_run(composed("train", ["evaluate=true", "threads=1"]), None, tmp_path)
    with pytest.raises(pytest.fail.Exception):  # which writes the file anew
        tune.complete_run(
            composed("train", ["evaluate=true", "threads=1", "validation.strengths=[0.5]"]), None, tmp_path
        )


@pytest.mark.parametrize(("text", "message"), [
    ("step,a\n1,2,3\n", "row 2 has 3 cells, but there are 2 columns"),
    ("step,step\n1,2\n", "its first line does not name the columns"),
    ("step,a\nsoon,2\n", "step is 'soon', not a finite number"),
    ("a\n2\n", "it has no column step"),
    ("step,a\n1.5,2\n", "step is '1.5', not a finite number"),
    ('step,a\n1,"2\n', "it is not CSV"),
])  # fmt: skip
def test_curves_that_are_none_are_named(run, text, message):
    (run / "metrics.csv").write_text(text)
    with pytest.raises(DamagedFile) as refused:
        logged_step(run)
    assert message in str(refused.value) and "restore it, or remove it" in str(refused.value)


def test_a_damaged_evaluation_is_made_again_and_told(run, caplog):
    assert stored_results(run / "evaluation", SETTINGS)["win_rate"]
    for name in ("settings.json", "results.json", "win_rates.csv"):
        path = run / "evaluation" / name
        whole = path.read_bytes()
        path.write_bytes(b"{\xff")
        assert stored_results(run / "evaluation", SETTINGS) is None
        assert f"{path} cannot be read" in caplog.text and "is made again" in caplog.text
        path.write_bytes(whole)


def test_aliases_of_yaml_are_refused_before_they_are_expanded(run):
    lines = ["a: &a [x, x]", *(f"{later}: &{later} [{', '.join([f'*{before}'] * 9)}]"
                               for before, later in zip("abcdefghi", "bcdefghij", strict=True))]  # fmt: skip
    (run / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(DamagedFile, match=r"config\.yaml cannot be read \(it has an alias"):
        read_config(run)


@pytest.mark.parametrize("name", ["folder", "circle", "pipe"])
def test_no_ordinary_file_in_place_of_a_configuration_is_named(run, name):
    path = run / "config.yaml"
    path.unlink()
    {"folder": path.mkdir, "circle": lambda: path.symlink_to(path.name), "pipe": lambda: os.mkfifo(path)}[
        name
    ]()
    with pytest.raises(DamagedFile, match=r"config\.yaml cannot be read"):
        read_yaml(path, dict, "restore it")


# --- checkpoints ---


def checkpoint(**changes) -> dict:
    weights = {"policy.w": torch.arange(6.0)}
    entries = {"state_dict": weights, "global_step": 3, "loops": {}, "callbacks": {}, "optimizer_states": []}
    return entries | changes


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = torch.nn.ParameterDict({"w": torch.zeros(6)})


@pytest.mark.parametrize("number", BUDGETS)
def test_damaged_checkpoints_are_refused_or_the_same(tmp_path, number):
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint(checkpoint(), path)
    whole, before = path.read_bytes(), repr(checkpoint())

    @examples(number)
    @given(damaged(whole))
    def holds(content):
        put(path, content)
        try:
            assert repr(check_checkpoint(path, Module())) == before
        except DamagedFile as error:
            assert str(error).startswith(f"{path} cannot be read (")

    check_checkpoint(path, Module())
    holds()


@pytest.mark.parametrize(("content", "message"), [
    ([1], "it holds no names with values"),
    ({"w": 1}, "it has no state_dict"),
    (checkpoint(state_dict=[1]), "state_dict holds no tensors by name"),
    (checkpoint(state_dict={"w": 1}), "state_dict holds no tensors by name"),
    (checkpoint(average=3), "average holds no tensors by name"),
    (checkpoint(global_step="3"), "global_step is str, not int"),
    (checkpoint(loops=None), "loops is NoneType, not dict"),
    (checkpoint(base=7), "base is no text"),
])  # fmt: skip
def test_what_is_no_checkpoint_of_a_run_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(DamagedFile) as refused:
        read_checkpoint(tmp_path / "last.ckpt", "remove it")
    assert message in str(refused.value)


class Sleeper:
    """Its pickle calls something when it is loaded."""

    def __reduce__(self):
        return time.sleep, (0,)


def test_a_pickle_that_is_refused_is_told_without_the_advice_to_load_it(tmp_path):
    torch.save(checkpoint(loops=Sleeper()), tmp_path / "last.ckpt")
    with pytest.raises(
        DamagedFile, match=r"\(its pickle is damaged, or holds more .* run code\); rem"
    ) as refused:
        read_checkpoint(tmp_path / "last.ckpt", "remove it")
    assert "weights_only" not in str(refused.value)
    with pytest.raises(InputError, match=r"no state dict \(its pickle is damaged, or holds more") as refused:
        read_state(tmp_path / "last.ckpt", "weights")
    assert "weights_only" not in str(refused.value)


def test_a_flipped_bit_of_a_weight_is_found_before_a_run_goes_on(tmp_path):
    path, entries = tmp_path / "last.ckpt", checkpoint()
    WholeCheckpoints().save_checkpoint(entries, path)
    content = bytearray(path.read_bytes())
    content[content.index(entries["state_dict"]["policy.w"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"last\.ckpt cannot be read \(its part .* was changed\)"):
        check_checkpoint(path, Module())


def test_the_remedy_for_a_last_checkpoint_is_one_that_the_run_takes(tmp_path):
    """A finished run does not begin anew without it, so that removing it alone would be refused."""
    last, module = tmp_path / "checkpoints" / "last.ckpt", MagicMock()
    last.parent.mkdir()
    last.write_bytes(b"cut off")
    with pytest.raises(DamagedFile, match=r"; remove it to start training again$"):
        trained_steps(tmp_path, module)
    cfg = composed("train", [f"run_dir={tmp_path}", "trainer.max_steps=3"])
    open_run(tmp_path, cfg)
    (tmp_path / "outcome.json").write_text("{}")
    cfg.trainer.max_steps = 4
    open_run(tmp_path, cfg)  # which goes by the name alone
    with pytest.raises(DamagedFile, match=r"; restore it, .* outcome.json and checkpoints/last.ckpt from it"):
        trained_steps(tmp_path, module)
    last.unlink()
    with pytest.raises(InputError, match=r"; to replace that run by a new one, remove outcome.json from it"):
        open_run(tmp_path, cfg)
    (tmp_path / "outcome.json").unlink()
    open_run(tmp_path, cfg)
    assert trained_steps(tmp_path, module) == 0


def test_a_best_checkpoint_of_no_use_is_told_before_a_run_goes_on(tmp_path):
    """It is read at the end alone, when the steps have been trained and outcome.json is gone."""
    folder, module = tmp_path / "checkpoints", Module()
    module.backbone, module.trained_names = MagicMock(fingerprints={"denoiser": "b"}), lambda: {"policy.w"}
    last, best = folder / "last.ckpt", folder / "000002.ckpt"

    def write(step, best="/elsewhere/000002.ckpt"):
        callbacks = {"Other": {}, "ValidatedCheckpoint{}": {"best_model_path": best}}
        WholeCheckpoints().save_checkpoint(checkpoint(global_step=step, callbacks=callbacks), last)

    write(4)
    with pytest.raises(DamagedFile) as refused:
        trained_steps(tmp_path, module)
    told = f"{best} cannot be read (it is not there); "
    assert str(refused.value) == (
        f"{told}restore it, or remove {last}, which names it, to start training again"
    )
    (tmp_path / "outcome.json").write_text("{}")
    with pytest.raises(DamagedFile, match=r"to replace that run by a new one, remove outcome.json and check"):
        trained_steps(tmp_path, module)
    write(2)
    with pytest.raises(DamagedFile) as refused:
        trained_steps(tmp_path, module)
    assert str(refused.value) == f"{told}copy {last} there, which is of the same step"
    shutil.copy(last, best)
    assert trained_steps(tmp_path, module) == 2
    best.write_bytes(best.read_bytes()[:-9])
    with pytest.raises(DamagedFile, match=r"000002\.ckpt cannot be read"):
        trained_steps(tmp_path, module)
    write(4, best="")  # of a run that was not validated yet
    assert trained_steps(tmp_path, module) == 4


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DamagedFile, match=r"best\.ckpt cannot be read \(it is not there\); train again"):
        read_checkpoint(tmp_path / "best.ckpt", "train again")


# --- policies and models ---


CARD = ModelCard("capo", "data")


@pytest.fixture(scope="module")
def adapter(tiny_backbone, tmp_path_factory):
    policy = add_lora(tiny_backbone.trainable_copy(), 2, 2.0)
    return export_policy(tiny_backbone, policy, tmp_path_factory.mktemp("adapter") / "policy", CARD)


@pytest.fixture
def own(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "policy")


def other_shapes(tensors):
    return {name: torch.zeros(len(value) + 1, *value.shape[1:]) for name, value in tensors.items()}


def other_names(tensors):
    return {name.replace("to_q", "to_x"): value for name, value in tensors.items()}


def of_nothing(tensors):
    return {f"other.{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize("change", [other_shapes, other_names, of_nothing, lambda tensors: {}])
def test_an_adapter_of_other_layers_is_refused(tiny_backbone, own, change):
    load_policy(tiny_backbone, own)
    file = own / LORA_FILE
    save_file(change(load_file(file)), file)
    with pytest.raises(InputError, match="pytorch_lora_weights"):
        load_policy(tiny_backbone, own)


def test_a_damaged_adapter_is_named(tiny_backbone, own):
    file = own / LORA_FILE
    for content in (b"", b"\xff" * 100, file.read_bytes()[:-9]):
        file.write_bytes(content)
        for read in (load_policy, policy_fingerprint):
            with pytest.raises(InputError, match="pytorch_lora_weights"):
                read(tiny_backbone, own)


@pytest.mark.parametrize(
    "name", ["tokenizer/tokenizer.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_broken_json_in_a_model_is_named_with_its_path(tiny_folder, tmp_path, name):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / name).write_bytes((folder / name).read_bytes()[:-20] + b"\xff")
    with pytest.raises(InputError, match=rf"{folder / name} cannot be read \("):
        UNetBackbone(str(folder), name="tiny")
