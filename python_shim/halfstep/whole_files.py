"""Files that are whole once they are there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the name of a new, empty file beside `path`, which takes its place if nothing is raised.

    Else, and if the program ends in between, what was at `path` is as before. Of a link the file is replaced that it
    points to. OSError, with the path: FileNotFoundError without the folder, IsADirectoryError for a folder,
    FileExistsError for a device, a pipe or anything else that is no file.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(target.parent)!r} for {target.name!r} does not exist")
    if target.is_dir():
        raise IsADirectoryError(f"{str(target)!r} is a folder, expected the name of a file")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{str(target)!r} is no regular file, and would be lost: expected the name of a file")
    part = target.with_name(f".{secrets.token_hex(8)}.part")  # another one for each thread
    try:
        with part.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())  # a disk may say only here that it is full
        part.chmod(mode)  # who wrote it may have put a private file in its place
        part.replace(target)
    except OSError as error:
        if error.filename is None or os.fspath(error.filename) != str(part):
            raise
        raise type(error)(error.errno, f"{error.strerror}; {str(target)!r} cannot be written") from error
    finally:
        with contextlib.suppress(OSError):  # the one above says more
            part.unlink(missing_ok=True)


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a new file and put it in the place of `path`, as replacing() does."""
    with replacing(path) as part, part.open("wb") as file:
        write(file)


def check_readable(path: Path) -> None:
    """Raise what is wrong with a file that is to be read: OSError, or ValueError for what is no file, or empty."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is not a file")
    with path.open("rb") as file:  # PermissionError
        if not os.fstat(file.fileno()).st_size:  # as those of /proc are, whatever they say
            raise ValueError(f"{path} is empty")
