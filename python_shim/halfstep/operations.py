"""How many operations computed in which floating-point type: `with halfstep.count_operations() as counted:`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from halfstep._library import load_library

load_library()

DTYPES = ("float16", "bfloat16", "float32", "float64", "mixed")


class Casts(NamedTuple):
    """The casts from one type to another: how many, and the bytes that they read and wrote."""

    source: str
    target: str
    count: int
    bytes: int


class CountedOperations:
    """What was counted so far; it may be read while counting goes on, and stays after it.

    What counts as an operation, as its type and as a cast is defined in halfstep/torch/operation_counter.h.
    """

    def __init__(self) -> None:
        self._counter = torch.classes.halfstep.OperationCounter()

    def by_dtype(self) -> dict[str, int]:
        """Return how many operations computed in each type: all of DTYPES, zeros included."""
        total = dict.fromkeys(DTYPES, 0)
        for _, dtype, count in self._counter.counts():
            total[dtype] += count
        return total

    def by_operation(self) -> dict[str, dict[str, int]]:
        """Return operation -> type -> how many, sorted by operation, without zeros."""
        operations: dict[str, dict[str, int]] = {}
        for operation, dtype, count in self._counter.counts():
            operations.setdefault(operation, {})[dtype] = count
        return operations

    def casts(self) -> list[Casts]:
        """Return the casts between floating-point types, one entry for each pair that occurred."""
        return [Casts(*row) for row in self._counter.casts()]

    def table(self) -> str:
        """Return everything as text: one line per operation with a column per type that occurred, sums, and casts."""
        operations, totals = self.by_operation(), self.by_dtype()
        columns = [dtype for dtype in DTYPES if totals[dtype]]
        rows = [["operation", *columns]]
        rows += [[name, *(str(counts.get(dtype, "")) for dtype in columns)] for name, counts in operations.items()]
        rows.append(["all", *(str(totals[dtype]) for dtype in columns)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines += [f"{c.count} casts from {c.source} to {c.target}, {c.bytes} bytes" for c in self.casts()]
        return "\n".join(line.rstrip() for line in lines)


@contextmanager
def count_operations() -> Iterator[CountedOperations]:
    """Count what this thread computes inside the block, backward passes included.

    RuntimeError if the process counts already, be it in another thread.
    """
    counted = CountedOperations()
    if not counted._counter.start():
        raise RuntimeError("count_operations: another count runs in this process, expected one at a time")
    try:
        yield counted
    finally:
        counted._counter.stop()
