"""What the dtype optimizer did, or would do, to each column."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Hashable
from typing import Any

_ALL_UP_TO, _SHOWN = 40, 20


@dataclasses.dataclass(frozen=True)
class ColumnReport:
    """One column of a frame or a matrix, one field, one array of a list, or one of the arrays of a sparse matrix.

    target: "X" or "y". column: its name or position, None for an array that is one column.
    before, after: dtypes as text. bytes_before, bytes_after: of its values.
    max_relative_error: the largest |new - old| / |old| over finite values; 0 if nothing changed.
    blocked: why it did not become smaller, "" if it did or if there was nothing to reduce.
    position: where that is seen first: a row, an index of several dimensions, or None.
    note: what to know about the result, "" for nothing.
    """

    target: str
    column: Hashable
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    max_relative_error: float = 0.0
    blocked: str = ""
    position: int | tuple[int, ...] | None = None
    note: str = ""

    @property
    def changed(self) -> bool:
        """Whether the dtype differs."""
        return self.before != self.after


@dataclasses.dataclass(frozen=True, repr=False)
class ShrinkReport:
    """The columns of X, then those of y; `print(report)` shows them as a table.

    Of more than 40 columns it shows those that something stood in the way of by themselves, or that there is something
    to know about, at most 20, and counts the others; `columns` has all.
    """

    columns: tuple[ColumnReport, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Bytes of all values before."""
        return sum(column.bytes_before for column in self.columns)

    @property
    def bytes_after(self) -> int:
        """Bytes of all values after."""
        return sum(column.bytes_after for column in self.columns)

    @property
    def memory_reduction(self) -> float:
        """The part of the bytes that is saved, 0 to 1; NaN without values."""
        return 1 - self.bytes_after / self.bytes_before if self.bytes_before else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain dictionaries and lists."""
        columns = [dataclasses.asdict(column) for column in self.columns]
        return {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "columns": columns}

    def _chosen(self) -> tuple[tuple[ColumnReport, ...], collections.Counter]:
        """Return the columns to show, and how many others there are of each pair of dtypes."""
        if len(self.columns) <= _ALL_UP_TO:
            return self.columns, collections.Counter()
        own = [column for column in self.columns if column.position is not None or column.note or column.target == "y"]
        shown = own[:_SHOWN] or list(self.columns[:_SHOWN])
        rest = collections.Counter((column.before, column.after) for column in self.columns)
        rest.subtract((column.before, column.after) for column in shown)
        return tuple(shown), +rest

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        shown, rest = self._chosen()
        head = ("", "column", "from", "to", "before", "after", "error", "what stood in the way, or to know")
        rows = [
            (
                column.target,
                "" if column.column is None else str(column.column),
                column.before,
                column.after,
                _size(column.bytes_before),
                _size(column.bytes_after),
                f"{column.max_relative_error:.1e}" if column.max_relative_error else "0",
                "; ".join(filter(None, (column.blocked + _row(column.position), column.note))),
            )
            for column in shown
        ]
        widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
        ]
        lines += [f"and {n:,} more: {before} -> {after}" for (before, after), n in rest.items()]
        saved = f" ({self.memory_reduction:.1%} less)" if self.bytes_before else ""
        lines.append(f"{_size(self.bytes_before)} -> {_size(self.bytes_after)}{saved}")
        return "\n".join(lines)


def _row(position: int | tuple[int, ...] | None) -> str:
    return "" if position is None else f" (row {position})" if isinstance(position, int) else f" (at {position})"


def _size(nbytes: int) -> str:
    """Return bytes in the unit that shows them best, in powers of 1024."""
    for unit in ("B", "KB", "MB"):
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}" if unit != "B" else f"{nbytes} B"
        nbytes /= 1024
    return f"{nbytes:.1f} GB"
