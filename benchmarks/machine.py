"""Facts about the machine of a benchmark: device name, nominal and measured peak, clock and memory."""

from __future__ import annotations

import gc
import threading
import time

import torch

from capo.preflight.devices import bf16_peak


def now(device: torch.device) -> float:
    """Time in seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(device: torch.device, side: int = 8192, products: int = 10) -> float:
    """Measured FLOP/s of a product of random bf16 matrices (`side`, `side`).

    It is the mean over `products` products after three for warm-up.
    """
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.matmul(one, other)
    start = now(device)
    for _ in range(products):
        torch.matmul(one, other)
    return products * 2 * side**3 / (now(device) - start)


def facts(device: torch.device) -> dict[str, object]:
    """Facts about the machine that belong to a table of results."""
    side = 8192 if device.type == "cuda" else 256
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {
        "device": name,
        "memory_bytes": memory,
        "torch": torch.__version__,
        "peak_flops": bf16_peak(name),
        "matmul_flops": matmul_rate(device, side),
        "matmul_side": side,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


class Waits:
    """Measures, within a block, the share of the time in which a device had nothing to do (`share`).

    A GPU's queue is looked up every 2 ms. On a CPU, whose threads take part in everything, it is the share of
    their time in which this process did not compute, such as while files are written.
    """

    def __init__(self, device: torch.device):
        self.device, self.share = device, 0.0
        self._idle = self._looks = 0
        self._over = threading.Event()

    def __enter__(self) -> Waits:
        self._wall, self._busy = time.perf_counter(), time.process_time()
        if self.device.type == "cuda":
            stream = torch.cuda.default_stream(self.device)
            self._thread = threading.Thread(target=self._watch, args=(stream,), daemon=True)
            self._thread.start()
        return self

    def _watch(self, stream: torch.cuda.Stream) -> None:
        while not self._over.wait(0.002):
            self._looks += 1
            self._idle += stream.query()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._over.set()
            self._thread.join()
            self.share = self._idle / max(1, self._looks)
        else:
            wall = (time.perf_counter() - self._wall) * torch.get_num_threads()
            self.share = max(0.0, 1 - (time.process_time() - self._busy) / wall)


def forget_peak(device: torch.device) -> None:
    """Restart the measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Peak bytes of tensors since `forget_peak`; None if it is not known (CPU)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Return unused cached memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
