"""The house in numbers: rooms, layers, arrows and cycles, over import-linter's own graph."""

import tomllib

import grimp
import pytest

from fixtures import ROOT

CONTRACTS = {
    contract["name"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
LAYERS = [
    [room.strip() for room in layer.split("|")] for layer in CONTRACTS["Layers"]["layers"]
]  # from top to bottom


@pytest.fixture(scope="module")
def graph():
    """Imports of the library and of the benchmarks, lazy ones included."""
    return grimp.build_graph("capo", "benchmarks", cache_dir=None)


def room_imports(graph, package: str) -> dict[str, set[str]]:
    """What each direct child of `package` imports, itself or in what it holds: names of other children."""
    rooms = graph.find_children(package)
    owner = {module: room for room in rooms for module in (room, *graph.find_descendants(room))}
    return {
        room: {
            owner[imported]
            for module in (room, *graph.find_descendants(room))
            for imported in graph.find_modules_directly_imported_by(module)
            if imported in owner
        }
        - {room}
        for room in rooms
    }


def cycle(imports: dict[str, set[str]]) -> set[str]:
    """Children that are left when those that import none of the others are taken away, again and again."""
    left = {room: set(others) for room, others in imports.items()}
    while free := {room for room, others in left.items() if not others & left.keys()}:
        left = {room: others for room, others in left.items() if room not in free}
    return set(left)


def test_the_library_has_few_rooms_and_few_layers(graph):
    rooms = {name.removeprefix("capo.") for name in graph.find_children("capo")}
    assert len(rooms) <= 25
    assert len(LAYERS) <= 10
    assert sorted(room for layer in LAYERS for room in layer) == sorted(rooms)  # every room has one layer


def test_no_arrow_points_upwards(graph):
    height = {f"capo.{room}": -depth for depth, layer in enumerate(LAYERS) for room in layer}
    upwards = {
        (room, other)
        for room, others in room_imports(graph, "capo").items()
        for other in others
        if height[other] >= height[room]  # rooms of one layer do not know each other either
    }
    assert upwards == set()


def test_no_package_holds_a_cycle(graph):
    packages = {name for name in graph.modules if graph.find_children(name)}
    assert {"capo", "capo.data", "benchmarks"} <= packages
    assert {package: found for package in packages if (found := cycle(room_imports(graph, package)))} == {}


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
        if "benchmarks" in other
    }
