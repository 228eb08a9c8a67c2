"""Messages for what Hydra or the system raises: they name the file, or the key that gave it."""

import errno
import os
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

import train
from capo.cli import dashboard, study_files
from capo.cli.compose import REPOSITORY, composed
from capo.cli.messages import command_fault, disk_fault, plain_errors, start
from capo.cli.schema.border import text_faults
from capo.cli.sweep_faults import number_fault, sweep_fault
from capo.errors import InputError

NO_OPTION = (
    "{}: there is no such option; a value is given without dashes, {}; `--hydra-help` lists the options"
)


@pytest.fixture(autouse=True)
def odd_backend(monkeypatch):
    """Commands replace it; it is put back for what other tests start."""
    monkeypatch.setenv("MPLBACKEND", "nope")


def test_a_file_of_the_configuration_that_is_no_text_is_named(tmp_path):
    (tmp_path / "main.yaml").write_text("defaults: [own: x]\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "x.yaml").write_bytes(b"# \xe9\nseed: 1\n")
    with pytest.raises(InputError, match=f"{tmp_path}/own/x.yaml is no UTF-8 text from byte 2 on; save it"):
        composed("main", [], tmp_path)


def test_a_place_in_terms_of_what_is_not_there_is_one_message():
    """Hydra resolves its own keys before a job begins."""
    cfg = OmegaConf.create({"hydra": {"run": {"dir": "outputs/${model.title}"}}})
    with pytest.raises(InterpolationResolutionError) as error:
        _ = cfg.hydra.run.dir
    assert command_fault(error.value, []) == (
        "hydra.run.dir cannot be resolved (Interpolation key 'model.title' not found); give "
        "hydra.run.dir=VALUE itself"
    )


@pytest.mark.parametrize("text", ["- trainer", "trainer: [1]"])
def test_a_file_with_a_list_in_place_of_keys_is_named(tmp_path, text):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(InputError, match=r"^experiment/own.yaml, .* holds a list where keys with values"):
        composed("train", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=own"])


def test_a_folder_of_the_configuration_that_is_not_there_is_one_message():
    fault = command_fault(HydraException("Additional config directory '/x/nofolder' not found"), [])
    assert fault == (
        "Additional config directory '/x/nofolder' not found; --config-dir takes a folder with groups, such "
        "as rewards/ and experiment/"
    )


def test_bytes_that_are_no_text_in_this_encoding_get_the_remedy_for_it():
    error = OverrideParseException("hydra.run.dir=l\udcc3\udca4uf", "LexerNoViableAltException")
    told = command_fault(error, [])
    assert "is no text in the encoding of this system" in told and "set PYTHONUTF8=1" in told


def test_texts_that_no_path_can_hold_are_refused():
    values = {
        "pool": {"root": "a\0b"},
        "rewards": {"x": {"weights": "~nosuchuser/x"}},
        "list": ["~", "~/x", "a~b"],
    }
    found = dict(text_faults(values))
    assert list(found) == ["pool.root", "rewards.x.weights"]
    assert "null character" in found["pool.root"] and "no user of this name" in found["rewards.x.weights"]


def test_a_full_disk_below_a_folder_of_the_command_line_is_to_be_emptied(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run=outputs/1"])
    told = disk_fault(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "outputs/1/evaluation/pool/x"))
    assert "(No space left on device): make room there" in told


@pytest.mark.parametrize("program", [dashboard.main, lambda given: study_files.main(["results", *given])])
def test_programs_of_their_own_answer_as_the_scripts_do(capsys, monkeypatch, program):
    long = "a" * 500
    monkeypatch.setattr(sys, "argv", ["program", long])
    assert program([long]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: aaa") and told.endswith("(File name too long): give another path\n")


def test_a_working_directory_that_was_removed_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as end:
        start(lambda: pytest.fail("nothing can be done"))
    assert end.value.code == 2
    assert "error: the working directory cannot be used (No such file" in capsys.readouterr().err


def test_a_sweep_that_is_not_there_is_said(capsys, tmp_path):
    assert dashboard.main([str(tmp_path / "none")]) == 2
    assert "none: no such folder; give the directory of a sweep" in capsys.readouterr().err


@pytest.mark.parametrize(("argument", "told"), [
    ("\u2013m", "'\u2013m' begins with a dash of word processors; type"),
    ("seed=\u201c1\u201d", "'seed=\u201c1\u201d' has \u201c, which quotes nothing; type \" or ' in place"),
    ("seed = 1", "'seed = 1' has a space before =; give seed=1"),
    ("seed='1", "'seed='1' cannot be read; write key=value"),
    ("seed=1,2", "seed=1,2: several values stand here; for a sweep over them give -m, for a list seed=[1,2]"),
])  # fmt: skip
def test_what_the_command_line_cannot_hold_is_told_with_what_to_type(argument, told):
    with pytest.raises(InputError) as refused:
        composed("train", [argument])
    assert str(refused.value).startswith(told) and "Lexer" not in str(refused.value)


@pytest.mark.parametrize(("arguments", "told"), [
    (["--resolve"], "error: The --resolve flag can only be used in conjunction with --cfg or --help; `--"),
    (["--run", "-m"], "error: Only one of --run, --multirun, --cfg, --info and --shell_completion can"),
    (["--experimental-rerun", "nowhere"], "error: File nowhere does not exist; `--hydra-help` lists"),
    (["--help", "model=nope"], "error: model=nope: no such choice; there are "),
    (["--shell-completion"], "error: --shell-completion: what it is to do is missing; add install=SHELL"),
    (["-m", "seed=range(0,1000000000)"], "error: seed=range(0,1000000000): a sweep of 1,000,000,000 jobs; "),
    (["-m", "seed=range(0,1000)", "threads=range(1,501)"], "error: seed=range(0,1000) threads=range"),
    (["-m", "seed=0,1", "hydra.sweeper.max_batch_size=0"], "error: hydra.sweeper.max_batch_size=0: no job"),
    (["hydra.mode=MULTIRUN", "hydra.run.dir=x"], "error: hydra.run.dir=x: the jobs of -m go to hydra.sweep"),
    (["hydra.searchpath=[nowhere]"], "error: hydra.searchpath: there is no folder nowhere; give one with"),
    (["~hydra.run.dir"], "error: ~hydra.run.dir: this key cannot be removed; leave it out, or give hydra.ru"),
    (["experiment=own", "hydra.searchpath=[conf]"], "error: experiment=own: its defaults choose a second fi"),
    (["-m", "seed=range(0,1,0)"], "error: seed=range(0,1,0): a step of 0 never ends; give range(FIRST,END"),
    (["-m", "objective.beta=interval(0,1)"], "error: objective.beta=interval(0,1): a sweep takes no"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Experimental rerun", "ignore:provider=hydra.searchpath")
def test_options_and_sweeps_that_hydra_cannot_do_are_one_message(
    tmp_path, monkeypatch, capsys, arguments, told
):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "conf" / "experiment" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults: [/model: sdxl, _self_]\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-path", str(REPOSITORY / "conf"), *arguments])
    with pytest.raises(SystemExit) as end:
        start(train.main)
    assert end.value.code == 2 and capsys.readouterr().err.startswith(told)


def test_a_refused_command_leaves_the_record_of_the_run(tmp_path, monkeypatch, capsys):
    own = tmp_path / "run" / ".hydra"
    own.mkdir(parents=True)
    (own / "overrides.yaml").write_text("- seed=1\n")
    given = [f"hydra.run.dir={own.parent}", "seed=x"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-path", str(REPOSITORY / "conf"), *given])
    with pytest.raises(SystemExit) as end:
        start(train.main)
    assert end.value.code == 2 and "seed=x: must be a whole number" in capsys.readouterr().err
    assert (own / "config.yaml").is_file()  # Hydra has recorded the command
    assert (own / "overrides.yaml").read_text() == "- seed=1\n"


def test_of_a_sweep_all_counts_and_values_are_known_before_it_begins():
    assert number_fault(["seed=range(0,10,3)", "threads=1,2", "objective=glob(*)", "x=1"]) is None
    assert number_fault(["seed=range(0,100001)"]).startswith("seed=range(0,100001): a sweep of 100,001 jobs")
    assert number_fault(["seed=range(0,100000)"]) is number_fault(["seed=range(5,0)", "x=(("]) is None
    assert sweep_fault("n_jobs == 0 in Parallel has no meaning", []).startswith("hydra.launcher.n_jobs=0: ")


def test_files_that_name_each_other_are_a_message(monkeypatch):
    """Hydra itself takes half a minute until Python's stack is full."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", "c", "experiment=x", "seed=3"])
    told = command_fault(RecursionError("maximum recursion depth exceeded"))
    assert "a defaults list names its own file" in told and told.endswith("(experiment=x)")


@pytest.mark.parametrize(("argument", "path", "told"), [
    ("prompts.train.path=LONG", "LONG", "give another path: prompts.train.path=PATH"),
    ("+own.folder=there/", "there/LONG", "give another path: own.folder=PATH"),
    ("import.table=LONG", "there/LONG", "give another path: import.table=PATH"),
    ("LONG", "LONG/results", "(File name too long): give another path"),
    ("pool.root=LONG", "LONG", "choose another place (hydra.run.dir, hydra.sweep.dir, pool.root)"),
    ("seed=3", "LONG", "choose another place (hydra.run.dir, hydra.sweep.dir, pool.root)"),
])  # fmt: skip
def test_a_path_that_cannot_be_used_names_the_key_that_gave_it(monkeypatch, argument, path, told):
    long = "a" * 500
    monkeypatch.setattr(sys, "argv", ["train.py", argument.replace("LONG", long)])
    given = path.replace("LONG", long)
    fault = disk_fault(OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), given))
    assert fault.startswith(f"{given[:400]}... cannot be used (File name too long): ") and fault.endswith(
        told
    )


@pytest.mark.parametrize(("arguments", "told"), [
    (["-m", "seed=0,1", "hydra.run.dir=X"],
     "hydra.run.dir=X: the jobs of -m go to hydra.sweep.dir; give that, or leave -m out"),
    (["hydra.run.dir="], "hydra.run.dir=: it must name a folder; give hydra.run.dir=FOLDER, or leave it out"),
    (["+pool.root=''"], "+pool.root='': it must name a folder; give pool.root=FOLDER, or leave it out"),
    (["pool.root=' '"], "pool.root=' ': it must name a folder; give pool.root=FOLDER, or leave it out"),
    (["pool.root='/x/y '"],
     "pool.root='/x/y ': the folder's name begins or ends with a blank; give pool.root=/x/y"),
    (["hydra.run.dir=s3://bucket/run"],
     "hydra.run.dir=s3://bucket/run: files are written to folders alone, not to an address; "
     "give hydra.run.dir=FOLDER"),
    (["pool.root='~/x'"],
     f"pool.root='~/x': the folder's name begins with ~; give pool.root={Path.home()}/x"),
    (["--cfg", "job", "--foo"], NO_OPTION.format("--foo", "foo=VALUE")),
    (["--objective", "dpo"], NO_OPTION.format("--objective", "objective=VALUE")),
    (["--trainer.lr=1e-4"], NO_OPTION.format("--trainer.lr=1e-4", "trainer.lr=1e-4")),
    (["experiment=lora", "seed=1", "experiment=quick"],
     "experiment=lora experiment=quick: the last alone would count; give one list, experiment=[lora,quick]"),
    (["rewards=[looks,looks]"],
     "rewards=[looks,looks]: a name stands there twice; give one list, rewards=[looks]"),
    (["seed=1", "-m", "seed=2"], "seed=2: an option stands between it and the other key=value; give all of "
     "these in one place, before or after the options"),
    (["--config-dir"], "argument --config-dir/-cd: expected one argument; `--hydra-help` lists the options"),
])  # fmt: skip
def test_an_option_that_cannot_be_read_is_one_line(monkeypatch, capsys, arguments, told):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end:
        start(lambda: pytest.fail("nothing can be done"))
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {told}\n"


def test_a_command_draws_into_files_whatever_backend_the_user_has(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    start(lambda: None)
    assert os.environ["MPLBACKEND"] == "agg"


def test_options_beside_keys_are_left_to_hydra(monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        ["train.py", "-m", "rewards=looks,looks", "~pairs", "a='~/b'", "--cfg=job", "-p", "model"],
    )
    called = []
    start(lambda: called.append(sys.argv[1:]))
    assert called == [["-m", "rewards=looks,looks", "~pairs", "a='~/b'", "--cfg=job", "-p", "model"]]


@pytest.mark.parametrize("code", [0, None])
def test_code_that_ends_the_command_as_if_it_were_done_is_told(monkeypatch, capsys, code):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as end, plain_errors():
        sys.exit(code)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: code that this command called ended it by sys.exit()")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(RuntimeError, match=r"ended it by sys\.exit"), plain_errors():
        sys.exit(code)
