"""Which device a process takes, and what processes compute together."""

import multiprocessing

import pytest
import torch
from torch import distributed

from capo.errors import InputError
from capo.runtime import processes
from capo.runtime.launch import Launch
from capo.runtime.processes import check_accelerator, check_devices, mean_over_processes, own_device


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


def test_an_accelerator_that_is_not_here_is_refused(machine, monkeypatch):
    for gpus, mps, there in ((0, False, set()), (2, False, {"cuda", "gpu"}), (0, True, {"mps", "gpu"})):
        machine(gpus, Launch())
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        for accelerator in ("auto", "cpu", *there):
            check_accelerator(accelerator)
        for accelerator in {"cuda", "gpu", "mps", "tpu"} - there:
            with pytest.raises(InputError, match=f"trainer.accelerator={accelerator}: .* but .*cpu; auto"):
                check_accelerator(accelerator)


def test_devices_that_are_not_here_are_refused(machine):
    machine(2, Launch())
    for devices in (1, -1, "auto", [0], [1, 0], "0,1", "1", 8):
        check_devices("auto", devices)
    for devices in ([7], [0, 2], "0,2", [1, 1]):
        with pytest.raises(InputError, match=r"trainer.devices=.*: the GPUs of this machine are 0 to 1"):
            check_devices("auto", devices)
    for devices, seen, count in (([1], "1", 1), ("1,2", "1,2", 2), ([2, 1], "2,1", 2)):
        machine(3, Launch())
        with pytest.raises(InputError) as refused:
            check_devices("auto", devices)
        remedy = f"start with CUDA_VISIBLE_DEVICES={seen}, and give trainer.devices={count}"
        assert f"trainer.devices={devices}: training would use other GPUs" in str(refused.value)
        assert str(refused.value).endswith(remedy)
    with pytest.raises(InputError, match=r"trainer.devices=\[0\]: numbers name GPUs, but there is none"):
        check_devices("cpu", [0])
    machine(0, Launch())
    check_devices("auto", 1)
    with pytest.raises(InputError, match=r"trainer.devices=\[7\]: numbers name GPUs.*trainer.devices=1"):
        check_devices("auto", [7])


def _mean_of_own_rank(folder: str, rank: int, told) -> None:
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    value = torch.tensor([rank, 10.0], requires_grad=True)
    mean = mean_over_processes(value)
    told.put((mean.tolist(), mean.requires_grad, value.tolist()))
    distributed.destroy_process_group()


def test_a_mean_is_over_all_processes_and_over_one_alone(tmp_path):
    context = multiprocessing.get_context("fork")  # which need not import torch again
    told = context.Queue()
    ranks = [context.Process(target=_mean_of_own_rank, args=(str(tmp_path), rank, told)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    found = sorted(told.get(timeout=600) for _ in ranks)
    for process in ranks:
        process.join(600)
    assert found == [([0.5, 10.0], False, [0.0, 10.0]), ([0.5, 10.0], False, [1.0, 10.0])]
    alone = torch.tensor([3.0])
    assert mean_over_processes(alone) is alone
