"""The dashboard of a real small sweep, logged offline: it names what the runs hold, and becomes W&B's own."""

import json
import shutil

import pytest

from capo.cli import dashboard
from capo.cli.sweep import read_jobs
from capo.errors import InputError
from fixtures.wandb_files import collected

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(typed, tmp_path_factory):
    """The directory of a sweep over beta of two jobs, logged to W&B offline. Read only."""
    folder = tmp_path_factory.mktemp("swept") / "ablation"
    steps = ["trainer.max_steps=2", "trainer.signal_every=1", "trainer.batch=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        typed("train", "-m", "objective.beta=10,30", *steps, "logger=wandb", f"hydra.sweep.dir={folder}")
    return folder


@pytest.fixture
def sweep(swept, tmp_path, monkeypatch):
    """A copy of the sweep."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    return shutil.copytree(swept, tmp_path / "ablation", symlinks=True)


def named(node, kind):
    """All names of one kind in a specification."""
    if isinstance(node, dict):
        own = [value for key, value in node.items() if key == kind]
        return own + [name for value in node.values() for name in named(value, kind)]
    return [name for value in node for name in named(value, kind)] if isinstance(node, list) else []


def test_panels_name_what_the_runs_hold_and_apply_to_wandb(sweep, capsys, monkeypatch):
    assert dashboard.main([str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert "nothing was sent" in printed and f"wandb sync {sweep}/*/wandb/offline-*" in printed
    spec = json.loads((sweep / "dashboard.json").read_text())
    held = [collected(sweep / str(number)) for number in range(2)]
    assert spec["group"] == "ablation" and spec["runs"] == [found["ids"][0] for found in held]
    settings, summaries = set(named(spec, "config")), set(named(spec, "summary"))
    curves = {name for lines in named(spec, "y") if isinstance(lines, list) for name in lines}
    assert settings == {"objective", "beta", "bias", "pairs", "rewards"}
    assert {"test/win_rate/r", "test/win_rate/g", "val/win_rate"} <= summaries
    assert {"val/win_rate/r", "train/h", "train/drift_winner", "train/gradient_signal"} <= curves
    for found in held:
        assert all(found["config"].get(name) is not None for name in settings)
        assert summaries <= found["summary"].keys()
        assert curves | {"trainer/global_step"} <= found["history"]
        assert {f"{name}/_type" for keys in named(spec, "keys") for name in keys} <= found["history"]
    assert [view["name"] for view in spec["views"]] == [
        f"ablation: {name}" for name in ("results", "training", "images")
    ]
    table = spec["report"]["table"].splitlines()
    assert table[0].startswith("| job | status | objective.beta | val/win\\_rate |") and len(table) == 4

    pytest.importorskip("wandb_workspaces", reason="W&B's workspaces need the extra dashboard")
    applied(spec, sweep, monkeypatch, capsys)


def applied(spec, sweep, monkeypatch, capsys):
    """With a key, the command saves the views and the report, which hold the same names."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    saved = []
    for kind in (workspaces.Workspace, reports.Report):
        monkeypatch.setattr(kind, "save", lambda made: saved.append(made) or made)
        monkeypatch.setattr(kind, "url", property(lambda made: f"https://wandb.example/{len(saved)}"))
    # a report asks the server for its project's number
    monkeypatch.setattr(reports.interface, "_get_api", lambda: None)
    found = {"project": {"internalId": "7"}}
    monkeypatch.setattr(reports.interface, "execute_graphql", lambda *asked: found)
    monkeypatch.setattr(dashboard, "wandb_mode", lambda: "online")
    assert dashboard.main([str(sweep), "--entity", "team"]) == 0
    assert "https://wandb.example/4" in capsys.readouterr().out
    *views, report = saved
    assert [view.name for view in views] == [view["name"] for view in spec["views"]]
    models = [made._to_model() for made in saved]  # what save would send
    assert {model.project for model in models[:3]} == {"capo"} and {model.entity for model in models[:3]} == {
        "team"
    }
    sent = " ".join(json.dumps(model.model_dump(by_alias=True, mode="json")) for model in models)
    for name in named(spec, "config"):
        assert f'"config:{name}.value"' in sent
    for name in {*named(spec, "summary")}:
        assert f'"summary:{name}"' in sent
    for lines in named(spec, "y"):
        assert isinstance(lines, dict) or f'"metrics": {json.dumps(lines)}' in sent
    assert (
        '"mediaKeys": ["validation"]' in sent and '"name": "group"' in sent and '"value": "ablation"' in sent
    )
    assert report.title == "ablation" and report.blocks[1].text == spec["report"]["table"]


def test_sweeps_that_have_no_dashboard_are_refused(sweep, capsys, tmp_path):
    assert dashboard.main([str(tmp_path / "none")]) == 2
    assert "none: no such folder; give the directory of a sweep" in capsys.readouterr().err
    path = sweep / "1" / "wandb.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "group": "other"}))
    with pytest.raises(
        InputError, match="group ablation; own/capo, group other of W&B; a dashboard is of one"
    ):
        dashboard.tracked_sweep(sweep, read_jobs(sweep))
    path.write_text(json.dumps({**record, "summary": []}))
    with pytest.raises(InputError, match=r"1/wandb\.json cannot be read"):
        dashboard.tracked_sweep(sweep, read_jobs(sweep))
