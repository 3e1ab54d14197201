"""How everything here is measured: A B A B, medians, and the memory of a process."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch


def rounds(works: dict[str, Callable], seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Seconds of each of `works`, run in turn for about `seconds`, `least` times at least, after one turn unmeasured."""
    for work in works.values():
        work()
    found = {name: [] for name in works}
    began = time.perf_counter()
    while len(found[next(iter(works))]) < least or time.perf_counter() - began < seconds:
        for name, work in works.items():
            found[name].append(timed(work))
    return found


def timed(work: Callable) -> float:
    """Seconds that `work()` takes, the device's included."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def wait():
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(found: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Median and quartiles of `name`'s seconds over `to`'s of the same round."""
    ratios = [a / b for a, b in zip(found[name], found[to], strict=True)]
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"seconds": median(found[name]), "ratio": middle, "low": low, "high": high, "rounds": len(ratios)}


def peak(work: Callable) -> int:
    """Bytes that `work()` needs for a moment, beyond what is held before it: the device's, or this process's resident ones."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    forget_peak()
    before = memory("VmHWM")  # not VmRSS, which may be a little above it: the kernel counts that one loosely
    work()
    return memory("VmHWM") - before


def memory(what: str) -> int:
    """Bytes of this process (Linux): VmRSS now resident, RssAnon those of no file, VmHWM the most that were ever resident."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def forget_peak():
    """Let VmHWM start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def free_bytes() -> int:
    """Bytes of memory that processes may still take."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
