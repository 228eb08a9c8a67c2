"""evaluate.py among several processes."""

import pytest

from capo.cli import evaluate as evaluate_script
from capo.cli import train as train_script
from capo.cli.process import check_common_folder
from capo.errors import InputError
from capo.runtime.launch import Launch


@pytest.fixture(scope="module")
def finished(tiny_run):
    train_script.run(tiny_run("finished", "evaluate=false"))
    return tiny_run("asked", f"run={tiny_run.folder / 'finished'}", "trust=[fixtures]", config="evaluate")


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


def test_processes_without_a_common_folder_are_refused():
    check_common_folder(2, ["hydra.run.dir=here"])
    with pytest.raises(InputError, match=r"give them a common one, hydra.run.dir=DIR"):
        check_common_folder(2, ["hydra.job.chdir=false"])
