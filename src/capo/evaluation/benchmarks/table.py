"""Show the figures of a benchmark: on the console, as CSV, for LaTeX and on an offline page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image
from rich import box
from rich.table import Table

from capo.evaluation.reports.charts import half_width, interval_bar
from capo.evaluation.reports.formats import moved, needed, number, p_value, verdict
from capo.evaluation.reports.gallery import data_uri
from capo.evaluation.reports.templating import page_template
from capo.evaluation.tables import CSV, LATEX, SIGNIFICANT, latex_comment, latex_text
from capo.runtime.files import write_table, write_whole
from capo.runtime.run_folder import REPORT

RULE = (
    f"A figure is marked as the best only if a paired test over prompts separates it from every other row "
    f"(p < {SIGNIFICANT} by Holm)."
)


@dataclass(frozen=True)
class Shown:
    """Images of one prompt on the page: name of a row -> its images, from the same seeds."""

    prompt: str
    category: str
    images: Mapping[str, Sequence[Image]]


@dataclass(frozen=True)
class BenchmarkTable:
    """The figures with what the page says about them.

    Attributes:
        results: `scores.summary`.
        command: the command that made them.
        settings: row -> what its images follow from; empty for results of official scorers.
        notes: measure -> what its figures are and are not.
        shown: prompts with their images.
    """

    results: Mapping
    command: str
    settings: Mapping[str, Mapping[str, object]]
    notes: Mapping[str, str]
    shown: Sequence[Shown] = ()

    def write(self, folder: Path) -> list[Path]:
        """Write the page, the CSV and the LaTeX table to `folder`, and return their paths."""
        cells = self.csv()
        write_table(folder / CSV, list(dict.fromkeys(name for row in cells for name in row)), cells)
        write_whole(folder / LATEX, self.latex())
        write_whole(folder / REPORT, self.html())
        return [folder / name for name in (REPORT, CSV, LATEX)]

    def csv(self) -> list[dict[str, object]]:
        """One row for each measure, part and model."""
        rows = []
        for measure, parts in self.results["measures"].items():
            for part, entry in parts.items():
                for name, mean in entry["rows"].items():
                    cells = {
                        "measure": measure,
                        "part": part,
                        "row": name,
                        "prompts": entry["prompts"],
                        **mean,
                    }
                    apart = entry["differences"].get(name, {})
                    cells |= {
                        key if key in ("p", "holm") else f"difference/{key}": value
                        for key, value in apart.items()
                    }
                    rates = entry.get("win_rates", {}).get(name, {})
                    rows.append(cells | {f"win_rate/{key}": value for key, value in rates.items()})
        return rows

    def latex(self) -> str:
        """Return a table with booktabs' rules for each measure: models by row and parts by column."""
        lines = [latex_comment(self.command), latex_comment(RULE)]
        for measure, parts in self.results["measures"].items():
            lines += [
                latex_comment(f"{measure}: {self.notes.get(measure, '')}"),
                *(
                    latex_comment(f"{row}: denoiser {known['denoiser']}, seed {known['seed']}")
                    for row, known in self.settings.items()
                ),
                rf"\begin{{tabular}}{{l{'r' * len(parts)}}}",
                r"\toprule",
                " & ".join([latex_text(measure), *map(latex_text, parts)]) + r" \\",
                r"\midrule",
            ]
            for name in self.results["rows"]:
                cells = [latex_text(name)]
                for entry in parts.values():
                    found = entry["rows"].get(name)
                    figure = "-" if found is None else number(found["mean"])
                    cells.append(rf"\textbf{{{figure}}}" if entry["best"] == name else figure)
                lines.append(" & ".join(cells) + r" \\")
            lines += [r"\bottomrule", r"\end{tabular}", ""]
        return "\n".join(lines)

    def html(self) -> str:
        """Return a page that loads nothing else."""
        filters = number, moved, needed, p_value, data_uri, verdict
        template = page_template("benchmark.html.j2", *filters)
        return template.render(table=self, results=self.results, bars=self._bars(), rule=RULE)

    def _bars(self) -> dict[str, dict[str, dict[str, object]]]:
        """Measure -> part -> row -> drawing of its difference from the reference, on one axis a measure."""
        found = {}
        for measure, parts in self.results["measures"].items():
            spans = [
                (apart["low"], apart["high"])
                for entry in parts.values()
                for apart in entry["differences"].values()
            ]
            reach = max((abs(value) for span in spans for value in span), default=0.0)
            half = half_width(spans, 0.0, step=0.05 if reach < 0.5 else 0.5)
            found[measure] = {
                part: {
                    name: interval_bar(apart["low"], apart["mean"], apart["high"], 0.0, half)
                    for name, apart in entry["differences"].items()
                }
                for part, entry in parts.items()
            }
            found[measure]["half"] = half
        return found

    def console(self) -> list[Table]:
        """Tables for a terminal, one a measure: a row for each part."""
        tables = []
        for measure, parts in self.results["measures"].items():
            others = self.results["rows"][:-1]
            heads = [*self.results["rows"], *(f"{name} - {self.results['rows'][-1]}" for name in others)]
            note = self.notes.get(measure)
            table = Table(
                "", *heads, title=f"{self.results['benchmark']}: {measure}", caption=note, box=box.SIMPLE_HEAD
            )
            for part, entry in parts.items():
                means = [entry["rows"].get(name) for name in self.results["rows"]]
                apart = [entry["differences"].get(name) for name in others]
                table.add_row(
                    part,
                    *("-" if found is None else _span(found) for found in means),
                    *("-" if found is None else _apart(found) for found in apart),
                )
            tables.append(table)
        return tables


def _span(found: Mapping[str, float]) -> str:
    return f"{number(found['mean'])} ({number(found['low'])}–{number(found['high'])})"


def _apart(found: Mapping[str, float]) -> str:
    told = f"{moved(found['mean'])}, p {p_value(found['holm'])}"
    return ", ".join(filter(None, (told, needed(found, 0.0))))
