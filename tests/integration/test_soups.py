"""merge.py on runs of the tiny pipeline, and the soups of a sweep."""

import copy
import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from hydra._internal.callbacks import Callbacks
from omegaconf import OmegaConf

from capo.cli import evaluate as evaluate_script
from capo.cli import merge as merge_script
from capo.cli import sweep_soup
from capo.cli import train as train_script
from capo.cli.callbacks import SoupOfRewards, SweepReport
from capo.cli.sweep_soup import _swept
from capo.errors import InputError
from fixtures.policies import run_readme

LORA = ["+model.lora.rank=2", "+model.lora.alpha=2"]


@pytest.fixture(scope="module", params=["full", pytest.param("lora", marks=pytest.mark.slow)])
def policies(request, tiny_run):
    """Two tuned policies."""
    more = LORA if request.param == "lora" else []
    folders = [tiny_run.folder / f"{request.param}-{seed}" for seed in (1, 2)]
    for seed, folder in enumerate(folders):
        train_script.run(
            tiny_run(
                folder.name, *more, f"seed={seed}", "trainer.lr=0.01", "trainer.warm_up=0", "evaluate=false"
            )
        )
    return [str(folder / "policy") for folder in folders]


def test_a_soup_is_a_policy_like_any_other(policies, tiny_run, tmp_path, monkeypatch):
    cfg = tiny_run("soup", f"policies=[{','.join(policies)}]", config="merge")
    policy = merge_script.run(cfg, tmp_path)
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    card = (policy / "README.md").read_text()
    assert "Not evaluated." not in card and f"| {100 * results['win_rate']['r']['mean']:.1f} |" in card
    again = tiny_run("again", f"policy={policy}", config="evaluate")
    assert evaluate_script.run(again, [], tmp_path / "again") == results
    other = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}_other"))
    compared = evaluate_script.run(
        tiny_run("compared", f"runs=[{tmp_path},{other}]", config="evaluate"), [], tmp_path / "compared"
    )
    assert compared["head_to_head"]["r"]["mean"] == 0.5
    if "lora" in policies[0]:
        return
    assert train_script.run(
        tiny_run("on", f"model.backbone.weights={policy}", "model.name=soup", "evaluate=false")
    )
    run_readme(policy, monkeypatch)


def test_what_cannot_be_merged_is_refused(tiny_run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"nothing to merge: .*policies=\[FOLDER,FOLDER\]"):
        merge_script.run(tiny_run("none", config="merge"), tmp_path)
    with pytest.raises(InputError, match="method=mean: must be one of slerp, linear"):
        merge_script.run(tiny_run("none", "policies=[a,b]", "method=mean", config="merge"), tmp_path)
    with pytest.raises(InputError, match=r"weights=.*must be a list of numbers from -1000000 to 1000000"):
        merge_script.run(tiny_run("none", "policies=[a,b]", "weights=[x,1]", config="merge"), tmp_path)
    monkeypatch.setattr(merge_script, "build_components", lambda *_, **__: pytest.fail("weights load"))
    with pytest.raises(InputError, match=r"weights .*must be 2 finite numbers"):
        merge_script.run(tiny_run("none", "policies=[a,b]", "weights=[1]", config="merge"), tmp_path)
    with pytest.raises(InputError, match=r"a/base\.json.*cannot be read"):
        merge_script.run(tiny_run("none", "policies=[a,b]", config="merge"), tmp_path)
    with pytest.raises(InputError, match=r"weights .*must be 2 finite numbers"):
        merge_script.run(tiny_run("none", "policies=[a,b]", "weights=[]", config="merge"), tmp_path)


def test_a_soup_takes_the_place_of_no_policy_of_a_run_or_of_its_own(policies, tiny_run, tmp_path):
    first = Path(policies[0])
    before = sorted(path.name for path in first.iterdir())
    (tmp_path / "policy").symlink_to(first)
    for folder in (first.parent, tmp_path):
        with pytest.raises(InputError, match="policy would be replaced by the soup"):
            merge_script.run(tiny_run("none", f"policies=[{','.join(policies)}]", config="merge"), folder)
    assert sorted(path.name for path in first.iterdir()) == before


def job(tiny_run, sweep, name, channels, *overrides):
    folder = sweep / name
    cfg = tiny_run(f"{sweep.name}/{name}", *overrides, rewards=3)
    given = {key: cfg.rewards[key] for key in channels}
    OmegaConf.update(cfg, "rewards", given, merge=False)
    train_script.run(cfg)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text(
        json.dumps([f"rewards=[{','.join(channels)}]", *overrides])
    )
    return folder


def multirun(tiny_run, sweep):
    """Configuration of the command that ran the jobs in `sweep`."""
    config = tiny_run(sweep.name)
    OmegaConf.update(config, "hydra", {"sweep": {"dir": str(sweep)}}, force_add=True)
    return config


def rows(sweep):
    with (sweep / "sweep.csv").open() as file:
        return {row["job"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_a_sweep_of_single_rewards_gets_the_row_of_their_soup(tiny_run):
    sweep = tiny_run.folder / "sweep"
    for name, channels in enumerate(["r", "g", "rg"]):
        job(tiny_run, sweep, str(name), channels)
    config = multirun(tiny_run, sweep)
    for callback in (SoupOfRewards("slerp"), SweepReport()):
        callback.on_multirun_end(config)
    found = rows(sweep)
    assert list(found) == ["0", "1", "2", "soup-0"]
    assert found["soup-0"]["rewards"] == "soup of jobs 0, 1" and found["soup-0"]["status"] == "finished"
    assert 0 <= float(found["soup-0"]["test/win_rate/r"]) <= 1 and found["soup-0"]["val/win_rate"] == ""
    soup = sweep / "soup-0"
    asked = ["trust=[fixtures.fake_rewards.Brightness]", f"run={soup}"]
    found = evaluate_script.run(tiny_run("of-a-soup", *asked, config="evaluate"), [], soup)
    assert f"| {100 * found['win_rate']['r']['mean']:.1f} |" in (soup / "policy" / "README.md").read_text()
    SoupOfRewards("linear").on_multirun_end(config)  # a soup is no job of the next one
    assert sorted(path.name for path in sweep.glob("soup*")) == ["soup-0"]
    assert json.loads((sweep / "soup-0" / "outcome.json").read_text()) == {
        "soup": ["0", "1"],
        "method": "linear",
    }


def test_a_soup_that_fails_is_reported_and_ends_the_sweep_with_1(tiny_run, capsys):
    sweep = tiny_run.folder / "failing"
    for name, channel in enumerate("rg"):
        job(tiny_run, sweep, str(name), [channel], "evaluate=false")
    (sweep / "1" / "policy" / "base.json").unlink()
    config = multirun(tiny_run, sweep)
    SoupOfRewards().on_multirun_end(config)
    with pytest.raises(SystemExit):
        SweepReport().on_multirun_end(config)
    assert rows(sweep)["soup-0"]["status"] == "failed" and "base.json" in rows(sweep)["soup-0"]["error"]
    stored = (sweep / "0" / "config.yaml").read_text()
    for foreign, said in (
        (
            stored.replace("fixtures.fake_rewards.Brightness", "os.system"),
            "hydra.callbacks.soup.trust=[os.system]",
        ),
        (stored.replace(str(tiny_run.folder / "pools"), "/elsewhere"), "pool.root=/elsewhere"),
    ):
        (sweep / "0" / "config.yaml").write_text(foreign)
        SoupOfRewards().on_multirun_end(config)
        assert said in (sweep / "soup-0" / "error.txt").read_text()
    (sweep / "0" / "outcome.json").unlink()
    SoupOfRewards().on_multirun_end(config)
    assert "no soup of jobs 0, 1: not finished: 0" in capsys.readouterr().out


@pytest.mark.parametrize("given", [
    {"overrides": {"task": ["pool.root=/here,'/a, b'", "seed=1"]}},
    {"overrides": {"task": []}, "sweeper": {"params": {"pool.root": "choice(/here,'/a, b')"}}},
])  # fmt: skip
def test_roots_of_pools_that_a_sweep_goes_over_are_the_commands_own(given):
    assert _swept(OmegaConf.create({"hydra": given}), "pool.root") == ["/here", "/a, b"]
    assert (
        _swept(OmegaConf.create({"hydra": {"overrides": {"task": ["pool.root=/here"]}}}), "pool.root") == []
    )


def test_a_swept_root_gets_its_soup(tiny_run, monkeypatch):
    sweep = tiny_run.folder / "roots"
    roots = [sweep / "pools-a", sweep / "pools-b"]
    monkeypatch.setattr(
        sweep_soup, "soup_of", lambda cfg, policies, *_: made.append((cfg.pool.root, policies))
    )
    made, config = [], multirun(tiny_run, sweep)
    for number, root in enumerate(roots):
        for place, reward in enumerate("rg"):
            folder = sweep / str(2 * number + place)
            cfg = copy.deepcopy(config)
            cfg.pool.root = str(root)
            OmegaConf.update(cfg, "rewards", {reward: cfg.rewards[reward]}, merge=False)
            (folder / ".hydra").mkdir(parents=True)
            told = json.dumps([f"rewards=[{reward}]", f"pool.root={root}"])
            (folder / ".hydra" / "overrides.yaml").write_text(told)
            (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
            (folder / "outcome.json").write_text("{}")
    OmegaConf.update(
        config, "hydra.overrides", {"task": [f"pool.root={roots[0]},{roots[1]}"]}, force_add=True
    )
    SoupOfRewards().on_multirun_end(config)
    assert not [*sweep.glob("soup*/error.txt")]
    assert made == [
        (str(root), [sweep / str(2 * number + place) / "policy" for place in range(2)])
        for number, root in enumerate(roots)
    ]


@pytest.mark.parametrize(("fault", "said"), [
    (InputError("no figures"), "the report of .* cannot be made, but .*: no figures"),
    (KeyError("mean"), "Traceback (.|\n)*KeyError: 'mean'"),
])  # fmt: skip
def test_a_sweep_whose_report_fails_does_not_end_well(tmp_path, monkeypatch, capsys, fault, said):
    """Called as Hydra calls it, which takes exceptions of callbacks for warnings."""

    def failing(*_):
        raise fault

    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}, "plan": False})
    callbacks = Callbacks()
    callbacks.callbacks = [SweepReport()]
    monkeypatch.setattr("capo.cli.sweep.report_sweep", lambda *_: True)
    callbacks.on_multirun_end(config)
    monkeypatch.setattr("capo.cli.sweep.report_sweep", failing)
    with pytest.raises(SystemExit) as ended:
        callbacks.on_multirun_end(config)
    assert ended.value.code == 1 and re.search(said, capsys.readouterr().err)


def test_soups_that_cannot_be_made_leave_the_report_and_end_the_sweep_with_1(tmp_path, monkeypatch, capsys):
    def failing(*_):
        raise OSError(28, "No space left on device", "/full")

    reported = []
    monkeypatch.setattr(sweep_soup, "add_soups", failing)
    monkeypatch.setattr("capo.cli.sweep.report_sweep", lambda *given: reported.append(given) or True)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}, "plan": False})
    SoupOfRewards().on_multirun_end(config)
    assert "the soups of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        SweepReport().on_multirun_end(config)
    SweepReport().on_multirun_end(config)  # another sweep of this process
    assert len(reported) == 2


def test_a_job_without_a_configuration_leaves_the_others_without_a_soup(tmp_path, capsys):
    for name, rewards in enumerate("ab"):
        (tmp_path / str(name) / ".hydra").mkdir(parents=True)
        (tmp_path / str(name) / ".hydra" / "overrides.yaml").write_text(f"['rewards=[{rewards}]']")
    OmegaConf.save(OmegaConf.create({"rewards": {"a": {}}}), tmp_path / "0" / "config.yaml")
    (tmp_path / "0" / "outcome.json").write_text("{}")
    (tmp_path / "1" / "error.txt").write_text("refused before anything was written")
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}, "plan": False})
    SoupOfRewards().on_multirun_end(config)
    assert "no soup of jobs 0, 1: not finished: 1" in capsys.readouterr().out
    (tmp_path / "0" / "config.yaml").write_text("rewards: [")  # damaged
    SoupOfRewards().on_multirun_end(config)
    assert "soup" not in capsys.readouterr().out and not list(tmp_path.glob("soup*"))
