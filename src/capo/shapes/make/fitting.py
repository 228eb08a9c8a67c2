"""Resumable training loop shared by all learned parts of the shapes world."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from capo.runtime.files import whole_file
from capo.shapes.make import PLACE
from capo.shapes.make.muon import Muon

Network = TypeVar("Network", bound=nn.Module)


def warm_cosine(step: int, steps: int, warm_up: int = 50, hold: float = 0.4) -> float:
    """Return the factor of the learning rate at a step.

    It rises linearly for `warm_up` steps, is constant up to the share `hold` of the steps, then falls as
    a cosine to zero.
    """
    if step < warm_up:
        return (step + 1) / warm_up
    done = max(0.0, (step / steps - hold) / (1 - hold))
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Average:
    """Exponential moving average of a module's parameters, with a horizon that grows with the step."""

    def __init__(self, module: nn.Module, horizon: int = 1500):
        self.horizon, self.shadow = horizon, {n: p.detach().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take up the module's parameters after step number `step`."""
        weight = 1 / min(self.horizon, step / 5 + 1)
        for name, parameter in module.named_parameters():
            self.shadow[name].lerp_(parameter, weight)


def fit(
    name: str,
    module: Network,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    work: Path,
    steps: int,
    lr: float,
    average: bool = False,
    save_every: float = 60.0,
    matrices: Collection[nn.Parameter] = (),
) -> Network:
    """Minimize `loss(step)` over the trainable parameters of `module`, with gradients clipped at norm 1.

    `loss` returns the loss and figures to log. It must depend on the step alone (draw from a generator
    seeded by it), so that a resumed run repeats an uninterrupted one. Under torchrun each process
    computes the loss of its `share` of the batch, and gradients are averaged.

    Args:
        name: of the state `work/<name>.pt` and of `work/<name>.json`, the record of steps and seconds.
        module: to train; its state is loaded from `work/<name>.pt` if that exists.
        work, steps: folder of states; number of steps of the whole run.
        lr: highest learning rate of AdamW, which follows `warm_cosine`.
        average: whether to return the module with averaged weights.
        save_every: seconds between saves.
        matrices: parameters trained by Muon instead, at twice the rate.

    Returns:
        The module in eval mode.
    """
    rank, processes = process()
    optimizers = _optimizers(module, matrices, lr)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    mean = Average(module) if average else None
    path = work / f"{name}.pt"
    start, spent = _resume(path, module, optimizers, mean) if path.exists() else (0, 0.0)
    begun = last = time.monotonic()
    module.train()
    for step in range(start, steps):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * warm_cosine(step, steps)
        value, parts = loss(step)
        _update(module, value, optimizers, processes)
        if mean:
            mean.update(module, step)
        if step % 200 == 0 and rank == 0:
            told = " ".join(f"{key} {figure:.4f}" for key, figure in {"loss": value.item(), **parts}.items())
            print(f"{name} {step}/{steps} {told} {spent + time.monotonic() - begun:.0f} s", flush=True)
        if rank == 0 and (time.monotonic() - last > save_every or step + 1 == steps):
            last = time.monotonic()
            _save(path, module, optimizers, mean, step + 1, spent + last - begun)
    if mean:
        module.load_state_dict({**module.state_dict(), **mean.shadow})
    return module.eval()


def _update(
    module: nn.Module, value: Tensor, optimizers: list[torch.optim.Optimizer], processes: int
) -> None:
    module.zero_grad(set_to_none=True)
    value.backward()
    if processes > 1:
        _average_gradients(module, processes)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def stratified(batch: int, draw: torch.Generator) -> Tensor:
    """Draw numbers (batch,), one in each of as many equal parts of [0, 1), in random order."""
    u = (torch.rand(batch, generator=draw) + torch.arange(batch)) / batch
    return u[torch.randperm(batch, generator=draw)]


def process() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(batch: int) -> slice:
    """Return the rows of a batch that this process computes."""
    rank, processes = process()
    return slice(rank * batch // processes, (rank + 1) * batch // processes)


def _average_gradients(module: nn.Module, processes: int) -> None:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat / processes, gradients)


def _optimizers(
    module: nn.Module, matrices: Collection[nn.Parameter], lr: float
) -> list[torch.optim.Optimizer]:
    chosen = {id(parameter) for parameter in matrices}
    rest = [
        parameter
        for parameter in module.parameters()
        if parameter.requires_grad and id(parameter) not in chosen
    ]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return [adam, Muon(matrices, lr=2 * lr)] if matrices else [adam]


def _resume(
    path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer], mean: Average | None
) -> tuple[int, float]:
    """Load what `_save` saved; return the number of finished steps and the seconds they took."""
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    for optimizer, stored in zip(optimizers, state["optimisers"], strict=True):
        optimizer.load_state_dict(stored)
    if mean:
        mean.shadow = state["average"]
    return state["step"], state["seconds"]


def _save(
    path: Path,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    mean: Average | None,
    step: int,
    seconds: float,
) -> None:
    state = {
        "module": module.state_dict(),
        "optimisers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "seconds": seconds,
    }
    if mean:
        state["average"] = mean.shadow
    with whole_file(path, PLACE) as part:
        torch.save(state, part)
    path.with_suffix(".json").write_text(json.dumps({"steps": step, "seconds": round(seconds)}))


def generator(*key: int) -> torch.Generator:
    """Make a generator seeded by `key` alone."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part) % (2**63)
    return torch.Generator().manual_seed(seed)
