"""How all benchmarks time: warm up, then the median of single runs, each between device events on a GPU."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

PEAKS = {"bfloat16": 989.5e12, "int8": 1979e12}  # operations a second of an H100 SXM's tensor cores


def measure(run: Callable[[], object], device: torch.device, repeats: int = 25, warmup: int = 5) -> float:
    """Return the median time of `run` in milliseconds."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def measure_in_turns(
    runs: dict[str, Callable[[], object]], device: torch.device, rounds: int = 25, warmup: int = 5
) -> dict[str, float]:
    """Return the median time of each run in milliseconds; every round has each of them once, in the same order."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(measure(run, device, repeats=1, warmup=0))
    return {name: statistics.median(taken) for name, taken in times.items()}


def replayed(run: Callable[[], object], device: torch.device, calls: int = 1) -> Callable[[], object]:
    """Return `calls` runs as the replay of a CUDA graph, which leaves the time of the launches out; `run` on a CPU."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def copy_bandwidth(device: torch.device, nbytes: int = 2**31) -> float:
    """Return bytes per second of a large copy, counting what is read plus what is written."""
    nbytes = nbytes if device.type == "cuda" else 2**28
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / (measure(lambda: target.copy_(source), device) * 1e-3)


def machine(device: torch.device) -> str:
    """Return the processor and the versions, for the head of a table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        )
        name = f"{model}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"
