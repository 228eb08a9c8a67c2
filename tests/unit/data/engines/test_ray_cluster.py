"""What the driver makes of a cluster's resources, without Ray."""

from types import SimpleNamespace

import pytest

from capo.data.engines.ray_cluster import RayCluster
from capo.data.engines.schedule import Room
from capo.errors import InputError


def cluster(resources, devices=1.0):
    ray = SimpleNamespace(cluster_resources=lambda: resources)
    return RayCluster(ray, lambda stage, options: None, {"latents": Room(devices)}, 2, 60.0)


def test_devices_are_gpus_or_groups_of_cores():
    assert cluster({"GPU": 3.0, "CPU": 16.0}).devices() == 3
    assert cluster({"CPU": 7.0}).devices() == 3  # of two cores
    with pytest.raises(InputError, match=r"engine.latents.devices=4, but the Ray cluster has 3 GPUs"):
        cluster({"GPU": 3.0, "CPU": 16.0}, devices=4).check()


def test_several_models_of_gpu_are_named(caplog):
    cluster({"GPU": 8.0, "accelerator_type:H100": 1.0}).check()
    assert not caplog.records
    cluster({"GPU": 8.0, "accelerator_type:H100": 1.0, "accelerator_type:A100": 2.0}).check()
    assert "GPUs of several models (A100, H100): a shard depends" in caplog.text
