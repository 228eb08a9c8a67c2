"""Folders and files that this package did not write are neither replaced nor removed."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from capo.cli import evaluate as evaluate_script
from capo.cli import generate as generate_script
from capo.cli import train as train_script
from capo.errors import InputError
from capo.runtime.tensor_files import tensor_homes


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    ["policy", "calibration", "validation", "checkpoints", "evaluation", "metrics.csv", "outcome.json"],
)
def test_a_run_does_not_begin_where_something_has_the_name_of_its_files(tiny_run, name):
    folder = tiny_run.folder / f"home-{name}"
    own = folder / name if "." in name else folder / name / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("years of work")
    (folder / "notes.txt").write_text("these are not in the way")
    before = content(tiny_run.folder)
    with pytest.raises(InputError) as error:
        train_script.run(tiny_run(folder.name))
    assert f"{folder} has no config.yaml of a run, but holds {name}" in str(error.value)
    assert "another hydra.run.dir" in str(error.value) and content(tiny_run.folder) == before


def test_other_files_are_not_in_the_way_and_stay(tiny_run):
    folder = tiny_run.folder / "home"
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "policy").write_text("years of work")
    cfg = tiny_run("home", "evaluate=false")
    train_script.run(cfg)
    assert (folder / "thesis" / "policy").read_text() == "years of work" and (folder / "policy").is_dir()
    train_script.run(cfg)  # and a run's own directory is known again


def test_anothers_config_is_no_run(tiny_run):
    folder = tiny_run.folder / "project"
    folder.mkdir()
    (folder / "config.yaml").write_text("database: {host: here}\n")
    with pytest.raises(InputError, match=r"project/config.yaml is no run's.*another hydra.run.dir"):
        train_script.run(tiny_run("project"))
    assert (folder / "config.yaml").read_text() == "database: {host: here}\n"


@pytest.fixture(scope="module")
def policy(tiny_run):
    train_script.run(tiny_run("trained", "evaluate=false"))
    return tiny_run.folder / "trained" / "policy"


@pytest.mark.parametrize("name", ["results.json", "report.html", "settings.json"])
def test_an_evaluation_replaces_no_file_of_anothers(tiny_run, policy, tmp_path, name):
    (tmp_path / name).write_text("{}")
    cfg = tiny_run("asked", f"policy={policy}", config="evaluate")
    with pytest.raises(InputError, match=rf"holds {name}, but no results of an evaluation"):
        evaluate_script.run(cfg, [], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "{}"


def test_an_evaluation_removes_no_pool_of_the_base(tiny_run, policy, tmp_path):
    root = tmp_path / "pool"
    cfg = tiny_run("asked", f"policy={policy}", f"pool.root={root}", config="evaluate")
    (root / "sdxl-01234567-0-train").mkdir(parents=True)
    (root / "sdxl-01234567-0-train" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"pool.root=.*pool: the images of the policy go there"):
        evaluate_script.run(cfg, [], tmp_path)
    assert (root / "sdxl-01234567-0-train" / "manifest.json").is_file()
    cfg.pool.root = str(tiny_run.folder / "pools")
    for _ in range(2):  # and its own files are known again
        assert evaluate_script.run(cfg, [], tmp_path / "evaluated")["win_rate"]


def test_a_policy_that_a_killed_process_has_moved_aside_is_evaluated(tiny_run, policy, tmp_path):
    policy.rename(policy.with_name(".policy.old"))
    cfg = tiny_run("asked", f"policy={policy}", config="evaluate")
    assert evaluate_script.run(cfg, [], tmp_path)["win_rate"] and policy.is_dir()


def test_a_damaged_policy_of_a_run_is_exported_again_as_the_message_says(tiny_run, policy):
    weights = policy / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:1000])
    with pytest.raises(InputError, match=r"remove outcome\.json, and give its train\.py command again"):
        tensor_homes(weights.parent)
    (policy.parent / "outcome.json").unlink()
    train_script.run(tiny_run("trained", "evaluate=false"))
    assert weights.read_bytes() == before


def test_pairs_are_not_written_in_place_of_a_device(tiny_run, tmp_path):
    (tmp_path / "device").symlink_to("/dev/null")
    cfg = tiny_run("pairs", config="generate")
    OmegaConf.update(cfg, "stage", "export")
    cfg.pair_export.file = str(tmp_path / "device")
    cfg.pool.root = str(tmp_path / "pools")
    with pytest.raises(InputError, match=r"pair_export.file=.*device is no ordinary file"):
        generate_script.run(cfg)
    assert not (tmp_path / "pools").exists() and (tmp_path / "device").is_symlink()
