"""Files that are whole once they are there."""

from __future__ import annotations

import contextlib
import os
import secrets
import zipfile
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


def check_archive(path: Path, *records: str) -> None:
    """Compare the records of an archive of torch's with their checksums, which torch itself does not.

    BadZipFile for one that is damaged, lacks one of `records`, or claims to hold more than such a file can.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if missing := set(records) - {name.partition("/")[2] for name in archive.namelist()}:
                raise zipfile.BadZipFile(f"it has no record {min(missing)}")
            content = sum(record.file_size for record in archive.infolist())
            if content > _largest_content(path.stat().st_size):
                raise zipfile.BadZipFile(f"it claims to hold {content} bytes")
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the CRC-32 of {damaged} is not what was saved")
    except zipfile.BadZipFile:
        raise
    except Exception as error:  # zipfile believes what it reads: streams, methods, passwords, places to seek to
        raise zipfile.BadZipFile(f"{type(error).__name__}: {error}") from error


def _largest_content(file_bytes: int) -> int:
    """Return the bytes that a file of this size can hold: torch compresses code, about tenfold, and no tensors."""
    return 64 * file_bytes + (16 << 20)
