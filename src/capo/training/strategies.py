"""Lightning strategies for training on several devices: DDP, and FSDP2 with unsharded checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
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
    """FSDP2 with the single-file checkpoint that all other strategies write, optimizer state included.

    Lightning's version numbers the optimizer state by all parameters of the model, whereas a plain optimizer
    numbers only those it trains; for a LoRA policy the two differ. This class uses the plain numbering.
    """

    def __init__(self, processes: int):
        super().__init__(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather the unsharded state on the first process, numbered as by a plain optimizer; elsewhere {}."""
        plain = getattr(optimizer, "_optimizer", optimizer)
        # torch types the values of a state as whatever a checkpoint can hold
        found: Any = get_optimizer_state_dict(self._network(), plain, options=WHOLE)
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
    ) -> dict[str, Any]:
        """Load weights and optimizer state into their shards; return the checkpoint without the weights."""
        checkpoint = torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=weights_only)
        # not strict: parameters that LoRA leaves frozen are not in the checkpoint
        set_model_state_dict(
            self._network(),
            checkpoint.pop("state_dict"),
            options=StateDictOptions(full_state_dict=True, strict=False),
        )
        names = self._trained()
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(
                self._network(),
                optimizer,
                _by_name(state, names),
                options=StateDictOptions(full_state_dict=True),
            )
        return checkpoint

    def _network(self) -> nn.Module:
        """The module that is trained; Lightning sets it before it asks for any state."""
        assert self.model is not None
        return self.model

    def _trained(self) -> list[str]:
        return [name for name, parameter in self._network().named_parameters() if parameter.requires_grad]


def _by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    groups = [
        {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
    ]
    return {
        "state": {names[number]: moments for number, moments in state["state"].items()},
        "param_groups": groups,
    }


def make_strategy(name: str, processes: int) -> Strategy | str:
    """Return Lightning's strategy for `processes`; with a single process always the automatic one."""
    if processes == 1:
        return AUTO
    if name == FSDP:
        return ShardedStrategy(processes)
    # gradients are views of the all-reduce buckets, which saves a second copy of them
    return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
