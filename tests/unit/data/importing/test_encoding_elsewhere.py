"""Images that another process encodes than the one that looked through their source."""

import pickle
from pathlib import Path

import pytest
import torch

from capo.backbones.sampling import SamplerSettings
from capo.cli import generate as generate_script
from capo.cli.engines import StageBuilder
from capo.data.engines import LocalEngine
from capo.data.engines.on_ray import RayEngine
from capo.data.importing import folder
from capo.data.importing.filling import EncodeOrder, EncodeStage, import_pool, ordered_stage
from capo.data.pool import Pool
from capo.errors import InputError
from fixtures.pictures import write_pictures

SETTINGS = SamplerSettings(steps=2, guidance=1.0, batch=2)


class Kept:
    """An engine that keeps the stages and makes what they lack."""

    def run(self, stages, progress=True):
        self.stages = stages
        LocalEngine().run(stages, progress)


@pytest.fixture
def encoding(tmp_path, tiny_backbone, monkeypatch):
    """The order of a pool with three captions of two images each, whose paths are relative."""
    write_pictures(tmp_path / "pictures", 6)
    monkeypatch.chdir(tmp_path)
    engine = Kept()
    pool = import_pool(
        folder("pictures"),
        tiny_backbone,
        SETTINGS,
        Path("pools"),
        "tiny",
        prompts_per_shard=2,
        progress=False,
        engine=engine,
    )
    sent = pickle.dumps(next(stage.order() for stage in engine.stages if isinstance(stage, EncodeStage)))
    monkeypatch.chdir("/")  # as a worker: somewhere else
    order = pickle.loads(sent)
    return order, Pool.open(order.folder), pool.manifest


def test_it_makes_the_same_latents(encoding, tiny_backbone):
    order, pool, manifest = encoding
    assert (order.stage, order.candidates, order.manifest) == ("latents", 2, manifest)
    before = {shard: pool.read_latents(shard) for shard in pool.shards(2)}
    stage = ordered_stage(order, pool, tiny_backbone, SETTINGS)
    stage.setup(list(before))
    for shard, latents in before.items():
        file = pool.folder / "latents" / f"{shard.name}.safetensors"
        there = file.read_bytes()
        file.unlink()
        assert stage.missing(shard.row) == [shard]
        stage.run(shard, lambda count: None)
        assert file.read_bytes() == there and torch.equal(pool.read_latents(shard), latents)


def test_what_it_does_not_see_is_named(encoding, tiny_backbone, tmp_path):
    order, pool, _ = encoding
    shared = "a folder that all machines see under one name, or import with engine=local"
    table, image = tmp_path / "pictures" / "metadata.csv", tmp_path / "pictures" / "1.png"
    stage, shards = ordered_stage(order, pool, tiny_backbone, SETTINGS), pool.shards(2)
    stage.setup(shards)
    image.unlink()
    with pytest.raises(InputError, match=rf"does not see {image} \(metadata.csv row 2, .*{shared}"):
        stage.setup(shards)
    stage.setup(shards[1:])  # a worker looks for the images of one shard
    with pytest.raises(InputError, match=rf"row 2, image 1 could be read .*restore it, or .*{shared}"):
        stage.run(shards[0], lambda count: None)
    size = table.stat().st_size
    table.write_text(table.read_text() + "\n")
    with pytest.raises(InputError, match=rf"{table} has {size + 1} bytes on this machine, {size} where"):
        stage.setup(shards[1:])
    table.unlink()
    with pytest.raises(InputError, match=rf"this machine does not see {table} \(.*No such file.*{shared}"):
        stage.setup(shards[1:])


def test_workers_of_ray_get_captions_and_images_and_load_no_denoiser(tiny_run, tmp_path, monkeypatch):
    write_pictures(tmp_path / "pictures", 6)
    built = []

    def run(engine, stages, progress=True):
        assert isinstance(engine.build, StageBuilder)
        for stage in stages:
            if order := stage.order():
                worker = engine.build(order)
                built.append((type(order), worker))
                for shard in stage.todo():
                    worker.run(shard, lambda count: None)
        LocalEngine().run(stages, progress)

    monkeypatch.setattr(RayEngine, "run", run)
    monkeypatch.setattr("capo.data.engines.ray_cluster.find_spec", lambda name: name)  # as if installed
    values = ["stage=import", "import=folder", f"import.files={tmp_path / 'pictures'}", "engine=ray"]
    cfg = tiny_run("unused", *values, f"pool.root={tmp_path}", config="generate")
    generate_script.run(cfg)
    (_, text), (kind, encoder) = built
    assert kind is EncodeOrder and isinstance(encoder, EncodeStage) and encoder.away
    assert text.name == "text" and all(weight.is_meta for weight in encoder.backbone.denoiser.parameters())


def test_ray_is_asked_for_before_the_images_are_read(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("capo.data.engines.ray_cluster.find_spec", lambda name: None)
    values = ["stage=import", "import=folder", f"import.files={tmp_path}", "engine=ray"]
    with pytest.raises(InputError, match="engine=ray needs the extra `ray`"):
        generate_script.run(tiny_run("unused", *values, config="generate"))
