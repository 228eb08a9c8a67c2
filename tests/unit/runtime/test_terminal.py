import io

import pytest
from rich.table import Table

from capo.cli.rewards import finding_table
from capo.preflight.model_check import Check, check_table
from capo.rewards import Reward
from capo.rewards.selfcheck import PASSED, Finding
from capo.runtime.terminal import Terminal, printable

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
