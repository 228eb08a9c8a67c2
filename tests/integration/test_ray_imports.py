"""Images that are imported, encoded by workers on a Ray cluster of this machine: real processes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from capo.cli import generate as generate_script
from capo.cli.engines import StageBuilder
from capo.data.engines.on_ray import RayEngine
from capo.data.importing.filling import EncodeStage
from capo.data.pool.import_table import is_imported
from capo.errors import Unfinished
from fixtures.pictures import write_pictures
from fixtures.ray_clusters import MARKS, ray_cluster

pytestmark = MARKS


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_cluster(2) as ray:
        yield ray


@pytest.fixture
def bring_in(tiny_run, tmp_path, monkeypatch):
    """Imports four captions of two images each by an engine; gives the pool's folder."""
    write_pictures(tmp_path / "pictures", 8)
    monkeypatch.chdir(tmp_path)

    def run(engine: str) -> Path:
        values = ["stage=import", "import=folder", "import.files=pictures", "pool.prompts_per_shard=2"]
        root = tmp_path / engine
        cfg = tiny_run("unused", *values, f"engine={engine}", f"pool.root={root}", config="generate")
        OmegaConf.update(cfg, "run_dir", str(tmp_path))
        generate_script.run(cfg)
        return next(folder for folder in root.iterdir() if is_imported(folder))

    return run


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(*given):
    raise AssertionError("the driver encodes nothing")


def test_the_pool_is_the_same_to_the_byte(bring_in, monkeypatch):
    expected = contents(bring_in("local"))
    monkeypatch.setattr(EncodeStage, "run", refused)
    found = contents(bring_in("ray"))
    assert found == expected and len([name for name in found if name.startswith("latents")]) == 2


def test_a_worker_names_the_image_that_it_does_not_see(bring_in, tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Blind:
        """Builds stages on a machine that lacks an image."""

        build: StageBuilder
        lacks: Path

        def __call__(self, order):
            self.lacks.unlink(missing_ok=True)
            return self.build(order)

    def blind(engine, stages, progress=True):
        object.__setattr__(engine, "build", Blind(engine.build, tmp_path / "pictures" / "6.png"))
        return run(engine, stages, progress)

    run = RayEngine.run
    monkeypatch.setattr(RayEngine, "run", blind)
    said = r"2 of 4 files are made; 2 failed\n  latents 00000-00: no worker can start: this machine does not "
    with pytest.raises(Unfinished, match=said + rf"see {tmp_path / 'pictures' / '6.png'} \(metadata.csv row"):
        bring_in("ray")
