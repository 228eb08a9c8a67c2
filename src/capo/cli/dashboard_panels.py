"""Turn a dashboard's specification into W&B's workspaces and report; needs the extra `dashboard`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import wandb_workspaces.reports.v2 as reports  # pyright: ignore[reportMissingImports]  # an extra
import wandb_workspaces.workspaces as workspaces  # pyright: ignore[reportMissingImports]  # an extra
from wandb_workspaces import expr  # pyright: ignore[reportMissingImports]  # an extra

TITLE, MOST_RUNS = 128, 100  # characters of a report's title; runs drawn in a panel


def workspaces_of(spec: Mapping[str, Any], entity: str) -> list[workspaces.Workspace]:
    """One unsaved workspace view for each of the specification's, with the sweep's runs alone."""
    return [
        workspaces.Workspace(
            entity=entity,
            project=spec["project"],
            name=view["name"],
            sections=[
                workspaces.Section(
                    name=section["name"], panels=[panel(each) for each in section["panels"]], is_open=True
                )
                for section in view["sections"]
            ],
            settings=workspaces.WorkspaceSettings(max_runs=MOST_RUNS),
            runset_settings=workspaces.RunsetSettings(filters=[expr.Metric("Group") == spec["group"]]),
        )
        for view in spec["views"]
    ]


def report_of(spec: Mapping[str, Any], entity: str) -> reports.Report:
    """Unsaved report: the sweep's table, and the panels of its results."""
    runs = reports.Runset(
        entity=entity,
        project=spec["project"],
        name=spec["sweep"],
        filters=[expr.Metric("Group") == spec["group"]],
    )
    report = spec["report"]
    panels = [panel(each) for each in report["panels"]]
    return reports.Report(
        entity=entity,
        project=spec["project"],
        title=report["title"][:TITLE],
        blocks=[
            reports.H2("Table"),
            reports.MarkdownBlock(report["table"]),
            reports.H2("Panels"),
            reports.PanelGrid(runsets=[runs], panels=panels),
        ],
    )


def panel(spec: Mapping[str, Any]) -> Any:
    """Return the panel of W&B that a panel of the specification describes."""
    return KINDS[spec["kind"]](spec)


def _figure(spec: Mapping[str, str]) -> reports.Config | reports.SummaryMetric:
    return reports.Config(spec["config"]) if "config" in spec else reports.SummaryMetric(spec["summary"])


def _scatter(spec: Mapping[str, Any]) -> reports.ScatterPlot:
    return reports.ScatterPlot(
        title=spec["title"], x=_figure(spec["x"]), y=_figure(spec["y"]), log_x=spec["log_x"] or None
    )


def _bars(spec: Mapping[str, Any]) -> reports.BarPlot:
    return reports.BarPlot(
        title=spec["title"],
        metrics=[spec["figure"]],
        groupby=reports.Config(spec["by"]),
        max_runs_to_show=MOST_RUNS,
    )


def _lines(spec: Mapping[str, Any]) -> reports.LinePlot:
    return reports.LinePlot(title=spec["title"], x=spec["x"], y=list(spec["y"]), max_runs_to_show=MOST_RUNS)


def _parallel(spec: Mapping[str, Any]) -> reports.ParallelCoordinatesPlot:
    columns: Sequence[Mapping[str, str]] = spec["columns"]
    return reports.ParallelCoordinatesPlot(
        title=spec["title"],
        columns=[reports.ParallelCoordinatesPlotColumn(metric=_figure(column)) for column in columns],
    )


def _images(spec: Mapping[str, Any]) -> reports.MediaBrowser:
    return reports.MediaBrowser(
        title=spec["title"], media_keys=list(spec["keys"]), mode="grid", grid_x_axis="step", grid_y_axis="run"
    )


KINDS = {"scatter": _scatter, "bars": _bars, "lines": _lines, "parallel": _parallel, "images": _images}
