"""Present the results of an evaluation: an offline HTML page, and tables on the console."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from capo.evaluation.held_out import alarms, remark
from capo.evaluation.reports.charts import half_width, interval_bar, line_chart, read_curves, strength_chart
from capo.evaluation.reports.distances import block_rows, distance_rows, distance_table, fallen_diversity
from capo.evaluation.reports.formats import fixed, moved, number, p_value, percent, span, verdict, with_span
from capo.evaluation.reports.gallery import Exhibit, data_uri
from capo.evaluation.reports.rounds import read_rounds, round_table
from capo.evaluation.reports.templating import page_template
from capo.rewards import Reward
from capo.runtime.terminal import Terminal

__all__ = ["Report", "print_results", "render_report", "results_tables"]

ORDERS = {"gain": "largest gains", "loss": "largest losses", "plain": "unselected"}
FINGERPRINTS = {
    "policy": "policy",
    "base": "base",
    "policy_generator": "policy with sampler",
    "base_generator": "base with sampler",
    "latent_space": "latent space",
    "text_encoders": "text encoders",
}


@dataclass(frozen=True)
class Report:
    """Content of an evaluation's page.

    Attributes:
        title: heading of the page.
        results: content of results.json.
        settings: content of settings.json.
        rewards: the rewards of `results`.
        exhibits: prompts of the gallery.
        config: text of the run's config.yaml, or None.
        curves: path of the run's metrics.csv, or None; the file may be missing. The run's rounds.csv, if it
            has one, stands beside it.
        strength: content of the run's strength.json, or None.
    """

    title: str
    results: Mapping
    settings: Mapping
    rewards: Sequence[Reward]
    exhibits: Sequence[Exhibit]
    config: str | None = None
    curves: str | Path | None = None
    strength: Mapping | None = None


def render_report(report: Report) -> str:
    """Render a self-contained HTML page that loads nothing else; the same report gives the same text."""
    template = page_template("report.html.j2", percent, number, fixed, moved, p_value, data_uri)
    charts = [] if report.curves is None else read_curves(report.curves)
    rounds = [] if report.curves is None else read_rounds(Path(report.curves).parent)
    scale, rows = headline(report.results)
    distance_scale, distances = distance_rows(report.results)
    return template.render(
        report=report,
        results=report.results,
        orders=ORDERS,
        fingerprints=FINGERPRINTS,
        scale=scale,
        headline=rows,
        categories=results_by_category(report.results),
        oracle=oracle_sections(report.results),
        distance_scale=distance_scale,
        distances=distances,
        blocks=block_rows(report.results),
        remarks=remarks(report.results) + ([] if report.curves is None else remark(alarms(report.curves))),
        strength=line_chart(strength_chart(report.strength["curve"])) if report.strength else None,
        rounds=round_table(rounds) if rounds else None,
        charts=[(chart.title, line_chart(chart)) for chart in charts],
    )


def headline(results: Mapping) -> tuple[float, list[dict]]:
    """Half the width of the win-rate axis, and one row per reward: rate, zero line, verdict and bar."""
    zero = results["zero"]
    intervals = [(entry["low"], entry["high"]) for entry in [*results["win_rate"].values(), *zero.values()]]
    half = half_width(intervals, 0.5, most=0.5)
    rows = []
    for name, rate in results["win_rate"].items():
        band = (zero[name]["low"], zero[name]["high"]) if name in zero else None
        rows.append(
            {
                "name": name,
                "rate": rate,
                "zero": zero.get(name),
                "score": results["score"][name],
                "verdict": verdict(rate, 0.5),
                "bar": interval_bar(rate["low"], rate["mean"], rate["high"], 0.5, half, band),
            }
        )
    return half, rows


def results_by_category(results: Mapping) -> list[dict]:
    """One row for each category: its name, and win-rate and verdict of each reward."""
    return [
        {"name": category, "rates": [{**rate, "verdict": verdict(rate, 0.5)} for rate in rates.values()]}
        for category, rates in results.get("win_rate_by_category", {}).items()
    ]


def oracle_sections(results: Mapping) -> list[dict]:
    """One section per oracle measure: half the axis width, and rows for all prompts and each category."""
    sections = []
    for measure in results.get("oracle", {}):
        entries = {"all prompts": results["oracle"][measure]}
        entries |= {name: found[measure] for name, found in results["oracle_by_category"].items()}
        extent = max(abs(entry[side]) for entry in entries.values() for side in ("low", "high"))
        half = half_width([(-extent, extent)], 0.0, step=0.05 if extent < 0.5 else 0.5)
        rows = [
            {
                "name": name,
                **entry,
                "change": entry["policy"] - entry["base"],
                "verdict": verdict(entry, 0.0),
                "bar": interval_bar(entry["low"], entry["policy"] - entry["base"], entry["high"], 0.0, half),
            }
            for name, entry in entries.items()
        ]
        sections.append({"name": measure, "half": half, "rows": rows})
    return sections


def remarks(results: Mapping) -> list[str]:
    """What to know beside the figures.

    Win-rates that may be chance, reward hacking, categories that fall, a zero line whose interval excludes
    0.5, and prompts that are cut.
    """
    found = [
        f"{name}: {percent(rate['mean'])} may be chance (p {p_value(rate['holm'])}); about "
        f"{rate['prompts_needed']} prompts would show a difference of that size, {results['prompts']} were "
        "drawn."
        for name, rate in results["win_rate"].items()
        if verdict(rate, 0.5) == "unclear" and rate["prompts_needed"]
    ]
    for category, measures in results.get("oracle_by_category", {}).items():
        found += [
            f"oracle: {name} of '{category}' falls from {number(entry['base'])} to {number(entry['policy'])} "
            f"(p {p_value(entry['holm'])} by Holm over the categories)."
            for name, entry in measures.items()
            if entry["policy"] < entry["base"] and entry["holm"] < 0.05
        ]
    for name, rate in results["win_rate"].items():
        measured = results.get("oracle", {}).get(name)
        if measured and rate["low"] > 0.5 and measured["high"] < 0:
            found.append(
                f"{name}: the reward prefers the policy ({percent(rate['mean'])}), but the oracle measures "
                f"a fall from {number(measured['base'])} to {number(measured['policy'])}: reward hacking."
            )
    for name, rate in results["zero"].items():
        if verdict(rate, 0.5) != "unclear":
            found.append(
                f"{name}: the zero line's interval ({percent(rate['low'])} to {percent(rate['high'])}) does "
                "not contain 50 %, although both sides are the base: treat differences of that size as noise."
            )
    for name, cut in results.get("cut", {}).items():
        found.append(
            f"{name}: it reads {cut['tokens']} tokens of a prompt; at least {cut['prompts']} of "
            f"{results['prompts']} prompts are longer, and nothing after that counts in its scores."
        )
    return found + fallen_diversity(results)


def print_results(results: Mapping, console: Console | None = None) -> None:
    """Print the tables of win-rates and, if there is one, of the oracle; then the remarks."""
    console = console or Terminal()
    for table in results_tables(results):
        console.print(table)
    for sentence in remarks(results):
        console.print(sentence, highlight=False)


def results_tables(results: Mapping) -> list[Table]:
    """Tables of win-rates against the base in %, of the oracle's measures, and of diversity and drift."""
    title = f"policy against base: {results['prompts']} prompts x {results['images_per_prompt']} images"
    table = Table(
        "reward", "win-rate %", "95 % interval", "zero line %", "mean score", title=title, box=box.SIMPLE_HEAD
    )
    for name, rate in results["win_rate"].items():
        zero, score = results["zero"].get(name), results["score"][name]
        table.add_row(
            name,
            f"{100 * rate['mean']:.1f}",
            span(rate),
            with_span(zero) if zero else "-",
            f"{number(score['base'])} → {number(score['policy'])}",
            style=_style(verdict(rate, 0.5)),
        )
    tables = [table, *([_rates_table(results)] if results.get("win_rate_by_category") else [])]
    sections, distances = oracle_sections(results), distance_table(results)
    if not sections:
        return [*tables, distances]
    return [
        *tables,
        _oracle_table(sections),
        *([_category_table(sections)] if results["oracle_by_category"] else []),
        distances,
    ]


def _rates_table(results: Mapping) -> Table:
    table = Table("win-rate by category, %", *results["win_rate"], box=box.SIMPLE_HEAD)
    for row in results_by_category(results):
        table.add_row(row["name"], *(Text(with_span(rate), _style(rate["verdict"])) for rate in row["rates"]))
    return table


def _oracle_table(sections: Sequence[Mapping]) -> Table:
    table = Table("oracle", "base", "policy", "change", "95 % interval", box=box.SIMPLE_HEAD)
    for section in sections:
        row = section["rows"][0]
        table.add_row(
            section["name"],
            fixed(row["base"]),
            fixed(row["policy"]),
            moved(row["change"]),
            f"{moved(row['low'])} to {moved(row['high'])}",
            style=_style(row["verdict"]),
        )
    return table


def _category_table(sections: Sequence[Mapping]) -> Table:
    table = Table("oracle by category", *(section["name"] for section in sections), box=box.SIMPLE_HEAD)
    for rows in zip(*(section["rows"][1:] for section in sections), strict=True):
        cells = [
            Text(f"{fixed(row['base'])} → {fixed(row['policy'])}", _style(row["verdict"])) for row in rows
        ]
        table.add_row(rows[0]["name"], *cells)
    return table


def _style(outcome: str) -> str:
    return {"above": "green", "below": "red", "unclear": ""}[outcome]
