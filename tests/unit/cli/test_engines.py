import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from capo.cli import engines
from capo.cli.build import build_components
from capo.cli.engines import StageBuilder, check_engine, engine_of
from capo.data.engines import LocalEngine
from capo.data.engines.on_ray import RayEngine, tasks_of
from capo.data.engines.schedule import Room
from capo.data.generation import fill_pool, open_pool, stages_of
from capo.errors import InputError
from capo.runtime.launch import Launch
from fixtures.configuration import composed


def test_the_engine_is_local_unless_chosen():
    assert engine_of(composed()) == LocalEngine()
    stored = composed()
    del stored.engine  # a run of an earlier version
    assert engine_of(stored) == LocalEngine()


def test_the_engine_of_ray_has_the_configured_rooms():
    cfg = composed("engine=ray", "engine.scores.devices=0.25", "engine.latents.workers=7", "threads=3")
    found = engine_of(cfg, Path("policy"))
    assert isinstance(found, RayEngine)
    assert found.rooms == {"text": Room(1.0, 1), "latents": Room(1.0, 7), "scores": Room(0.25, None)}
    assert (found.address, found.attempts, found.start_limit, found.threads) == ("local", 3, 1800, 3)
    assert found.build.policy == str(Path("policy").absolute())


def test_ray_is_refused_under_a_launcher_and_without_its_package(monkeypatch):
    check_engine(composed())
    monkeypatch.setattr("capo.data.engines.ray_cluster.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"engine=ray needs the extra `ray`: pip install -e '\.\[ray\]'"):
        check_engine(composed("engine=ray"))
    monkeypatch.setattr("capo.data.engines.ray_cluster.find_spec", lambda name: name)
    check_engine(composed("engine=ray"))
    monkeypatch.setattr(engines, "launch", lambda: Launch(0, 2, 0, 2))
    with pytest.raises(InputError, match="engine=ray with 2 processes of a launcher"):
        check_engine(composed("engine=ray"))


def test_nothing_imports_ray_until_an_engine_of_it_runs(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)  # of another test
    monkeypatch.delitem(sys.modules, "capo.data.engines.on_ray")
    monkeypatch.delitem(sys.modules, "capo.cli.generate", raising=False)
    importlib.import_module("capo.cli.generate")
    engine_of(composed("engine=ray"))
    assert "capo.data.engines.on_ray" in sys.modules and "ray" not in sys.modules


@pytest.fixture
def pool_of(tiny_run, tmp_path):
    """A new pool of a tiny run, its stages, and the builder of the workers."""
    cfg = tiny_run("text", f"pool.root={tmp_path / 'pools'}", "pool.candidates=2")
    components = build_components(cfg)
    spec = replace(components.pool_specs["validation"], candidates=2)
    pool = open_pool(spec, components.generator)
    rewards = components.judges["validation"]
    stages = stages_of(pool, spec, components.generator, rewards, verify=True)
    expected = fill_pool(
        replace(spec, root=tmp_path / "local"), components.generator, rewards, progress=False
    )
    cfg.run_dir = str(tmp_path / "run")
    return pool, stages, StageBuilder(OmegaConf.to_yaml(cfg, resolve=True), None, 1), expected


def files(pool):
    return {
        str(path.relative_to(pool.folder)): path.read_bytes()
        for path in pool.folder.rglob("*.*")
        if path.is_file() and ".locks" not in path.parts
    }


def test_workers_build_stages_that_make_the_same_files(pool_of):
    pool, stages, build, expected = pool_of
    for stage in stages:
        worker = build(stage.order())
        todo = stage.todo()
        worker.setup(todo)
        with worker.backbone.placed(*worker.parts):
            for shard in todo:
                assert worker.missing(shard.row)
                worker.run(shard, lambda count: None)
        assert not stage.todo()
    assert files(pool) == files(expected)


def test_a_worker_refuses_another_pool_and_other_weights(pool_of):
    pool, stages, build, _ = pool_of
    text, latents, _ = (stage.order() for stage in stages)
    with pytest.raises(InputError, match=r"seed is 0, this configuration has 9.*all machines share"):
        build(replace(text, manifest=replace(text.manifest, seed=9)))
    with pytest.raises(InputError, match=r"is not a pool.*all machines share"):
        build(replace(text, folder=pool.folder.with_name("nothing")))
    path = pool.folder / "manifest.json"
    path.write_text(path.read_text().replace(pool.manifest.generator, "0" * 64))
    with pytest.raises(
        InputError, match=r"generator of the model loaded here has the fingerprint \w{8}, the pool's is 0{8}"
    ):
        build(replace(latents, manifest=replace(latents.manifest, generator="0" * 64)))


def test_a_shard_needs_that_of_the_stage_before(pool_of):
    _, stages, _, _ = pool_of
    tasks = tasks_of({stage.name: stage.todo() for stage in stages})
    for task in tasks["latents"]:
        assert task.needs is not None and (task.needs.stage, task.needs.row) == ("text", task.row)
    for task, drawn in zip(tasks["scores"], tasks["latents"], strict=True):
        assert task.needs is drawn
    there = tasks_of({"latents": [], "scores": stages[2].todo()})
    assert [task.needs for task in there["scores"]] == [None] * len(tasks["scores"])
