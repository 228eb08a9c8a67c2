"""How a batch and a denoiser are shared out over devices."""

import pytest
import torch

from capo.backbones.parallel import compile_blocks, repeated_blocks
from capo.errors import InputError
from capo.runtime.launch import Launch, check_fsdp, check_launch, cluster, device_count, divide, launch


@pytest.mark.parametrize(
    "batch, devices, micro_batch, expected",
    [
        (16, 1, None, (16, 1)),
        (256, 8, None, (32, 1)),
        (256, 8, 4, (4, 8)),
        (256, 1, 4, (4, 64)),
    ],  # 8 x 4 x 8 = 256 = 1 x 4 x 64
)
def test_a_batch_is_divided(batch, devices, micro_batch, expected):
    division = divide(batch, devices, micro_batch)
    assert (division.micro_batch, division.accumulate) == expected
    assert str(divide(256, 8, 4)) == "8 devices x 4 pairs x 8 accumulated"


@pytest.mark.parametrize(
    "batch, devices, micro_batch, remedy",
    [
        (256, 6, None, "multiple of the dev"),
        (16, 1, 5, "1, 2, 4, 8, 16"),
        (4, 8, None, "multiple of the dev"),
        (8, 2, 8, "1, 2, 4"),
    ],
)
def test_what_does_not_come_out_whole_is_refused(batch, devices, micro_batch, remedy):
    with pytest.raises(InputError, match=f"trainer.batch={batch}") as refused:
        divide(batch, devices, micro_batch)
    assert remedy in str(refused.value)


def test_devices_are_counted():
    assert [device_count(devices) for devices in (1, 4, [1, 3], "0,2", "3", "auto", -1)] == [
        1,
        4,
        2,
        2,
        3,
        None,
        None,
    ]


@pytest.mark.parametrize(
    "here, strategy, devices, nodes, remedy",
    [
        (Launch(), "auto", 2, 1, "torchrun --nproc-per-node 2 train.py trainer=ddp"),
        (Launch(), "fsdp", "auto", 2, "torchrun --nproc-per-node N train.py trainer=fsdp"),
        (Launch(0, 2, 0, 2), "auto", 1, 1, "trainer=ddp or trainer=fsdp"),
        (Launch(0, 8, 0, 4), "ddp", "auto", 1, "trainer.num_nodes=2"),
    ],
)
def test_processes_that_do_not_fit_are_refused(here, strategy, devices, nodes, remedy):
    with pytest.raises(InputError) as refused:
        check_launch(here, strategy, devices, nodes)
    assert remedy in str(refused.value)


def test_processes_that_fit_are_not():
    check_launch(Launch(), "ddp", "auto", 1)
    check_launch(Launch(5, 8, 1, 4), "fsdp", "auto", 2)
    with pytest.raises(InputError):
        check_launch(Launch(5, 8, 1, 4), "fsdp", "auto", 1)


@pytest.mark.parametrize(
    "options",
    [
        ("bf16-mixed", "adamw", True),
        ("bf16-mixed", "adamw_8bit", False),
        ("16-mixed", "adamw", False),
        ("bf16-mixed", "adamw", False, True),  # a reference that follows the policy
    ],
)
def test_what_fsdp_does_not_go_with_is_refused(options):
    with pytest.raises(InputError, match="trainer=ddp"):
        check_fsdp("fsdp", *options)
    check_fsdp("ddp", *options)
    check_fsdp("fsdp", "bf16-mixed", "adamw", False)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, Launch()),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Launch()),
        (
            {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"},
            Launch(5, 8, 1, 4),
        ),
        (
            {
                "TORCHELASTIC_RUN_ID": "x",
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
            },
            Launch(3, 4, 1, 2),
        ),
    ],
)
def test_a_process_knows_its_place(monkeypatch, variables, expected):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "TORCHELASTIC_RUN_ID",
        "SLURM_NTASKS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cluster.cache_clear()
    try:
        found = launch()
        assert found == expected and found.first == (expected.rank == 0)
    finally:
        cluster.cache_clear()


def test_a_process_of_another_launcher_does_not_train_by_itself(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for size in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert cluster.__wrapped__() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"WORLD_SIZE=2 says .* neither torchrun nor srun .* or unset it"):
        cluster.__wrapped__()


@pytest.mark.parametrize(
    "variables", [{"SLURM_NTASKS": "abc"}, {"TORCHELASTIC_RUN_ID": "x", "RANK": "a", "WORLD_SIZE": "2"}]
)
def test_a_variable_of_a_launcher_that_is_no_number_is_named(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cluster.cache_clear()
    name = "SLURM_NTASKS=abc" if "SLURM_NTASKS" in variables else "RANK=a"
    try:
        with pytest.raises(
            InputError, match=f"the variable {name}, which a launcher sets, is no whole number"
        ):
            launch()
    finally:
        cluster.cache_clear()


def test_blocks_are_those_that_the_denoiser_names(tiny_backbone):
    blocks = repeated_blocks(tiny_backbone.denoiser)
    assert blocks and {type(block).__name__ for block in blocks} == {"BasicTransformerBlock"}
    whole = repeated_blocks(tiny_backbone.denoiser, "_no_split_modules")
    names = {module: name for name, module in tiny_backbone.denoiser.named_modules()}
    for number, outer in enumerate(whole):  # what lies within another comes before it
        assert all(not names[later].startswith(f"{names[outer]}.") for later in whole[number + 1 :])


def test_each_block_is_compiled_and_nothing_else(tiny_backbone):
    denoiser = tiny_backbone.trainable_copy()
    compile_blocks(denoiser)
    compiled = {
        type(module).__name__ for module in denoiser.modules() if module._compiled_call_impl is not None
    }
    assert compiled == {"BasicTransformerBlock"}
    assert denoiser.state_dict().keys() == tiny_backbone.denoiser.state_dict().keys()
    assert torch.is_tensor(next(denoiser.parameters()))
