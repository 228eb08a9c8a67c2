"""Peak arithmetic of devices, by the names under which torch knows them."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

H100 = "NVIDIA H100 80GB HBM3"
# Name (the whole of it: a part of a device, or a laptop's chip, has another peak) -> FLOP/s of dense bf16
# products with sums in float32. The figures are those of NVIDIA's data sheets, most of which print them with
# sparsity, which is twice as much; for GeForce, of the white papers of GA102, Ada and RTX Blackwell; for
# Instinct, of AMD's data sheet. Chips without bf16 units (V100, T4) are left out.
DENSE_BF16 = {
    r"NVIDIA A100-(SXM4|PCIE)-[48]0GB|NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA A30": 165e12,
    r"NVIDIA A40": 149.7e12,
    r"NVIDIA A10": 125e12,
    r"NVIDIA RTX A6000": 154.8e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA L40": 181e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA GeForce RTX 4090": 165.2e12,
    r"NVIDIA H100 80GB HBM3|NVIDIA H200|NVIDIA GH200 480GB": 989.4e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": 835.5e12,
    r"NVIDIA B200": 2250e12,
    r"NVIDIA GeForce RTX 5090": 209.5e12,
    r"AMD Instinct MI300X": 1307.4e12,
}


def bf16_peak(name: str) -> float | None:
    """Return the FLOP/s of dense bf16 products of the device `name`, or None if it is not in `DENSE_BF16`."""
    return next((peak for pattern, peak in DENSE_BF16.items() if re.fullmatch(pattern, name)), None)


def cpu_name() -> str:
    """Name of this machine's processor, as far as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    told = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(told), "") or platform.processor() or platform.machine()


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device, and whose they are, in words; `assumed`: of a device that is not this one."""

    flops: float
    of: str
    assumed: bool = False


def peak_of(configured: float | None, name: str | None) -> Peak:
    """Return the peak that a plan counts with.

    Args:
        configured: `planning.flops`, which comes first; None: the device's own.
        name: name of the GPU of this machine; None: there is none. Without a known peak an H100's is assumed.
    """
    if configured is not None:
        return Peak(configured, "planning.flops")
    if name is not None and (peak := bf16_peak(name)):
        return Peak(peak, name)
    reason = f"the peak of {name} is not known" if name else "there is no GPU"
    assumed = bf16_peak(H100)
    assert assumed is not None  # it is in the table
    return Peak(assumed, f"an H100 SXM, since {reason} here: planning.flops=NUMBER", assumed=True)
