from omegaconf import OmegaConf

from capo.cli.run_config import ADDED, Progress, open_run, read_config
from fixtures.configuration import composed


def test_a_run_of_an_earlier_version_goes_on_and_has_the_values_it_had(tmp_path):
    cfg = composed("pairs=frs")
    assert open_run(tmp_path, cfg) is Progress.NEW
    path = tmp_path / "config.yaml"
    earlier = OmegaConf.load(path)
    for key in (
        "selection",
        "reference",
        "noise.source",
        "noise.inversion",
        "pairs.depth",
        "model.beta.capo",
    ):
        above, _, name = key.rpartition(".")
        del (OmegaConf.select(earlier, above) if above else earlier)[name]
    OmegaConf.save(earlier, path)
    read = read_config(tmp_path)
    for key in (*ADDED, "pairs.depth"):
        assert OmegaConf.select(read, key) == OmegaConf.select(cfg, key), key
    assert open_run(tmp_path, cfg) is Progress.BEGUN


def test_the_values_of_earlier_runs_are_those_of_the_shipped_configuration():
    cfg = composed()
    for key, value in ADDED.items():
        assert OmegaConf.to_container(OmegaConf.create({"at": OmegaConf.select(cfg, key)}))["at"] == value
