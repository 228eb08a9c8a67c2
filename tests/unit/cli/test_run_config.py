import os

import pytest
from omegaconf import OmegaConf

from capo.cli import evaluate, merge
from capo.cli.places import check_place
from capo.cli.run_config import (
    ADDED,
    Progress,
    begin_training,
    is_finished,
    note_export,
    open_run,
    read_config,
    run_config,
    run_id,
)
from capo.errors import DamagedFile, InputError
from fixtures.configuration import composed


def test_a_run_of_an_earlier_version_goes_on_and_has_the_values_it_had(tmp_path):
    cfg = composed("pairs=frs")
    assert open_run(tmp_path, cfg) is Progress.NEW
    path = tmp_path / "config.yaml"
    earlier = OmegaConf.load(path)
    for key in (
        "selection",
        "reference",
        "noise.source",
        "noise.inversion",
        "pairs.depth",
        "model.beta.capo",
    ):
        above, _, name = key.rpartition(".")
        del (OmegaConf.select(earlier, above) if above else earlier)[name]
    OmegaConf.save(earlier, path)
    read = read_config(tmp_path)
    for key in (*ADDED, "pairs.depth"):
        assert OmegaConf.select(read, key) == OmegaConf.select(cfg, key), key
    assert open_run(tmp_path, cfg) is Progress.BEGUN


def test_the_values_of_earlier_runs_are_those_of_the_shipped_configuration():
    cfg = composed()
    for key, value in ADDED.items():
        assert OmegaConf.to_container(OmegaConf.create({"at": OmegaConf.select(cfg, key)}))["at"] == value


def test_a_version_that_is_none_does_not_reach_a_message_as_a_command(tmp_path):
    written = {"layout": 99, "capo": "0.1 --index-url http://evil"}
    OmegaConf.save({"trainer": {"max_steps": 3}, "written_by": written}, tmp_path / "config.yaml")
    with pytest.raises(DamagedFile, match=r"written_by.capo is 0.1 --index-url http://evil, not a version"):
        read_config(tmp_path)


def test_a_finished_run_stays_one_until_training_goes_on(tmp_path):
    first, longer = composed("trainer.max_steps=3"), composed("trainer.max_steps=5")
    open_run(tmp_path, first)
    (tmp_path / "outcome.json").write_text("{}")
    config = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(
        InputError, match=r"max_steps=5: .* finished with 3 steps, but .*/checkpoints/last\.ckpt"
    ):
        open_run(tmp_path, longer)
    assert open_run(tmp_path, first) is Progress.FINISHED
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert open_run(tmp_path, longer) is Progress.BEGUN
    assert is_finished(tmp_path, first) and (tmp_path / "config.yaml").read_bytes() == config
    begin_training(tmp_path, longer)
    assert not is_finished(tmp_path, first) and read_config(tmp_path).trainer.max_steps == 5
    (tmp_path / "checkpoints" / "last.ckpt").unlink()  # what has not finished may begin anew
    assert open_run(tmp_path, longer) is Progress.BEGUN
    assert open_run(tmp_path, composed("trainer.max_steps=6")) is Progress.BEGUN


def test_the_command_that_finishes_a_run_is_told(tmp_path):
    cfg = composed()
    open_run(tmp_path, cfg)
    with pytest.raises(InputError) as refused:
        run_config(tmp_path, OmegaConf.create({**cfg, "trust": []}), [])
    assert f"training first, by `python train.py ... hydra.run.dir={tmp_path}` with" in str(refused.value)


def test_a_value_that_acts_on_training_alone_is_told_to_a_run_that_was_trained(tmp_path, caplog):
    cfg = composed()
    open_run(tmp_path, cfg)
    (tmp_path / "outcome.json").write_text("{}")
    asked = OmegaConf.create({**cfg, "trust": []})
    run_config(tmp_path, asked, ["sampling.batch=4", "trainer.accelerator=auto", "selection.swap=false"])
    run_config(tmp_path, asked, ["validation.strengths=[1]", "export=full", "rewards=looks"], exports=True)
    run_config(tmp_path, asked, ["rewards=looks", "+benchmark=parti"])  # which may read them
    assert not caplog.messages
    run_config(tmp_path, asked, ["trainer.lr=0.9", "objective=dpo"])
    assert caplog.messages == [
        f"{key} acts on training alone: run={tmp_path} stays as it was trained"
        for key in ("trainer.lr", "objective")
    ]


def test_a_value_that_acts_on_training_alone_is_told_beside_policies(tmp_path, caplog):
    given = ["seed=3", "validation.every=2", "rewards=looks"]
    for asked, script, name in (("policy=a", evaluate, "evaluate"), ("policies=[a,b]", merge, "merge")):
        caplog.clear()
        cfg = composed(*given, asked, f"pool.root={tmp_path}", name=name)
        with pytest.raises(InputError):  # no such folder
            script.run(cfg, *([[*given, asked], tmp_path] if script is evaluate else [tmp_path, given]))
        assert caplog.messages == [
            f"seed acts on training alone: {asked} stays as it was trained",
            f"validation.every acts on training alone: {asked} stays as it was trained",
            f"rewards acts on training alone: {asked} stays as it was trained; "
            "rewards@evaluation.rewards=NAME measures with others",
        ]
        with pytest.raises(InputError, match=r"export=full beside polic.*; leave that out"):
            script.run(
                cfg, *([["export=full"], tmp_path] if script is evaluate else [tmp_path, ["export=full"]])
            )


@pytest.mark.parametrize("name", ["calibration", "checkpoints", "online", "validation", "workers"])
def test_a_run_of_which_a_folder_leads_elsewhere_does_not_go_on(tmp_path, name):
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    open_run(run, composed())
    check_place(run)
    (run / name).symlink_to(outside)
    with pytest.raises(InputError, match=rf"run/{name} is a link to {outside}, outside of .*: put what it"):
        check_place(run)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["config.yaml", "outcome.json"])
def test_what_stands_in_place_of_a_file_is_not_told_as_absent(tmp_path, name, make):
    cfg = composed()
    open_run(tmp_path, cfg)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    for read in (check_place, lambda folder: run_config(folder, OmegaConf.create({**cfg, "trust": []}), [])):
        with pytest.raises(
            DamagedFile, match=rf"{tmp_path}/{name} cannot be read \(it is no ordinary file\)"
        ):
            read(tmp_path)


def test_what_ended_before_its_first_step_can_be_begun_with_other_values(tmp_path):
    first, other = composed("seed=1"), composed("seed=2")
    assert open_run(tmp_path, first) is Progress.NEW
    earlier = run_id(tmp_path)
    assert open_run(tmp_path, other) is Progress.NEW
    assert read_config(tmp_path).seed == 2 and run_id(tmp_path) != earlier
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(InputError, match=r"run of another configuration:\n  seed: 2 -> 1"):
        open_run(tmp_path, first)
    assert read_config(tmp_path).seed == 2


def test_a_finished_run_is_not_exported_in_silence_as_it_was(tmp_path):
    whole, adapter = composed("export=full"), composed("export=adapter")
    open_run(tmp_path, adapter)
    assert open_run(tmp_path, whole) is Progress.BEGUN  # nothing is exported yet
    open_run(tmp_path, adapter)
    (tmp_path / "outcome.json").write_text("{}")
    with pytest.raises(InputError, match=rf"^export=full: .* run={tmp_path} .*=\[1\] export=full$"):
        open_run(tmp_path, whole)
    assert read_config(tmp_path).export == "adapter"
    assert open_run(tmp_path, adapter) is Progress.FINISHED
    note_export(tmp_path, whole)  # evaluate.py has followed the message
    assert open_run(tmp_path, whole) is Progress.FINISHED
    with pytest.raises(InputError, match=r"^export=adapter: "):
        open_run(tmp_path, adapter)


def test_a_policy_is_exported_anew_with_a_strength_that_the_run_may_choose(tmp_path):
    open_run(tmp_path, composed("validation.strengths=[0.5,1]", "export=full"))
    (tmp_path / "outcome.json").write_text("{}")
    with pytest.raises(InputError, match=r"validation\.strengths=\[0\.5,1(\.0)?\] export=adapter$"):
        open_run(tmp_path, composed("validation.strengths=[0.5,1]", "export=adapter"))
