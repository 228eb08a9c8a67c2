"""evaluate.py among several processes."""

import json
import shutil

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from capo.cli import evaluate as evaluate_script
from capo.cli import train as train_script
from capo.cli import tune
from capo.cli.process import check_common_folder
from capo.cli.run_config import open_run
from capo.errors import InputError
from capo.runtime.launch import Launch
from fixtures.configuration import composed
from fixtures.fake_rewards import BRIGHTNESS


@pytest.fixture(scope="module")
def finished(tiny_run):
    train_script.run(tiny_run("finished", "evaluate=false"))
    return tiny_run(
        "asked", f"run={tiny_run.folder / 'finished'}", f"trust=[{BRIGHTNESS}]", config="evaluate"
    )


def test_another_process_than_the_first_draws_and_leaves_the_results_to_it(
    finished, tiny_run, monkeypatch, capsys
):
    folder = tiny_run.folder / "finished/evaluation"
    monkeypatch.setattr(evaluate_script, "launch", lambda: Launch(1, 2, 1, 2))
    assert evaluate_script.run(finished, [], folder) is None
    drawn = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert drawn and not (folder / "results.json").exists() and capsys.readouterr().out == ""
    monkeypatch.undo()
    results = evaluate_script.run(finished, [], folder)
    assert (folder / "results.json").is_file() and 0 <= results["win_rate"]["r"]["mean"] <= 1
    assert drawn == sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))


def test_a_run_is_drawn_for_a_benchmark_with_its_own_configuration(finished, tiny_run, tmp_path):
    listed = tmp_path / "list.jsonl"
    listed.write_text(
        '{"tag": "colors", "prompt": "a red cat"}\n{"tag": "position", "prompt": "a blue dog"}\n'
    )
    run = tiny_run.folder / "finished"
    given = [
        f"run={run}",
        "benchmark=geneval",
        f"benchmark.set.path={listed}",
        "benchmark.set.images=1",
        "benchmark.rewards=evaluation.rewards",
        f"trust=[{BRIGHTNESS}]",
    ]
    found = evaluate_script.run(
        tiny_run("asked", *given, "sampling.steps=7", config="evaluate"), given, tmp_path
    )
    folder = run / "benchmarks" / "geneval"
    assert found["rows"] == ["policy", "base"] and list(found["measures"]) == ["r"]
    assert len(list((folder / "images").rglob("*.png"))) == 4
    mark = json.loads((folder / "benchmark.json").read_text())
    assert mark["policy"]["steps"] == 2  # the run's
    assert mark["policy"]["denoiser"] == json.loads((run / "outcome.json").read_text())["policy"]


def test_a_policy_that_was_changed_after_its_run_is_not_evaluated_as_the_runs(
    finished, tiny_run, monkeypatch, tmp_path
):
    run = shutil.copytree(tiny_run.folder / "finished", tiny_run.folder / "changed")
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    [file] = (run / "policy" / "unet").glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: 3 * tensors[name]}, file, metadata={"format": "pt"})
    outcome = json.loads((run / "outcome.json").read_text())
    given = [f"run={run}", f"trust=[{BRIGHTNESS}]"]
    told = rf"run={run}: its policy/ \(fingerprint .*\) is not the policy of its outcome.json \("
    (tmp_path / "list.jsonl").write_text('{"tag": "colors", "prompt": "a red cat"}\n')
    benchmark = [
        "benchmark=geneval",
        f"benchmark.set.path={tmp_path / 'list.jsonl'}",
        "benchmark.set.images=1",
        "benchmark.rewards=evaluation.rewards",
    ]
    for more in ([], benchmark):
        asked = tiny_run("asked", *given, *more, config="evaluate")
        with pytest.raises(InputError, match=told + outcome["policy"][:8]):
            evaluate_script.run(asked, [*given, *more], tmp_path)
    assert not (run / "evaluation").exists()
    with pytest.raises(InputError, match=told):  # before it is pushed
        tune.check_unchanged(tiny_run("pushed"), run)
    tune.check_unchanged(tiny_run("pushed"), tiny_run.folder / "finished")
    (run / "outcome.json").write_text(json.dumps({**outcome, "policy": None}))  # as in an earlier version
    evaluated = []
    monkeypatch.setattr(evaluate_script, "evaluate", lambda folder, *_, **__: evaluated.append(folder))
    evaluate_script.run(tiny_run("asked", *given, config="evaluate"), given, tmp_path)
    assert evaluated == [run / "evaluation"]


def test_what_a_runs_evaluation_would_ignore_is_refused(tmp_path):
    run = tmp_path / "run"
    open_run(run, composed())
    for name in ("outcome.json", "elsewhere"):
        (run / name).write_text("{}")
    given = f"run={run}"
    for asked, told in (
        ([], r"run/policy cannot be read \(it is not there\); restore it, or remove .*outcome.json, and"),
        (
            ["export=full"],
            r"export=full beside run=.*/run: its policy is taken as it is; .* validation.strengths=\[1\]",
        ),
        (
            ["model=shapes_mmdit"],
            "model=shapes_mmdit beside run=.*: the run tuned shapes_unet, whose policy no",
        ),
        (["evaluate=false"], "evaluate=false: evaluate.py does nothing but evaluate; leave it out"),
    ):
        asked = [given, *asked]
        with pytest.raises(InputError, match=told):
            evaluate_script.run(composed(*asked, name="evaluate"), asked, run)
    evaluate_script.check_inner(run, run / "evaluation")
    with pytest.raises(InputError, match=r"hydra.run.dir=.*/x beside run=.*/run: .* policy=.*/run/policy"):
        evaluate_script.check_inner(run, tmp_path / "x")


def test_processes_without_a_common_folder_are_refused():
    check_common_folder(2, ["hydra.run.dir=here"])
    with pytest.raises(InputError, match=r"give them a common one, hydra.run.dir=DIR"):
        check_common_folder(2, ["hydra.job.chdir=false"])


def test_the_folders_of_a_sweeps_jobs_are_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "soup" / "policy").mkdir(parents=True)
    for given, says in (
        (["run=0"], "run=0 is not a run directory"),
        (["run=soup"], "run=soup is not a run .*; give policy=soup/policy instead"),
        (["runs=[0,1]"], "runs: 0 has not been evaluated"),
        (["runs=0"], "runs=0: no run directory there"),
        (["policy=0"], "policy '.*/0': neither"),
        (
            ["run=1.5"],
            r"run=1.5: must be one folder \(runs=\[A,B\] compares several\), written with a / where",
        ),
        (
            ["runs=[a,b]", "evaluation.seed=3"],
            "evaluation.seed=3 beside runs: .*: evaluate.py run=DIR evaluat",
        ),
        (["policy=a", "export_dtype=float16"], "export_dtype=float16 beside policy=a: it is evaluated as it"),
        (["runs=[true]"], r"runs=\[True\]: must be a folder or a list of folders"),
        (["runs=[]"], r"runs=\[\]: must be a folder or a list"),
        (["trust=elsewhere"], "trust=elsewhere: must be a list of names"),
        (["run=a", "policy=b"], "run=a and policy=b: each names what is to be evaluated, and one of them wo"),
        (["runs=[a]", "policy=b"], r"runs=\[a\] and policy=b: each names what is to be evaluated"),
        (["runs=[a]", "run=b"], r"runs=\[a\] and run=b: .* leave one out"),
        (["runs=[a]", "benchmark=shapes"], r"runs=\[a\] and benchmark=NAME: each names"),
        (["run=a", "policy=b", "benchmark=shapes"], "run=a and policy=b: each names"),
        (["run=a", "base=b"], "run=a and base=b: a run is compared with the base that its own config.yaml"),
        (["runs=[a]", "base=b"], "and base=b: a run is compared"),
    ):
        with pytest.raises(InputError, match=says):
            evaluate_script.run(composed(*given, name="evaluate"), given, tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.yaml").touch()
    assert OmegaConf.create({"dir": "${evaluation_folder:1}"}).dir == "1/evaluation"
