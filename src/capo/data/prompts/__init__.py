"""Prompts: their identity, the seeds derived from it, and prompt sets read from files.

`text_files` reads three hand-made text files as they are. `split_sets` reads files or hub data sets of any
format, filters them, removes duplicates, makes the sets disjoint and reports the counts.
"""

from capo.data.prompts.identity import (
    Prompt,
    candidate_seed,
    check_source,
    check_splits,
    make_prompt,
    normalize,
    prompt_id,
)
from capo.data.prompts.report import SplitReport, report_table
from capo.data.prompts.sources import missing_inputs
from capo.data.prompts.splits import PromptSets, expected_sizes, split_sets
from capo.data.prompts.text import text_files

__all__ = [
    "Prompt",
    "PromptSets",
    "SplitReport",
    "candidate_seed",
    "check_source",
    "check_splits",
    "expected_sizes",
    "make_prompt",
    "missing_inputs",
    "normalize",
    "prompt_id",
    "report_table",
    "split_sets",
    "text_files",
]
