"""Captures of CUDA graphs that leave nothing behind when they fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class NotCapturable(RuntimeError):
    """Why something cannot be captured."""


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Capture what is enqueued; when that fails, leave stream, allocator and random state as they were."""
    torch.cuda.synchronize(stream.device)
    torch.cuda.empty_cache()  # the memory of the steps before, for the graph
    with torch.cuda.stream(stream):
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        except RuntimeError:
            _restore_generator(stream.device)
            raise
        try:
            yield
        except BaseException:
            _end(graph, pool, stream.device)
            raise
        invalid = _end(graph, pool, stream.device)
        if invalid:
            raise NotCapturable(f"the capture is invalid: {invalid}")


def _end(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> str:
    """End a capture; return "" or what torch says of it."""
    try:
        graph.capture_end()
    except RuntimeError as error:
        # torch leaves the allocator and the random generator in their capturing state then.
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
        _restore_generator(device)
        return str(error).strip().splitlines()[0]
    return ""


def _restore_generator(device: torch.device) -> None:
    """Bring the random generator out of a capture that failed: by one that succeeds."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    torch.zeros((), device=device)
    graph.capture_end()
