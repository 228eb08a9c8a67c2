"""What was left out of a prompt set and why, as values and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from rich.table import Table


@dataclass(frozen=True)
class SplitReport:
    """Rows of a split's files by what became of them: `read` is the sum of all counts after it."""

    split: str
    name: str
    places: tuple[str, ...]  # what was read; of the hub, with the commit
    read: int
    empty: int
    nsfw: int
    unwanted: int  # other rows than `where` asks for
    too_long: int
    duplicates: int  # of an earlier row
    elsewhere: int  # of a prompt that another split has
    over_limit: int
    kept: int


WORDS = {
    "read": "rows read",
    "empty": "empty",
    "nsfw": "NSFW",
    "unwanted": "other than `where`",
    "too_long": "too long",
    "duplicates": "duplicates",
    "elsewhere": "also in another split",
    "over_limit": "beyond the limit",
    "kept": "kept",
}
ALWAYS = ("read", "kept")


def left_out(report: SplitReport) -> str:
    """The counts that are not 0, in words: `3 empty, 12 duplicates`."""
    counts = [(getattr(report, key), words) for key, words in WORDS.items() if key not in ALWAYS]
    return ", ".join(f"{count:,} {words}" for count, words in counts if count) or "none left out"


def report_table(reports: Sequence[SplitReport]) -> Table:
    """A column a split, a row a count; counts that are 0 everywhere have no row."""
    table = Table("prompts", title_justify="left")
    for report in reports:
        table.add_column(report.split, justify="right")
    table.add_row("set", *(report.name for report in reports))
    for key in [field.name for field in fields(SplitReport) if field.name in WORDS]:
        counts = [getattr(report, key) for report in reports]
        if any(counts) or key in ALWAYS:
            table.add_row(
                WORDS[key], *(f"{count:,}" for count in counts), style="bold" if key == "kept" else ""
            )
    return table


def shortages(reports: Sequence[SplitReport], limits: dict[str, int | None]) -> list[str]:
    """A line for each split that has fewer prompts than its limit asks for."""
    return [
        f"prompts.{report.split}.limit={limit}: {report.name} gives only {report.kept:,}"
        for report in reports
        if (limit := limits.get(report.split)) is not None and report.kept < limit
    ]
