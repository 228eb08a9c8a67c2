"""Draw the layers of the package and the imports between them.

`python docs/figures/layers.py` writes layers.svg. The layers come from pyproject.toml, the imports from
grimp, the library behind import-linter. tests/unit/test_architecture_figure.py compares drawing and code.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
FIGURE = Path(__file__).with_name("layers.svg")
WIDTH, ROW, BOX, HEIGHT = 860, 76, 112, 34  # pixels: figure, distance of layers, width and height of a box
BASE = ("runtime", "errors")  # nearly every package imports these: listed in tooltips, not drawn as arrows
COLUMNS = {  # center of each box as a share of the width, chosen so that few arrows pass behind a box
    "shapes": 0.1,
    "cli": 0.42,
    **{"preflight": 0.28, "training": 0.62},
    **{"evaluation": 0.46, "module": 0.82},
    "data": 0.37,
    **{"backbones": 0.2, "rewards": 0.56},
    "metrics": 0.82,
    **{"soup": 0.07, "noise": 0.22, "calibration": 0.39, "pairs": 0.55, "objectives": 0.72, "win_rates": 0.9},
    **{"runtime": 0.5, "errors": 0.5},
}
DARK, LIGHT = "#334155", "#cbd5e1"
STYLE = f"""<style>
text {{ font: 14px ui-monospace, Menlo, Consolas, monospace; text-anchor: middle; fill: #1f2937; }}
rect {{ fill: #ffffff; stroke: #374151; stroke-width: 1.2; }}
.page {{ stroke: none; }}
.base {{ fill: #eef2f7; }}
.dark {{ fill: none; stroke: {DARK}; stroke-width: 1.6; }}
.light {{ fill: none; stroke: {LIGHT}; stroke-width: 1.1; }}
</style>"""
MARKER = """<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"
markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" fill="{color}"/></marker>"""
Arrow = tuple[str, str]  # (importer, imported)


def layers() -> list[list[str]]:
    """Packages and modules of each layer, from the highest to the lowest, as import-linter enforces them."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = next(
        rules["layers"] for rules in config["tool"]["importlinter"]["contracts"] if "layers" in rules
    )
    return [[name.strip() for name in line.split("|")] for line in lines if line.strip()]


def arrows() -> set[Arrow]:
    """Pairs of children of `capo` of which the first, or a module in it, imports the second."""
    graph = grimp.build_graph("capo", cache_dir=None)
    found = {
        (importer.split(".")[1], imported.split(".")[1])
        for importer in graph.modules - {"capo"}
        for imported in graph.find_modules_directly_imported_by(importer) - {"capo"}
    }
    return {(importer, imported) for importer, imported in found if importer != imported}


def implied(arrow: Arrow, found: set[Arrow]) -> bool:
    """Whether a longer path of `found` leads from one end of `arrow` to the other."""
    start, end = arrow
    reached: set[str] = set()
    ahead = [imported for importer, imported in found if importer == start and imported != end]
    while ahead:
        here = ahead.pop()
        if here not in reached:
            reached.add(here)
            ahead += [imported for importer, imported in found if importer == here]
    return end in reached


def centers(rows: list[list[str]]) -> dict[str, tuple[float, float]]:
    """Center of each box. Raises ValueError for a package that has no column."""
    heights = {name: ROW * (number + 0.5) for number, row in enumerate(rows) for name in row}
    if missing := sorted(heights.keys() - COLUMNS.keys()):
        raise ValueError(f"no column in {__file__}: {', '.join(missing)}")
    return {name: (WIDTH * COLUMNS[name], height) for name, height in heights.items()}


def draw(rows: list[list[str]], found: set[Arrow]) -> str:
    """SVG of the layers: dark arrows are imports that no longer path implies, the others are light.

    Raises ValueError for a package that stands in no layer.
    """
    places = centers(rows)
    if missing := sorted({name for arrow in found for name in arrow} - places.keys()):
        raise ValueError(f"in no layer of pyproject.toml: {', '.join(missing)}")
    drawn = sorted(arrow for arrow in found if arrow[1] not in BASE)
    light = [arrow for arrow in drawn if implied(arrow, found)]
    dark = [arrow for arrow in drawn if arrow not in light]
    height = ROW * len(rows)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>Layers of capo and their imports</title>{STYLE}<defs>",
            *(MARKER.format(name=name, color=color) for name, color in (("dark", DARK), ("light", LIGHT))),
            f'</defs><rect class="page" width="{WIDTH}" height="{height}"/>',
            *(curve(places, arrow, "light") for arrow in light),
            *(curve(places, arrow, "dark") for arrow in dark),
            *(box(name, place, found) for name, place in places.items()),
            "</svg>\n",
        ]
    )


def curve(places: dict[str, tuple[float, float]], arrow: Arrow, kind: str) -> str:
    """SVG of an arrow from the lower edge of the importer to the upper edge of the imported."""
    (x0, y0), (x1, y1) = places[arrow[0]], places[arrow[1]]
    top, bottom, middle = y0 + HEIGHT / 2, y1 - HEIGHT / 2, (y0 + y1) / 2
    line = f"M{x0:g} {top:g}C{x0:g} {middle:g} {x1:g} {middle:g} {x1:g} {bottom:g}"
    title = f"<title>{arrow[0]} imports {arrow[1]}</title>"
    return f'<path class="{kind}" d="{line}" marker-end="url(#{kind})">{title}</path>'


def box(name: str, place: tuple[float, float], found: set[Arrow]) -> str:
    """SVG of a package, with its imports as a tooltip."""
    x, y = place
    width, kind = (WIDTH * 0.8, "base") if name in BASE else (BOX, "package")
    imports = ", ".join(imported for importer, imported in sorted(found) if importer == name)
    frame = f'x="{x - width / 2:g}" y="{y - HEIGHT / 2:g}" width="{width:g}" height="{HEIGHT}" rx="5"'
    title = f"<title>{name} imports {imports or 'nothing of the package'}</title>"
    return f'<g>{title}<rect class="{kind}" {frame}/><text x="{x:g}" y="{y + 5:g}">{name}</text></g>'


if __name__ == "__main__":
    FIGURE.write_text(draw(layers(), arrows()), encoding="utf-8")
