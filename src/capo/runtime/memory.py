"""Recognize errors that mean that memory ran out, of a device or of this machine; describe what there is."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

# names of torch's error of a device, and of Python's and numpy's of the machine
KINDS = ("OutOfMemoryError", "MemoryError", "_ArrayMemoryError")
CPU_ALLOCATOR = "DefaultCPUAllocator"  # named in the RuntimeError that torch raises for the machine's memory


def ran_out(error: BaseException) -> bool:
    """Whether `error` means that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    names = _names(error)  # the text is read of torch's own errors alone: that of another may raise
    message = str(error) if names[0] == "RuntimeError" else ""
    return any(means_memory(kind, message) for kind in names)


def means_memory(kind: str, message: str) -> bool:
    """Whether an error of a class of this name, in this process or another, means that memory ran out."""
    return kind in KINDS or (kind == "RuntimeError" and CPU_ALLOCATOR in message)


def memory_of(error: BaseException) -> str:
    """Describe the memory that ran out in `error`, total and free, for messages."""
    return device_memory() if "OutOfMemoryError" in _names(error) else machine_memory()


def _names(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def machine_memory() -> str:
    """Describe this machine's memory, total and free, for messages."""
    try:
        page, total, free = (
            os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
        )
    except (AttributeError, OSError, ValueError):  # a system that does not tell them
        return "this machine's memory"
    return f"this machine's memory ({page * total / 1e9:.1f} GB, {page * free / 1e9:.1f} GB free)"


def device_memory() -> str:
    """Describe the current GPU's memory, total and free, for messages."""
    torch: Any = sys.modules.get("torch")  # where nothing has imported it, nothing is on a GPU
    if torch is None or not torch.cuda.is_available():
        return "the device's memory"
    free, total = torch.cuda.mem_get_info()
    return f"the memory of {torch.cuda.get_device_name()} ({total / 1e9:.1f} GB, {free / 1e9:.1f} GB free)"
