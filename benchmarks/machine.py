"""The machine that a benchmark runs on: its name, its peak by the vendor's word and as measured, its clock and its memory."""

from __future__ import annotations

import gc
import time

import torch

# FLOP/s of dense bf16 products by the vendors' data sheets (without sparsity), by what the driver calls the device
DENSE_BF16 = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12, "A100": 312e12}
OTHERS = ("NVL", "PCIe H100", "GH200")  # the same letters, other chips or limits


def vendor_peak(name: str) -> float | None:
    """FLOP/s of the device called `name`; None where no data sheet is noted here."""
    if any(other in name for other in OTHERS):
        return None
    return next((peak for part, peak in DENSE_BF16.items() if part in name), None)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(device: torch.device, side: int = 8192, products: int = 10) -> float:
    """FLOP/s of `side`^3 products of random bf16 matrices, the mean of `products` after three that warm up."""
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        one @ other
    start = now(device)
    for _ in range(products):
        one @ other
    return products * 2 * side**3 / (now(device) - start)


def facts(device: torch.device, side: int) -> dict[str, object]:
    """What a table of figures has to say of the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {
        "device": name,
        "memory_bytes": memory,
        "torch": torch.__version__,
        "peak_flops": vendor_peak(name),
        "matmul_flops": matmul_rate(device, side),
        "matmul_side": side,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


def forget_peak(device: torch.device) -> None:
    """The peak counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that tensors held since `forget_peak`; None where that is not known (CPU)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """What nobody holds any more goes back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
