"""Tables of studies in the shape of the paper's table 7 (HTML, CSV, LaTeX), and files of each study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from capo.evaluation.reports.formats import p_value, span, with_span
from capo.evaluation.reports.templating import page_template
from capo.evaluation.statistics import holm
from capo.evaluation.tables import latex_comment, latex_text
from capo.runtime.files import write_json, write_table, write_whole

CSV, HTML, LATEX = "study.csv", "study.html", "study.tex"
RESULTS, RATERS, PROMPTS = "results.json", "raters.csv", "prompts.csv"  # of each study, in its folder
FIGURES = ("mean", "low", "high", "crossed_low", "crossed_high", "p", "prompts_needed")


def with_holm(studies: Sequence[Mapping]) -> list[dict]:
    """Add to each study's win-rate `holm`: p by Holm's method over the studies of one table."""
    adjusted = holm({str(place): study["win_rate"]["p"] for place, study in enumerate(studies)})
    return [
        {**study, "win_rate": {**study["win_rate"], "holm": adjusted[str(place)]}}
        for place, study in enumerate(studies)
    ]


def shares(study: Mapping) -> tuple[str, str, str]:
    """Win-rates of both sides and their difference, in %: `54.5%`, `45.5%`, `+9.0%`, as rounded."""
    first = round(100 * study["win_rate"]["mean"], 1)
    return f"{first:.1f}%", f"{100 - first:.1f}%", f"{2 * first - 100:+.1f}%"


def write_study(folder: Path, study: Mapping) -> None:
    """Write results.json, raters.csv and prompts.csv of a study to its folder."""
    for name, key in ((RATERS, "raters"), (PROMPTS, "prompts")):
        rows = study[key]
        write_table(folder / name, list(rows[0]), rows)
    write_json(folder / RESULTS, study, allow_nan=False)


def write_studies(folder: Path, studies: Sequence[Mapping], command: str) -> list[Path]:
    """Write the table of studies to `folder` as CSV, HTML and LaTeX; return the three paths."""
    rows = [
        {
            "first": study["names"][0],
            "second": study["names"][1],
            **{name: study["win_rate"][name] for name in (*FIGURES, "holm")},
            **{name: study[name] for name in ("alpha", "votes", "pairs", "ties", "left", "failures")},
            "raters": sum(rater["counts"] for rater in study["raters"]),
            "left_out": sum(not rater["counts"] for rater in study["raters"]),
        }
        for study in studies
    ]
    write_table(folder / CSV, list(rows[0]), rows)
    page = page_template("study.html.j2", shares, span, p_value).render(studies=studies, command=command)
    write_whole(folder / HTML, page)
    write_whole(folder / LATEX, latex(studies, command))
    return [folder / name for name in (HTML, CSV, LATEX)]


def latex(studies: Sequence[Mapping], command: str) -> str:
    """Return the table with booktabs' rules: for each study both win-rates and the improvement."""
    heads, cells = [], []
    for study in studies:
        heads += [*map(latex_text, study["names"]), "Improvement"]
        cells += map(latex_text, shares(study))
    lines = [
        latex_comment(command),
        *(latex_comment(f"{' against '.join(study['names'])}: {told(study)}") for study in studies),
        rf"\begin{{tabular}}{{{'ccc' * len(studies)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
        " & ".join(cells) + r" \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*lines, ""])


def told(study: Mapping) -> str:
    """Interval, p and size of a study in one line."""
    rate, raters = study["win_rate"], study["raters"]
    counted = sum(rater["counts"] for rater in raters)
    return (
        f"95 % interval {span(rate)}, p = {p_value(rate['holm'])} (Holm), {study['votes']} votes of "
        f"{counted} raters on {study['pairs']} of {study['of_pairs']} pairs, "
        f"raters left out: {len(raters) - counted}"
    )


def console_tables(studies: Sequence[Mapping]) -> list[Table]:
    """Tables for the console: one with a row for each study, and of each study one of its raters."""
    table = Table("comparison", "win-rate, %", "p (Holm)", "alpha", "votes", "ties, %", box=box.SIMPLE_HEAD)
    for study in studies:
        rate, alpha = study["win_rate"], study["alpha"]
        table.add_row(
            " against ".join(study["names"]),
            with_span(rate),
            p_value(rate["holm"]),
            "-" if alpha is None else f"{alpha:.2f}",
            str(study["votes"]),
            f"{100 * study['ties']:.1f}",
        )
    return [table, *map(_raters_table, studies)]


def _raters_table(study: Mapping) -> Table:
    title = " against ".join(study["names"])
    table = Table(
        "rater", "votes", "win-rate, %", "checks failed", "counts", title=title, box=box.SIMPLE_HEAD
    )
    for rater in study["raters"]:
        table.add_row(
            rater["rater"],
            str(rater["votes"]),
            "-" if rater["mean"] is None else with_span(rater),
            f"{rater['failed']} of {rater['checks']}",
            "yes" if rater["counts"] else "no",
        )
    return table
