"""Tables of evaluated runs in the shape of the paper's tables 1 to 7: HTML, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from capo.errors import InputError
from capo.evaluation.reports.formats import number, span
from capo.evaluation.reports.frontiers import MethodComparison
from capo.evaluation.reports.templating import page_template
from capo.evaluation.seeds import COLUMN, read_rates
from capo.evaluation.statistics import paired_tests
from capo.runtime.files import write_table, write_whole
from capo.runtime.run_folder import TABLES
from capo.runtime.terminal import printable

SIGNIFICANT = 0.05  # of the paired tests, after Holm, by which a value is called the best
CSV, HTML, LATEX = TABLES
SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


@dataclass(frozen=True)
class Row:
    """A run in a table.

    Attributes:
        folder: the run's directory.
        labels: what it was configured with, column -> text.
        results: content of its results.json.
    """

    folder: Path
    labels: Mapping[str, str]
    results: Mapping


@dataclass(frozen=True)
class RunTable:
    """Runs with their win-rates against the base and mean scores, and which win-rate is the best.

    Attributes:
        rows: the runs, in the order of the table.
        best: reward -> the row whose win-rate is above those of all others beyond chance, if there is one.
        command: the command that made the table.
        compared: the runs as frontiers, if they are.
    """

    rows: Sequence[Row]
    best: Mapping[str, int] = field(default_factory=dict)
    command: str = ""
    compared: MethodComparison | None = None

    @classmethod
    def of(
        cls, rows: Sequence[Row], seed: int, command: str, compared: MethodComparison | None = None
    ) -> RunTable:
        """Find the best rows: `best_rows` of the runs' win-rates by prompt."""
        return cls(rows, best_rows([row.folder for row in rows], seed), command, compared)

    @property
    def rewards(self) -> list[str]:
        """Rewards of all rows, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.results["win_rate"]))

    @property
    def labels(self) -> list[str]:
        """Columns of labels."""
        return list(dict.fromkeys(name for row in self.rows for name in row.labels))

    def write(self, folder: Path) -> list[Path]:
        """Write the three files to `folder`, and those of the frontiers, and return their paths."""
        write_table(folder / CSV, *self._csv())
        write_whole(folder / HTML, self.html())
        write_whole(folder / LATEX, self.latex())
        frontiers = self.compared.write(folder) if self.compared else []
        return [*(folder / name for name in (CSV, HTML, LATEX)), *frontiers]

    def _csv(self) -> tuple[list[str], list[dict[str, object]]]:
        rows = []
        for index, row in enumerate(self.rows):
            cells: dict[str, object] = {"run": str(row.folder), **row.labels}
            for name in self.rewards:
                rate, score = row.results["win_rate"].get(name), row.results["score"].get(name)
                if rate and score:
                    cells |= {
                        f"{COLUMN}{name}": rate["mean"],
                        f"{COLUMN}{name}/low": rate["low"],
                        f"{COLUMN}{name}/high": rate["high"],
                        f"score/{name}": score["policy"],
                        f"best/{name}": int(self.best.get(name) == index),
                    }
            cells |= self.compared.columns(row.folder) if self.compared else {}
            rows.append(cells | {"policy": row.results["policy"], "base": row.results["base"]})
        return list(dict.fromkeys(name for row in rows for name in row)), rows

    def cells(self, index: int, reward: str) -> tuple[str, str, str, bool]:
        """Win-rate in %, interval, mean score, and whether the win-rate is the best; "-" if it is unknown."""
        results = self.rows[index].results
        rate, score = results["win_rate"].get(reward), results["score"].get(reward)
        if not rate or not score:
            return "-", "", "-", False
        return (
            f"{100 * rate['mean']:.1f}",
            span(rate),
            number(score["policy"]),
            self.best.get(reward) == index,
        )

    def html(self) -> str:
        """Return a page that loads nothing else."""
        return page_template("table.html.j2").render(table=self, rule=_rule())

    def latex(self) -> str:
        """Return a table with booktabs' rules, for a document to input."""
        rewards, labels = self.rewards, self.labels
        groups = " & ".join(rf"\multicolumn{{2}}{{c}}{{{latex_text(name)}}}" for name in rewards)
        first = len(labels) + 1
        rules = "".join(
            rf"\cmidrule(lr){{{first + 2 * place}-{first + 2 * place + 1}}}" for place in range(len(rewards))
        )
        heads = " & ".join([*map(latex_text, labels), *["win-rate & score"] * len(rewards)])
        lines = [
            latex_comment(self.command),
            latex_comment(_rule()),
            *(latex_comment(f"{row.folder}: {_prints(row)}") for row in self.rows),
            rf"\begin{{tabular}}{{{'l' * len(labels)}{'rr' * len(rewards)}}}",
            r"\toprule",
            " & ".join([*[""] * len(labels), groups]) + r" \\",
            rules,
            heads + r" \\",
            r"\midrule",
        ]
        for index, row in enumerate(self.rows):
            cells = [latex_text(row.labels.get(name, "")) for name in labels]
            for name in rewards:
                rate, _, score, best = self.cells(index, name)
                cells += [rf"\textbf{{{rate}}}" if best else rate, score]
            lines.append(" & ".join(cells) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _prints(row: Row) -> str:
    return f"policy {row.results['policy'][:8]}, base {row.results['base'][:8]}"


def best_rows(folders: Sequence[Path], seed: int) -> dict[str, int]:
    """Find the run whose win-rate against the base is above that of every other beyond chance, by reward.

    The run with the highest mean is tested against each other one by `paired_tests` of their differences by
    prompt, and it is the best if the largest of Holm's p-values is below SIGNIFICANT. Runs of one policy,
    or of other prompts, cannot be told apart.
    """
    read = []
    for folder in folders:
        try:
            read.append(read_rates(folder))
        except InputError:
            return {}
    if len(read) < 2 or any(prompts != read[0][0] for prompts, _ in read):
        return {}
    best = {}
    for name in read[0][1]:
        rates = [found[name] for _, found in read if name in found]
        if len(rates) < len(read):
            continue
        first = max(range(len(rates)), key=lambda place: float(rates[place].mean()))
        others = {str(place): rates[first] - rate for place, rate in enumerate(rates) if place != first}
        if max(test["holm"] for test in paired_tests(others, seed).values()) < SIGNIFICANT:
            best[name] = first
    return best


def _rule() -> str:
    return (
        "Win-rates against the base in %, and mean scores. A win-rate is marked as the best only if a paired "
        f"test over prompts separates it from every other row (p < {SIGNIFICANT} by Holm)."
    )


def latex_text(text: str) -> str:
    """Text on one line, with LaTeX's special characters escaped."""
    return " ".join(text.split()).translate(SPECIAL)


def latex_comment(text: str) -> str:
    """Comment of LaTeX on one line: what followed a line's end would be read as LaTeX."""
    return "% " + printable(" ".join(text.split()))
