"""Files that take another one's place: at all or not at all, and never that of what is no file."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from halfstep.whole_files import check_readable, replacing, write_file


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may do everything; be nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may look into and nobody but its owner may write to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def write(path: Path, content: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(content)


def test_replaces_a_file_and_makes_a_new_one(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content
        assert os.listdir(tmp_path) == ["f"]
    write_file(tmp_path / "g", lambda file: file.write(b"three"))
    assert (tmp_path / "g").read_bytes() == b"three"


def test_the_old_file_stays_if_anything_is_raised(tmp_path: Path) -> None:
    write(tmp_path / "f", b"old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "f") as part:
        part.write_bytes(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_the_old_file_stays_if_the_disk_is_full(tmp_path: Path) -> None:
    write(tmp_path / "f", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_file(tmp_path / "f", lambda file: file.write(bytes(101)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with replacing(tmp_path / "f") as part:
            part.unlink()
            os.close(os.open(part, os.O_CREAT, 0o600))  # as a library does that has temporary files of its own
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/f")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "f").read_bytes() == b"new"


def test_bad_places_are_named(tmp_path: Path, public: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind, said in (
        (tmp_path, IsADirectoryError, f"{tmp_path}' is a folder"),
        (tmp_path / "no" / "f", FileNotFoundError, f"{tmp_path}/no' for 'f' does not exist"),
        (tmp_path / "pipe", FileExistsError, "pipe' is no regular file"),
        (Path(os.devnull), FileExistsError, "null' is no regular file"),
        (Path("/proc/f"), OSError, "'/proc/f' cannot be written"),
        (tmp_path / ("f" * 300), OSError, "f{300}"),
    ):
        with pytest.raises(kind, match=said):
            write(path, b"")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with unprivileged(), pytest.raises(PermissionError, match=f"{public}/f' cannot be written"):
        if os.geteuid() == os.stat(public).st_uid:
            public.chmod(0o555)
        write(public / "f", b"")
    public.chmod(0o755)
    assert os.listdir(public) == []
    assert os.listdir(tmp_path) == ["pipe"]


def test_what_cannot_be_read_is_named(tmp_path: Path, public: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for path, kind, said in (
        (tmp_path / "no", FileNotFoundError, "no does not exist"),
        (tmp_path, ValueError, "is not a file"),
        (tmp_path / "pipe", ValueError, "pipe is not a file"),
        (Path(os.devnull), ValueError, "null is not a file"),
        (tmp_path / "empty", ValueError, "empty is empty"),
        (Path("/proc/self/status"), ValueError, "status is empty"),
    ):
        with pytest.raises(kind, match=said):
            check_readable(path)
    (public / "secret").write_text("x")
    check_readable(public / "secret")
    (public / "secret").chmod(0)
    with unprivileged(), pytest.raises(PermissionError, match="secret"):
        check_readable(public / "secret")
