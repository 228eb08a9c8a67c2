"""Which device a process takes."""

import pytest
import torch

from capo.errors import InputError
from capo.runtime import processes
from capo.runtime.launch import Launch
from capo.runtime.processes import own_device


@pytest.fixture
def machine(monkeypatch):
    """A machine with GPUs, on which this process has a place; the devices that it selected."""

    def make(gpus: int, here: Launch) -> list[torch.device]:
        selected = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", selected.append)
        monkeypatch.setattr(processes, "launch", lambda: here)
        return selected

    return make


@pytest.mark.parametrize("place", [Launch(), Launch(3, 8, 3, 4), Launch(7, 8, 3, 4)])
def test_each_process_takes_the_gpu_of_its_local_rank(machine, place):
    selected = machine(4, place)
    device = torch.device("cuda", place.local_rank)
    assert own_device("auto") == device and selected == [device]


def test_the_cpu_is_taken_without_a_gpu_or_on_request(machine):
    assert machine(0, Launch(1, 2, 1, 2)) == [] and own_device("auto") == torch.device("cpu")
    assert machine(2, Launch(1, 2, 1, 2)) == [] and own_device("cpu") == torch.device("cpu")


def test_more_processes_than_gpus_are_refused(machine):
    machine(1, Launch(1, 2, 1, 2))
    with pytest.raises(
        InputError, match="2 processes were started on a machine with 1 GPU: start at most one"
    ):
        own_device("auto")
