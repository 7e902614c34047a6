"""Hardware, versions and peak memory of a run."""

import ctypes
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import meta_lightning

CHECKOUT = Path(__file__).parents[2]
MEGABYTE = 1e6
RECORDED = ("lightning", "torchmetrics", "learn2learn", "numpy")  # torch.__version__ names CUDA too
PROCESS = Path("/proc/self")  # Linux only


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results, learn2learn's if it is installed."""
    own = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "meta-lightning": meta_lightning.__version__,
    }
    for name in RECORDED:
        with suppress(PackageNotFoundError):
            own[name] = version(name)
    return own


def commit() -> str | None:
    """Git commit of the package's checkout, with ``-dirty`` if it was modified; None outside a checkout."""
    if not (CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is missing, or the checkout belongs to another user
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """Operating system, processor, number of cores and torch threads, and accelerator."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def processor() -> str:
    """Name of the processor; ``platform.processor`` returns none on Linux."""
    table = Path("/proc/cpuinfo")
    names = [line for line in table.read_text().splitlines() if line.startswith("model name")] if table.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def glibc(function: str, *args: int) -> None:
    """Call a function of glibc; do nothing with other C libraries."""
    getattr(ctypes.CDLL(None), function, lambda *args: None)(*args)


def keep_freed_memory() -> None:
    """Reuse freed CPU memory instead of returning it to the system, as torch does with GPU memory."""
    # otherwise the kernel zeroes the pages of large blocks in every pass of a meta-batch: benchmarks/results/speed.md
    glibc("mallopt", -1, -1)  # M_TRIM_THRESHOLD: never return memory
    glibc("mallopt", -4, 0)  # M_MMAP_MAX: no mmap for large blocks


class PeakMemory:
    """Peak memory since ``start`` in MB: allocated by torch on a GPU; else resident, minus that at construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        glibc("malloc_trim", 0)  # memory that is freed but kept must not count as used before
        self.before = self.resident("VmRSS")

    def start(self) -> None:
        """Reset the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif PROCESS.exists():  # other systems cannot reset the peak, which then counts from the start of the process
            glibc("malloc_trim", 0)
            with suppress(OSError):  # containers may forbid it
                (PROCESS / "clear_refs").write_text("5")  # man 5 proc_pid_clear_refs

    def peak(self) -> float:
        """The peak since ``start``."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MEGABYTE
        return self.resident("VmHWM") - self.before

    def resident(self, what: str) -> float:
        """Resident memory of the process now (VmRSS) or at its peak (VmHWM), in MB."""
        if PROCESS.exists():
            lines = (PROCESS / "status").read_text().splitlines()
            return next(float(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / MEGABYTE
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE
