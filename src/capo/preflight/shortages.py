"""Find what this machine lacks for a run: disk space, device memory and host memory."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from capo.preflight.memory import ModelStates
from capo.preflight.plan import BOTH, DECODING, REWARDS, SAMPLING, UNCONDITIONAL
from capo.runtime.launch import launch

LESS_HELD = (
    "use an adapter (experiment=lora), trainer=fsdp on several devices, trainer.optimizer=adamw_8bit, "
    "or a larger device"
)
LESS_KEPT = "lower trainer.micro_batch, or set trainer.gradient_checkpointing=true"
HALF_BASE = "store the base in half precision (model.backbone.dtype=float16)"
REMEDIES = {  # part of a phase -> what makes it smaller; any other part is a model state (LESS_HELD)
    "activations": LESS_KEPT,
    SAMPLING: "lower sampling.batch",
    DECODING: "set sampling.decode=1",
    BOTH: "lower sampling.batch, and set sampling.decode=1",
    "denoiser": HALF_BASE,
    "text encoders": HALF_BASE,
    UNCONDITIONAL: "let the policy predict without a prompt too (sampling.unconditional=policy)",
    "policy": (
        "evaluate elsewhere (evaluate=false here, then evaluate.py run=DIR), "
        "or tune an adapter (experiment=lora)"
    ),
}


WHOLE = 1e-9  # parts of a device are added up in floating point


@dataclass(frozen=True)
class Shortage:
    """Something that this machine lacks for a run.

    A run is refused for a `certain` one, with which it cannot succeed; others are only reported in a plan.
    """

    kind: str  # disk, memory, weights, rewards, extras, prompts, configuration, device
    message: str
    certain: bool = True


def readable(size: float | None) -> str:
    """Format bytes in GB or MB (powers of ten); `unknown` for None."""
    if size is None:
        return "unknown"
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def folder_bytes(*folders: Path) -> int:
    """Total bytes of the files in the folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def disk_findings(needs: Mapping[Path, int]) -> list[Shortage]:
    """Compare {folder: bytes still to be written} with the free space; folders on one disk are added up."""
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
                    f"{told}; {readable(free)} are free there: make room, "
                    "or set pool.root and hydra.run.dir to a larger disk",
                )
            )
    return found


def host_bytes() -> int:
    """Memory of this machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _on_gpu(accelerator: str) -> bool:
    return accelerator != "cpu" and torch.cuda.is_available()


def device_bytes(accelerator: str) -> tuple[str, int]:
    """Return name and memory, in bytes, of the device of a run here: the GPU, or the host without one."""
    if _on_gpu(accelerator):
        properties = torch.cuda.get_device_properties(launch().local_rank)
        return properties.name, properties.total_memory
    return "no GPU here: cpu", host_bytes()


def certain_memory(held: ModelStates, accelerator: str) -> list[Shortage]:
    """Report a certain shortage if the model states alone exceed the device's memory."""
    name, there = device_bytes(accelerator)
    if held.total <= there:
        return []
    *parts, last = held.parts
    return [
        Shortage(
            "memory",
            f"{', '.join(parts)} and {last} take {readable(held.total)} on a device, which has "
            f"{readable(there)} ({name}): {LESS_HELD} (plan=true shows the memory of each part)",
        )
    ]


def likely_memory(
    device: Mapping, host: Mapping, accelerator: str, precisions: Sequence[str] = ()
) -> list[Shortage]:
    """Report likely shortages: phases whose estimated memory exceeds that of the device or the host.

    Args:
        device: device memory by phase, as in a plan.
        host: host memory by phase, as in a plan.
        accelerator: `trainer.accelerator`.
        precisions: configuration keys of the precision of rewards that are in float32 and could be in half.
    """
    name, there = device_bytes(accelerator)
    found = []
    if device["peak"] > there:
        phase, part, size = _largest(device)
        found.append(
            Shortage(
                "memory",
                f"the largest phase, {phase}, takes about {readable(device['peak'])} on a device, which has "
                f"{readable(there)} ({name}); its largest part is {part}, {readable(size)}: "
                f"{_remedy(phase, part, precisions)}",
                certain=False,
            )
        )
    on_host = host["peak"] + (0 if _on_gpu(accelerator) else device["peak"])
    if on_host > host_bytes():
        found.append(
            Shortage(
                "memory",
                f"this machine's own memory: about {readable(on_host)} are needed, "
                f"{readable(host_bytes())} are here",
                certain=False,
            )
        )
    return found


def shared_memory(
    device: Mapping, rooms: Mapping[str, tuple[str, float, int | None]], accelerator: str
) -> list[Shortage]:
    """Report a likely shortage if workers that may share one device need more memory than it has.

    Args:
        device: device memory by phase, as in a plan.
        rooms: stage of `engine=ray` -> phase, devices of a worker, and the most workers (None: no limit).
        accelerator: `trainer.accelerator`.
    """
    name, there = device_bytes(accelerator)
    parts = [(share, most, device[phase]["total"]) for phase, share, most in rooms.values()]
    needed, counts = _fullest(parts, 1.0)
    if sum(counts) < 2 or needed <= there:
        return []
    sharing = {stage: count for stage, count in zip(rooms, counts, strict=True) if count}
    told = " and ".join(f"{count} of {stage}" for stage, count in sharing.items())
    keys = ", ".join(f"engine.{stage}.devices" for stage in sharing)
    return [
        Shortage(
            "memory",
            f"workers that may share a device ({told}) take about {readable(needed)}, and it has "
            f"{readable(there)} ({name}): give each a larger part of it ({keys})",
            certain=False,
        )
    ]


def _fullest(parts: Sequence[tuple[float, int | None, float]], free: float) -> tuple[float, tuple[int, ...]]:
    """Return the most bytes that workers hold in the part `free` of a device, and how many of each these are.

    `parts` are share of a worker, the most workers and bytes of each; of the last as many as fit are taken.
    """
    if not parts:
        return 0.0, ()
    (share, most, size), others = parts[0], parts[1:]
    fitting = math.floor(free / share + WHOLE)
    fitting = fitting if most is None else min(fitting, most)
    found = []
    for count in range(fitting + 1) if others else (fitting,):
        held, counts = _fullest(others, free - count * share)
        found.append((count * size + held, (count, *counts)))
    return max(found)


def _largest(phases: Mapping) -> tuple[str, str, float]:
    """Return the phase with the largest total, its largest part, and that part's bytes."""
    parts = {phase: told for phase, told in phases.items() if phase != "peak"}
    phase = max(parts, key=lambda name: parts[name]["total"])
    size, part = max((size, part) for part, size in parts[phase].items() if part != "total")
    return phase, part, size


def _remedy(phase: str, part: str, precisions: Sequence[str]) -> str:
    """Say how to reduce the largest part of a phase."""
    if part == REWARDS:
        half = " ".join(f"{key}=bfloat16" for key in precisions)
        return (
            f"set {half} (half the memory, other scores), or " if half else ""
        ) + "take fewer or smaller rewards"
    remedy = REMEDIES.get(part, LESS_HELD)
    return f"{LESS_KEPT}; or {remedy}" if phase == "training" and remedy == LESS_HELD else remedy
