"""What this machine lacks for a run: room on its disks, memory of its device and its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from capo.preflight.memory import ModelStates
from capo.preflight.plan import BOTH, DECODING, REWARDS, SAMPLING
from capo.runtime.launch import launch

LESS_HELD = "use an adapter (experiment=lora), trainer=fsdp on several devices, trainer.optimizer=adamw_8bit, or a larger device"
LESS_KEPT = "lower trainer.micro_batch, or set trainer.gradient_checkpointing=true"
HALF_BASE = "store the base in half (model.backbone.dtype=float16)"
REMEDIES = {  # part of a phase -> what makes it smaller; any other part is held from the first step to the last
    "activations": LESS_KEPT,
    SAMPLING: "lower sampling.batch",
    DECODING: "set sampling.decode=1",
    BOTH: "lower sampling.batch, and set sampling.decode=1",
    "denoiser": HALF_BASE,
    "VAE and text encoders": HALF_BASE,
    "policy": "evaluate elsewhere (evaluate=false here, then evaluate.py run=DIR), or tune an adapter (experiment=lora)",
}


@dataclass(frozen=True)
class Shortage:
    """One thing that is missing here. `certain`: a run cannot succeed with it; others are said by a plan only."""

    kind: str  # disk, memory, weights, rewards, extras, prompts, configuration, device
    message: str
    certain: bool = True


def readable(size: float | None) -> str:
    """Bytes in GB or MB, powers of ten."""
    if size is None:
        return "unknown"
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def free_bytes(folder: Path) -> int:
    """Free space where `folder` lies or will lie."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def folder_bytes(*folders: Path) -> int:
    """What lies in the folders by now."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def disk_findings(needs: Mapping[Path, int]) -> list[Shortage]:
    """Folders with what is still to be written to each, compared with the room on their disks; what shares one adds up."""
    by_disk: dict[int, dict[Path, int]] = {}
    for folder, need in needs.items():
        by_disk.setdefault(_existing(folder).stat().st_dev, {})[folder] = need
    found = []
    for parts in by_disk.values():
        need, free = sum(parts.values()), free_bytes(next(iter(parts)))
        if need > free:
            told = " and ".join(f"{folder} needs {readable(size)}" for folder, size in parts.items() if size)
            found.append(
                Shortage(
                    "disk",
                    f"{told}; {readable(free)} are free there: make room, or set pool.root and hydra.run.dir to a larger disk",
                )
            )
    return found


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _on_gpu(accelerator: str) -> bool:
    return accelerator != "cpu" and torch.cuda.is_available()


def device_bytes(accelerator: str) -> tuple[str, int]:
    """Name and memory of the device that a run takes here: the GPU, or without one this machine's own memory."""
    if _on_gpu(accelerator):
        properties = torch.cuda.get_device_properties(launch().local_rank)
        return properties.name, properties.total_memory
    return "no GPU here: cpu", host_bytes()


def certain_memory(held: ModelStates, accelerator: str) -> list[Shortage]:
    """A finding where weights, gradients, optimizer and reference alone are more than the device has."""
    name, there = device_bytes(accelerator)
    if held.total <= there:
        return []
    return [
        Shortage(
            "memory",
            f"weights, gradients, optimizer and reference take {readable(held.total)} on a device, which has {readable(there)} ({name}): "
            f"{LESS_HELD} (plan=true says what takes what)",
        )
    ]


def likely_memory(
    device: Mapping, host: Mapping, accelerator: str, precisions: Sequence[str] = ()
) -> list[Shortage]:
    """Findings where the plan's largest phase, with its estimates, is more than there is.

    `device`, `host`: of a plan. `precisions`: keys of the precision of each reward that is in float32 and could be in half.
    """
    name, there = device_bytes(accelerator)
    found = []
    if device["peak"] > there:
        phase, part, size = _largest(device)
        found.append(
            Shortage(
                "memory",
                f"the largest phase, {phase}, takes about {readable(device['peak'])} on a device, which has {readable(there)} "
                f"({name}); its largest part is {part}, {readable(size)}: {_remedy(phase, part, precisions)}",
                certain=False,
            )
        )
    on_host = host["peak"] + (0 if _on_gpu(accelerator) else device["peak"])
    if on_host > host_bytes():
        found.append(
            Shortage(
                "memory",
                f"this machine's own memory: about {readable(on_host)} are needed, {readable(host_bytes())} are here",
                certain=False,
            )
        )
    return found


def _largest(phases: Mapping) -> tuple[str, str, float]:
    """The phase that takes most, its largest part, and the bytes of that."""
    parts = {phase: told for phase, told in phases.items() if phase != "peak"}
    phase = max(parts, key=lambda name: parts[name]["total"])
    size, part = max((size, part) for part, size in parts[phase].items() if part != "total")
    return phase, part, size


def _remedy(phase: str, part: str, precisions: Sequence[str]) -> str:
    """What makes the largest part of a phase smaller."""
    if part == REWARDS:
        half = " ".join(f"{key}=bfloat16" for key in precisions)
        return (
            f"set {half} (half the memory, other scores), or " if half else ""
        ) + "take fewer or smaller rewards"
    remedy = REMEDIES.get(part, LESS_HELD)
    return f"{LESS_KEPT}; or {remedy}" if phase == "training" and remedy == LESS_HELD else remedy
