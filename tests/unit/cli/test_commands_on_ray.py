"""Commands whose pools are filled by engine=ray: what its workers build makes what engine=local makes.

The workers are built here, in this process, from what would be sent to them.
"""

import json
import pickle

import pytest

from capo.backbones.export import export_policy
from capo.backbones.model_card import ModelCard
from capo.cli import evaluate as evaluate_script
from capo.cli import train as train_script
from capo.data.engines.on_ray import RayEngine
from fixtures.policies import tuned


@pytest.fixture
def workers_here(monkeypatch):
    """Lets the engine's workers work in this process; counts the files that they make by pool and stage."""
    made = {}

    def run(engine, stages, progress=True):
        build, orders = pickle.loads(pickle.dumps((engine.build, [stage.order() for stage in stages])))
        for stage, order in zip(stages, orders, strict=True):
            if not (todo := stage.todo()):
                continue
            worker = build(order)
            worker.setup(todo)
            with worker.backbone.placed(*worker.parts):
                for shard in todo:
                    worker.run(shard, lambda count: None)
            assert not stage.todo()
            made[stage.pool.folder.name, stage.name] = len(todo)

    monkeypatch.setattr(RayEngine, "run", run)
    monkeypatch.setattr("capo.data.engines.ray_cluster.find_spec", lambda name: name)  # as if installed
    return made


def files(folder, *kinds):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in kinds and ".locks" not in path.parts
    }


def test_images_of_a_benchmark(tiny_run, tiny_backbone, tmp_path, workers_here):
    policy = export_policy(tiny_backbone, tuned(tiny_backbone), tmp_path / "policy", ModelCard("capo", ""))
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"tag": "a", "prompt": "a red cat"}\n{"tag": "b", "prompt": "a blue dog"}\n')
    for engine in ("local", "ray"):
        folder = tmp_path / engine
        given = [
            "benchmark=geneval",
            f"benchmark.set.path={listed}",
            "benchmark.set.images=2",
            "benchmark.rewards=evaluation.rewards",
            f"policy={policy}",
            f"pool.root={folder / 'pools'}",
            f"engine={engine}",
        ]
        evaluate_script.run(tiny_run("none", *given, config="evaluate"), given, folder / "out")
    assert sorted(stage for _, stage in workers_here) == 2 * ["latents"] + 2 * ["scores"] + 2 * ["text"]
    kinds = (".safetensors", ".parquet", ".png")
    found, expected = (files(tmp_path / engine, *kinds) for engine in ("ray", "local"))
    assert found == expected and len(found) > 12


@pytest.mark.slow
def test_pools_of_a_run_and_of_its_evaluation(tiny_run, tmp_path, workers_here):
    results = []
    for engine in ("local", "ray"):
        root = tmp_path / engine
        train_script.run(tiny_run(f"on-{engine}", f"pool.root={root}", f"engine={engine}", "evaluate=true"))
        results.append(json.loads((tiny_run.folder / f"on-{engine}/evaluation/results.json").read_text()))
    assert len(workers_here) == 5 * 3  # train, validation, test and zero, and the policy's test images
    kinds = (".safetensors", ".parquet")
    found, expected = (files(tmp_path / engine, *kinds) for engine in ("ray", "local"))
    assert found == expected
    assert results[0]["win_rate"] == results[1]["win_rate"]
