import io
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from rich.table import Table

from capo.cli.rewards import finding_table
from capo.preflight.model_check import Check, check_table
from capo.rewards import Reward
from capo.rewards.selfcheck import PASSED, Finding
from capo.runtime.terminal import Terminal, printable, typed

VALUES = ["[looks]", "[/x]", "[red]x[/red]", ":smile:", "\\[a]", "rewards=[a,b]", "[link=file:///x]y[/link]"]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_printed_as_it_is(value):
    file = io.StringIO()
    console = Terminal(file=file, width=200)
    console.print(f"a line with {value}", style="yellow")
    table = Table("column", value, title=f"title {value}", caption=f"caption {value}")
    table.add_row(f"cell {value}", "other")
    console.print(table)
    console.print(
        finding_table(Reward("r", lambda images, prompts: None), [Finding(value, PASSED, value, value)])
    )
    console.print(check_table([Check("vae", True, value, value)]))
    assert file.getvalue().count(value) == 10 and "[green]" not in file.getvalue()


def test_no_escape_sequence_reaches_the_terminal():
    file = io.StringIO()
    console = Terminal(file=file, width=200)
    table = Table("prompt")
    table.add_row("\x1b]0;title\x07\x9b2J\x08")
    console.print("\x1b[2Ja \u202ecat\r\x7f", table)
    assert not {"\x1b", "\x07", "\x9b", "\x08", "\r", "\x7f", "\u202e"} & set(file.getvalue())
    assert r"\x1b[2Ja \u202ecat\r\x7f" in file.getvalue() and r"\x1b]0;title\x07\x9b2J\x08" in file.getvalue()
    assert printable("über\tfünf\n\u2502") == "über\tfünf\n\u2502"


@pytest.mark.parametrize("value", [
    "outputs/1", "odd run", "odd [d] = ü, x", "it's", "a\\b", "a\\'b", "end\\", "${x}", "a\\${x}", "$HOME",
    "~/x", "a: {b}",
    "\\\\'${'", 'say "hi"',
])  # fmt: skip
def test_an_argument_is_read_as_it_was_meant_by_shell_and_hydra(value):
    (argument,) = shlex.split(typed("run", value))
    given = OverridesParser.create().parse_override(argument).value()
    assert OmegaConf.to_container(OmegaConf.create({"run": given}), resolve=True) == {"run": value}


def test_plain_paths_are_typed_without_quotes():
    assert typed("run", Path("/a/b-1.0_x")) == "run=/a/b-1.0_x"


def test_a_terminal_of_no_columns_prints(monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    file = io.StringIO()
    Terminal(file=file).print("a line")
    assert file.getvalue() == "a line\n"
