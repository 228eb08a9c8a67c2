"""What train.py, generate.py and merge.py refuse before they load anything."""

import pytest
from omegaconf import OmegaConf

from capo.cli import evaluate, generate, merge, train, tune
from capo.cli.compose import composed
from capo.cli.idle import refuse_training_keys
from capo.cli.places import MULTIRUN, OTHERS, check_output, check_place, check_sweep_output
from capo.errors import InputError


def output_in(folder, key):
    """Hydra's own settings, as far as they are read, of an output in `folder`."""
    own = {"output_subdir": ".hydra", "job": {"name": "train"}, key: {"dir": str(folder)}}
    return OmegaConf.create({"hydra": own})


@pytest.mark.parametrize("inside", ["", "policy", "policy/policy", "policy/unet/soup"])
def test_a_soup_is_not_written_into_a_policy_that_is_merged(tmp_path, inside):
    (tmp_path / "policy" / "unet").mkdir(parents=True)
    with pytest.raises(InputError, match=r"would be replaced by the soup, but .*; choose another"):
        merge.check_place(tmp_path / inside, [str(tmp_path / "policy"), str(tmp_path / "other")], True)
    merge.check_place(tmp_path / "policy-2", [str(tmp_path / "policy"), str(tmp_path / "other")], True)


def test_a_policy_that_is_named_twice_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    merge.check_named(["a", "b"])
    for policies, told in (
        (["a", "b", "a"], "policies: a is named twice: name it once, with a larger share by"),
        ([f"{tmp_path}/a", f"{tmp_path}/link"], "link is named twice and as .*/a: name"),
    ):
        with pytest.raises(InputError, match=told):
            merge.check_named(policies)
    with pytest.raises(InputError, match="policies: a is named twice"):
        merge.run(composed("merge", ["policies=[a,a]", f"run_dir={tmp_path}"]), tmp_path)


def test_a_soup_does_not_stand_beside_the_results_of_another_one(tmp_path):
    merge.check_place(tmp_path, ["a", "b"], False)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").touch()
    with pytest.raises(InputError, match=r"evaluate=false: .*/evaluation holds the results of the soup"):
        merge.check_place(tmp_path, ["a", "b"], False)


def test_a_soup_replaces_nothing_of_others_and_follows_no_link(tmp_path):
    own, other = tmp_path / "out", tmp_path / "else"
    (own / "evaluation").mkdir(parents=True)
    other.mkdir()
    (own / "evaluation" / "report.html").write_text("mine")
    with pytest.raises(InputError, match=r"evaluation holds report\.html, but no results of an evaluation"):
        merge.check_place(own, ["a", "b"], True)
    merge.check_place(own, ["a", "b"], False)
    for name in ("policy", "evaluation"):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / name).symlink_to(other)
        with pytest.raises(InputError, match=f"out/{name} is a link to {other}, outside of"):
            merge.check_place(tmp_path / name / "out", ["a", "b"], True)


def test_no_run_is_made_in_the_folder_of_a_sweep(tmp_path):
    check_place(tmp_path)
    (tmp_path / MULTIRUN).touch()
    check_output(output_in(tmp_path, "run"))  # of its jobs a comparison may be made there
    with pytest.raises(InputError, match=rf"hydra.run.dir={tmp_path} is the folder of a sweep, whose"):
        check_place(tmp_path)


def test_no_sweep_is_made_in_the_directory_of_a_run(tmp_path):
    check_sweep_output(output_in(tmp_path, "sweep"))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InputError, match=rf"hydra.sweep.dir={tmp_path} is the directory of a run"):
        check_sweep_output(output_in(tmp_path, "sweep"))


@pytest.mark.parametrize(("key", "check"), [("run", check_output), ("sweep", check_sweep_output)])
@pytest.mark.parametrize("name", OTHERS)
def test_no_command_has_its_output_in_the_folder_of_a_pool_or_a_policy(tmp_path, name, key, check):
    check(output_in(tmp_path, key))
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=rf"hydra.{key}.dir={tmp_path} is the folder of .* \({name}\)"):
        check(output_in(tmp_path, key))


@pytest.mark.parametrize(("script", "name", "record", "check"), [
    ("evaluate", "table.csv", ".hydra", check_output),
    ("generate", "status.json", ".hydra", check_output),
    ("train", "plan.json", "config.yaml", check_output),
    ("train", "sweep.csv", MULTIRUN, check_sweep_output),
])  # fmt: skip
def test_files_that_no_command_made_are_not_replaced(tmp_path, script, name, record, check):
    key = "sweep" if record == MULTIRUN else "run"
    config = output_in(tmp_path, key)
    config.hydra.job.name = script
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=rf"hydra.{key}.dir={tmp_path} holds files .*: move {name} away"):
        check(config)
    (tmp_path / record).touch()
    check(config)


def test_no_run_is_made_in_a_folder_that_another_run_writes_anew(tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "outcome.json").touch()
    check_place(tmp_path / "other")
    for name in ("policy", "evaluation/x", "checkpoints"):
        with pytest.raises(InputError, match=rf"is in {name[:6]}.*/ of the run {tmp_path}, which is written"):
            check_place(tmp_path / name)


def test_a_file_where_a_run_has_a_folder_is_refused_before_work(tmp_path):
    (tmp_path / "online").write_text("")
    with pytest.raises(InputError, match="online is a file, but a run has a folder of this name: move it"):
        check_place(tmp_path)


@pytest.mark.parametrize(("script", "name"), [(merge, "merge"), (evaluate, "evaluate")])
def test_only_a_training_uploads(tmp_path, script, name):
    given = ["push_to_hub=me/it", *(["policies=[a,b]"] if name == "merge" else [])]
    cfg = composed(name, [f"run_dir={tmp_path}", *given])
    refuse_training_keys(cfg, given[1:])  # an experiment may name the hub for train.py
    with pytest.raises(InputError, match=r"push_to_hub=me/it belongs to train.py: .*hf upload me/it FOLDER`"):
        script.run(cfg, *([given, tmp_path] if name == "evaluate" else [tmp_path, given]))


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
