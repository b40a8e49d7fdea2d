"""The clock and the memory of a device, and how runs are timed on it."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from runtime.devices import compute_dtype


class Device:
    """Clock and memory of the device that is measured."""

    def __init__(self, name: str):
        self.device, self.cuda = torch.device(name), name == "cuda"

    def seconds(self, run) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def peak_bytes(self, run) -> int:
        """The most memory in use during `run`: the allocator's on CUDA, the whole process's on Linux, else 0."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated()
        if not Path("/proc/self/clear_refs").exists():
            return 0
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        run()
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

    def product(self) -> float:
        """FLOP/s of a large product in the dtype of the forward pass: the peak that MFU refers to."""
        n, dtype = (8192, compute_dtype()) if self.cuda else (2048, torch.float32)
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        times = [self.seconds(lambda: a @ b) for _ in range(13)]
        return 2 * n**3 / statistics.median(times[3:])

    def describe(self) -> str:
        names = [line for line in cpu_info() if line.startswith("model name")] or ["CPU"]
        what = torch.cuda.get_device_name() if self.cuda else f"{names[0].split(':')[-1].strip()} (CPU)"
        return f"{what}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def measure(clock: Device, runs: dict, repeats: int, warmup: int) -> Iterator[tuple]:
    """{key: (settings, run)} -> (key, median seconds, peak bytes) of each when it is known; (inf, 0) where memory ran out."""
    count = repeats + warmup
    keys = list(runs) * count if not clock.cuda else [k for k in runs for _ in range(count)]
    times, peaks = {key: [] for key in runs}, dict.fromkeys(runs, 0)
    for key in keys:
        settings, run = runs[key]
        with settings():
            try:
                times[key].append(clock.seconds(run))
                if len(times[key]) == count:
                    peaks[key] = clock.peak_bytes(run)
            except torch.OutOfMemoryError:
                times[key].append(math.inf)
        if math.inf in times[key]:
            gc.collect()
            torch.cuda.empty_cache()
        if len(times[key]) == count:
            yield key, statistics.median(times[key][warmup:]), peaks[key]
