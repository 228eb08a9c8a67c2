"""The schema of the whole configuration: each key's type, range and meaning, in the fields of sections.

`Training` in `capo.cli.schema.scripts` is its root; a key is one line in the section that holds it. Nothing
here imports torch, so that a slip is answered at once.
"""

from capo.cli.schema.border import check_calls, check_group_choices, check_stored, check_values
from capo.cli.schema.scripts import Evaluating, Generating, Merging, Studying, Training

__all__ = [
    "Evaluating",
    "Generating",
    "Merging",
    "Studying",
    "Training",
    "check_calls",
    "check_group_choices",
    "check_stored",
    "check_values",
]
