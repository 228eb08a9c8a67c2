"""Report on prompt sets: how many rows were left out of each and why, as values and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from rich.table import Table


@dataclass(frozen=True)
class SplitReport:
    """Counts of the rows of a split's files: `read` is the number of rows, the sum of the counts after it."""

    split: str
    name: str
    places: tuple[str, ...]  # files that were read; files of the hub with their commit
    read: int
    empty: int
    nsfw: int
    unwanted: int  # rows that do not match `where`
    too_long: int
    duplicates: int  # rows with the prompt of an earlier row
    elsewhere: int  # rows with a prompt of another split
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
    """Counts of rows left out that are not 0, in words: `3 empty, 12 duplicates`."""
    counts = [(getattr(report, key), words) for key, words in WORDS.items() if key not in ALWAYS]
    return ", ".join(f"{count:,} {words}" for count, words in counts if count) or "none left out"


def report_table(reports: Sequence[SplitReport]) -> Table:
    """Table with one column per split and one row per count; counts that are 0 in all splits have no row."""
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
    """One line for each split that has fewer prompts than its limit (a number, or None: no limit)."""
    return [
        f"prompts.{report.split}.limit={limit}: {report.name} gives only {report.kept:,}"
        for report in reports
        if (limit := limits.get(report.split)) is not None and report.kept < limit
    ]
