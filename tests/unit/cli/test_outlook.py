"""Hours that are left, told before a command works: of what is not there yet, by known rates alone."""

import shutil

import torch

from capo.cli import generate as generate_script
from capo.cli import outlook as outlooks
from capo.cli import train as train_script
from capo.cli.build import build_components
from capo.cli.outlook import followed, outlook_line
from capo.data.watching import current_watch
from capo.errors import InputError
from capo.runtime.launch import Launch
from capo.runtime.outlook import Cost, Outlook, Work

WORK = [Work("latents", "latents", 100), Work("scores", "scores by a", 100)]


def test_the_line_names_hours_what_is_unknown_and_the_devices(monkeypatch):
    outlook = Outlook.of(WORK, {"latents": Cost(36.0), "scores by a": Cost(3.6, ("a",))})
    assert outlook_line(outlook, "cpu") == (
        "hours: latents 1, scores at least 0.1; at least 1.1 in all, on the CPU (no rate is known of a)"
    )
    monkeypatch.setattr(outlooks, "gpu_name", lambda accelerator: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    outlook.measured("scores by a", 7.2)
    assert (
        outlook_line(outlook, "auto")
        == "hours: latents 1, scores 0.2; 1.2 in all, on 1 of 8 GPUs (NVIDIA L4)"
    )
    unknown = outlook_line(Outlook.of(WORK, {}), "auto")
    assert unknown.startswith("hours are not known before work has begun, on 1 of 8 GPUs")
    assert "nothing is left" in outlook_line(Outlook(), "auto")


def told(capsys) -> str:
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hours")]
    return line


def test_generating_tells_the_hours_of_what_the_pools_lack(tiny_run, capsys):
    root, known = f"pool.root={tiny_run.folder / 'fresh'}", "planning.flops=1e9"
    generate_script.run(tiny_run("drawn", root, known, "stage=text", config="generate"))
    assert told(capsys) == "hours are not known before work has begun, on the CPU: check=true measures rates"
    generate_script.run(tiny_run("drawn", root, known, "stage=latents", config="generate"))
    assert "hours: latents " in (line := told(capsys)) and "text" not in line and "training" not in line
    generate_script.run(tiny_run("drawn", root, known, "stage=all", config="generate"))
    line = told(capsys)
    assert line.startswith("hours: scores at least ") and line.endswith("(no rate is known of g, r)")
    generate_script.run(tiny_run("drawn", root, known, "stage=all", config="generate"))
    assert told(capsys).startswith("hours: nothing is left")


def test_an_assumed_peak_is_no_rate_of_this_machine(tiny_run, capsys):
    train_script.run(tiny_run("assumed", "evaluate=false"))
    assert told(capsys).startswith("hours are not known before work has begun, on the CPU")


def test_a_resumed_run_has_the_rest_of_its_steps_left(tiny_run):
    train_script.run(tiny_run("resumed", "evaluate=false"))
    folder, cfg = (
        tiny_run.folder / "resumed",
        tiny_run("resumed", "trainer.max_steps=6", "planning.flops=1e9"),
    )
    components = build_components(cfg)
    state = torch.get_rng_state()
    with followed(cfg, components, folder, []) as outlook:
        watch = current_watch()
        assert torch.equal(state, torch.get_rng_state())  # training draws as it would without
        assert watch is not None and watch.outlook is outlook
    # four steps of two pairs; two of three validations of 2 prompts with 2 images
    assert outlook.left["training", "training"] == 4 * 2
    assert outlook.left["validation", "latents"] == 2 * 4
    assert "latents" not in outlook.hours() and "scores" not in outlook.hours()
    assert outlook.left["evaluation", "latents"] == 3 * 4  # base, other seeds, policy
    with followed(cfg, components, folder, [], stages=("text",), trains=False) as outlook:
        assert "training" not in outlook.hours() and outlook.left["text", "text"] == 2 * 2  # test and zero


def test_an_evaluation_has_nothing_else_left(tiny_run, monkeypatch):
    """After training, strengths included, and also of a finished run whose checkpoints are gone."""
    left = []

    def evaluated(*arguments):
        watch = current_watch()
        assert watch is not None
        left.append(dict(watch.outlook.left))

    monkeypatch.setattr("capo.cli.tune.evaluate_own", evaluated)
    cfg = tiny_run("left", "planning.flops=1e9", "validation.strengths=[0.5]")
    train_script.run(cfg)
    shutil.rmtree(tiny_run.folder / "left" / "checkpoints")
    train_script.run(cfg)
    assert len(left) == 2 and left[0] == left[1]
    assert {stage for stage, _ in left[0]} == {"evaluation"}
    assert left[0]["evaluation", "latents"] == 3 * 4  # base, other seeds, policy


def test_other_processes_follow_nothing_and_unknown_models_are_not_planned(tiny_run, monkeypatch):
    cfg = tiny_run("other")
    components = build_components(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(outlooks, "launch", lambda: Launch(1, 2, 1, 2))
        with followed(cfg, components, tiny_run.folder / "other", []) as outlook:
            assert current_watch() is None and "not known" in outlook_line(outlook, "cpu")

    def refuse(*arguments):
        raise InputError("no configs")

    monkeypatch.setattr(outlooks, "request_of", refuse)
    with followed(cfg, components, tiny_run.folder / "other", []) as outlook:
        assert current_watch() is not None and "not known" in outlook_line(outlook, "cpu")
        outlook.measured("training", 36.0)
        outlook.left["training", "training"] = 100.0
        assert str(outlook.total) == "at least 1"
