"""The exceptions that are halfstep's own; everything else is torch's or Python's."""

from __future__ import annotations


class LibraryMismatchError(ImportError):
    """The compiled library is missing, or was built for another torch or another halfstep."""


class ScaleCollapsed(RuntimeError):
    """Too many steps in a row had infinite or NaN gradients: no loss scale helps this run."""
