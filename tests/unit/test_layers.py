"""The layout in numbers: packages, layers, imports and cycles, over import-linter's own graph."""

import tomllib

import grimp
import pytest

from fixtures import ROOT

CONTRACTS = {
    contract["name"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
LAYERS = [
    [child.strip() for child in layer.split("|")] for layer in CONTRACTS["Layers"]["layers"]
]  # from top to bottom


@pytest.fixture(scope="module")
def graph():
    """Imports of the library and of the benchmarks, lazy ones included."""
    return grimp.build_graph("capo", "benchmarks", cache_dir=None)


def child_imports(graph, package: str) -> dict[str, set[str]]:
    """What each direct child of `package` imports, itself or in what it holds: names of other children."""
    children = graph.find_children(package)
    owner = {module: child for child in children for module in (child, *graph.find_descendants(child))}
    return {
        child: {
            owner[imported]
            for module in (child, *graph.find_descendants(child))
            for imported in graph.find_modules_directly_imported_by(module)
            if imported in owner
        }
        - {child}
        for child in children
    }


def cycle(imports: dict[str, set[str]]) -> set[str]:
    """Children that are left when those that import none of the others are taken away, again and again."""
    left = {child: set(others) for child, others in imports.items()}
    while free := {child for child, others in left.items() if not others & left.keys()}:
        left = {child: others for child, others in left.items() if child not in free}
    return set(left)


def test_the_library_has_few_rooms_and_few_layers(graph):
    children = {name.removeprefix("capo.") for name in graph.find_children("capo")}
    assert len(children) <= 25
    assert len(LAYERS) <= 10
    assert sorted(child for layer in LAYERS for child in layer) == sorted(
        children
    )  # every child has one layer


def test_no_arrow_points_upwards(graph):
    height = {f"capo.{child}": -depth for depth, layer in enumerate(LAYERS) for child in layer}
    upwards = {
        (child, other)
        for child, others in child_imports(graph, "capo").items()
        for other in others
        if height[other] >= height[child]  # children of one layer do not know each other either
    }
    assert upwards == set()


def test_no_package_holds_a_cycle(graph):
    packages = {name for name in graph.modules if graph.find_children(name)}
    assert {"capo", "capo.data", "benchmarks"} <= packages
    assert {package: found for package in packages if (found := cycle(child_imports(graph, package)))} == {}


def test_a_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


def test_hydra_is_forbidden_to_every_room_but_cli(graph):
    named = CONTRACTS["Hydra and OmegaConf stay in capo.cli"]["source_modules"]
    assert set(named) == graph.find_children("capo") - {"capo.cli"}


def test_the_library_imports_no_benchmark(graph):
    library = {"capo", *graph.find_descendants("capo")}
    assert not {
        name
        for name in library
        for other in graph.find_modules_directly_imported_by(name)
        if other.split(".")[0] == "benchmarks"
    }
