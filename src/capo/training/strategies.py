"""A batch over devices, and a denoiser over devices: accumulation, repeated blocks, sharding, Lightning's strategies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from capo.runtime.launch import AUTO, FSDP

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose checkpoint is the one file that every other strategy writes, optimizer included.

    Lightning numbers the optimizer's state by all parameters; a LoRA policy trains some of them, and a plain optimizer
    numbers its own.
    """

    def __init__(self, processes: int):
        super().__init__(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, object]:
        """The whole state on the first process, by numbers as a plain optimizer has it; empty on the others."""
        plain = getattr(optimizer, "_optimizer", optimizer)
        found = get_optimizer_state_dict(self.model, plain, options=WHOLE)
        if self.global_rank:
            return {}
        numbers = {name: number for number, name in enumerate(self._trained())}
        groups = [
            {**group, "params": [numbers[name] for name in group["params"]]}
            for group in found["param_groups"]
        ]
        return {
            "state": {numbers[name]: state for name, state in found["state"].items()},
            "param_groups": groups,
        }

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, object]:
        """Weights and optimizer into their shards; the rest of the checkpoint is returned."""
        checkpoint = torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=weights_only)
        # not strict: what LoRA leaves frozen is in no checkpoint
        set_model_state_dict(
            self.model,
            checkpoint.pop("state_dict"),
            options=StateDictOptions(full_state_dict=True, strict=False),
        )
        names = self._trained()
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(
                self.model, optimizer, _by_name(state, names), options=StateDictOptions(full_state_dict=True)
            )
        return checkpoint

    def _trained(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]


def _by_name(state: Mapping[str, object], names: list[str]) -> dict[str, object]:
    groups = [
        {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
    ]
    return {
        "state": {names[number]: moments for number, moments in state["state"].items()},
        "param_groups": groups,
    }


def make_strategy(name: str, processes: int) -> Strategy | str:
    """Lightning's strategy for that many processes; for one alone its plain one, whatever the name."""
    if processes == 1:
        return AUTO
    if name == FSDP:
        return ShardedStrategy(processes)
    # gradients lie in the buckets that are reduced: no second copy of them
    return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
