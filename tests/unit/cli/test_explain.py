"""What `python -m capo.cli.explain` says of keys, and the page that it makes."""

import subprocess
import sys

import pytest

from capo.cli import explain
from fixtures import ROOT


@pytest.fixture(scope="module", autouse=True)
def composed_once():
    """The configurations without overrides, which every call composes."""
    kept = explain.Configurations([])
    compose = explain.Configurations
    explain.Configurations = lambda overrides: compose(overrides) if overrides else kept
    yield
    explain.Configurations = compose


def said(capsys, *command: str) -> str:
    assert explain.main(command) == 0
    return capsys.readouterr().out


def test_a_key_has_meaning_range_and_default(capsys):
    text = said(capsys, "trainer.micro_batch")
    assert "pairs in one forward pass on a device" in text and "default: null" in text
    assert "must be a whole number of at least 1, or null" in text


def test_a_default_is_that_of_the_choices_of_a_command(capsys):
    assert "default: 6\n" in said(capsys, "sampling.steps")
    assert "default: 50\n" in said(capsys, "sampling.steps", "model=sdxl")
    assert "default: verify\n" in said(capsys, "stage", "stage=verify")  # a key of one script


def test_a_group_lists_its_files_and_a_section_its_keys(capsys):
    text = said(capsys, "trainer")
    assert "group: ddp, default, fsdp" in text and "  max_steps: optimizer steps" in text


def test_keys_below_a_name_that_users_choose_are_explained(capsys):
    assert "must be one of identity, log" in said(capsys, "rewards.anything.link")


def test_a_key_of_another_script_names_it(capsys):
    assert "in merge.py only" in said(capsys, "method")


def test_a_near_miss_gets_what_was_meant(capsys):
    assert explain.main(["trainer.micro_bach"]) == 2
    assert "did you mean trainer.micro_batch" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "override", "message"), [
    ("\x1b[2J", "", r"there is no key '\x1b[2J'"),
    ("seed", "model=nope", "model=nope: no such choice; there are sd15"),
    ("seed", "seed=[", "'seed=[' cannot be read"),
    ("seed", "seed=abc", "error: seed=abc: must be a whole number from 0 to"),
    ("seed", "+a=1", "error: a=1: there is no such key"),
    ("", "seed=abc", "seed=abc sets a key, and no key is named that is to be explained; did you mean "
     "python -m capo.cli.explain seed?"),
    ("seed", "model.lr=${trainer.lr}", "error: trainer.lr cannot be resolved (Recursive"),
    ("seed", "seed=${oc.env:NO_SUCH_VARIABLE}", "error: seed cannot be resolved"),
    ("", "+a=1", "did you mean python -m capo.cli.explain a?"),
])  # fmt: skip
def test_slips_are_answered_as_the_scripts_answer_them(capsys, key, override, message):
    assert explain.main([*filter(None, [key, override])]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


def test_a_reader_that_stops_is_no_fault_of_the_command():
    command = f"{sys.executable} -m capo.cli.explain | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("seed: ") and done.stderr == ""


def test_help_is_what_the_module_says(capsys):
    assert "python -m capo.cli.explain trainer.micro_batch" in said(capsys, "--help")


def test_a_key_far_longer_than_any_is_compared_with_none(capsys):
    assert explain.main(["x" * 300 + ".max_steps"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_the_page_is_what_the_schema_says(capsys):
    made = said(capsys, "--page")
    assert made == (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), (
        "run python -m capo.cli.explain --page > docs/configuration.md"
    )
    assert "| `trainer.max_steps` | a whole number from 1 to 1000000000 | `250` | optimizer steps |" in made
    assert str(ROOT) not in made  # nor any folder of the machine that made it
