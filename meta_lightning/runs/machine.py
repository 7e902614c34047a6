"""Where a run took place, and what it took of it."""

import ctypes
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).parents[1]
MEGABYTE = 1e6
RECORDED = ("meta-lightning", "lightning", "torchmetrics", "learn2learn", "numpy")  # torch's own tells of CUDA as well
PROCESS = Path("/proc/self")  # of Linux


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that figures depend on."""
    installed = {name: version(name) for name in RECORDED}
    return {"python": platform.python_version(), "torch": str(torch.__version__), **installed}


def commit() -> str | None:
    """The commit of the checkout that the package lies in, ``-dirty`` where it was changed; None outside of one."""
    if not (CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # without git, or a checkout of another user
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """What computes: the system, the processor with its cores and torch's threads, and the accelerator if any."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def processor() -> str:
    """The processor's name, which platform does not know on Linux."""
    table = Path("/proc/cpuinfo")
    names = [line for line in table.read_text().splitlines() if line.startswith("model name")] if table.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def glibc(function: str, *args: int) -> None:
    """Call a function of glibc's; other libraries of C have not got it."""
    call = getattr(ctypes.CDLL(None), function, None)
    if call is not None:
        call(*args)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees for its next use, as torch keeps a GPU's."""
    # glibc hands large blocks back at once, and the kernel then clears every page of the next ones, in every pass of a
    # meta-batch; what that costs stands in benchmarks/results/speed.md
    glibc("mallopt", -1, -1)  # M_TRIM_THRESHOLD of malloc.h: never
    glibc("mallopt", -4, 0)  # M_MMAP_MAX: no block of its own


class PeakMemory:
    """The most memory that is in use between ``start`` and ``peak``, in MB.

    Of an NVIDIA GPU what torch allocates there; elsewhere this process' resident memory, less that when this was made.
    Outside of Linux a process' peak cannot be set back, so that it is that since its beginning.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        glibc("malloc_trim", 0)  # what is freed but kept would be in use before, and not in the peak
        self.before = self.resident("VmRSS")

    def start(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif PROCESS.exists():
            glibc("malloc_trim", 0)
            with suppress(OSError):  # a container may forbid it
                (PROCESS / "clear_refs").write_text("5")  # man 5 proc_pid_clear_refs

    def peak(self) -> float:
        """The peak since ``start``."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MEGABYTE
        return self.resident("VmHWM") - self.before

    def resident(self, what: str) -> float:
        """This process' resident memory now (VmRSS) or at its peak (VmHWM), in MB."""
        if PROCESS.exists():
            lines = (PROCESS / "status").read_text().splitlines()
            return next(float(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / MEGABYTE
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE
