"""TorchScript files read by load_torchscript: the saved bits, or ValueError for what is damaged or something else."""

from __future__ import annotations

import contextlib
import random
import resource
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from halfstep import InferencePrecisionOptimizer
from int8_file_cases import optimized

load = InferencePrecisionOptimizer.load_torchscript


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("saved") / "model.pt"
    inference, model = optimized("small")[:2]
    inference.save_torchscript(file)
    batch = torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        return file, batch, model(batch)


def refused(file: Path, said: str = "is not a TorchScript file, or a damaged one") -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load(file)
    assert str(file) in str(caught.value)


def test_a_process_that_knows_only_the_file(saved: tuple, tmp_path: Path) -> None:
    file, batch, expected = saved
    torch.save((batch, expected), tmp_path / "batch.pt")
    program = (
        "import sys, torch; from halfstep import InferencePrecisionOptimizer as I; "
        "batch, expected = torch.load(sys.argv[2]); model = I.load_torchscript(sys.argv[1]); "
        "assert not model.training and torch.equal(model(batch), expected)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program, file, tmp_path / "batch.pt"], check=True)


def test_prefixes_and_garbage_are_refused(saved: tuple, tmp_path: Path) -> None:
    content, file = saved[0].read_bytes(), tmp_path / "m"
    for length in (*range(1, 200), *range(200, len(content), 97), len(content) - 1):
        file.write_bytes(content[:length])
        refused(file)
    file.write_bytes(b"")
    refused(file, "is empty")
    file.write_bytes(b"garbage" * 1000)
    refused(file)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    refused(tmp_path, "is not a file")


def inflated(compressed: bytes, record: zipfile.ZipInfo) -> bytes | None:
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(-15).decompress(compressed[: record.compress_size], record.file_size)
    return None


def test_flipped_bits_are_refused(saved: tuple, tmp_path: Path) -> None:
    """Bits of each record, int8 and float weights, code and structure."""
    chance, content = random.Random(0), saved[0].read_bytes()
    with zipfile.ZipFile(saved[0]) as archive:
        records = [record for record in archive.infolist() if record.compress_size]
    assert {"data.pkl", "constants.pkl", "version"} <= {record.filename.partition("/")[2] for record in records}
    assert any("/code/" in record.filename for record in records)
    assert sum("/data/" in record.filename for record in records) >= 4
    for record in records:
        names, extra = (int.from_bytes(content[record.header_offset + at :][:2], "little") for at in (26, 28))
        start = record.header_offset + 30 + names + extra
        for place in {start, *(start + chance.randrange(record.compress_size) for _ in range(8))}:
            damaged = bytearray(content)
            damaged[place] ^= 1 << chance.randrange(8)
            if record.compress_type and inflated(damaged[start:], record) == inflated(content[start:], record):
                continue  # a bit of the compressed code on which nothing depends
            (tmp_path / "m").write_bytes(damaged)
            refused(tmp_path / "m")


def test_mutations_are_refused_or_change_nothing(saved: tuple, tmp_path: Path) -> None:
    """Of padding, dates and the like nothing depends."""
    file, batch, expected = saved
    chance, content = random.Random(1), file.read_bytes()
    same = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] = chance.randrange(256)
        (tmp_path / "m").write_bytes(damaged)
        try:
            model = load(tmp_path / "m")
        except ValueError:
            continue
        same += 1
        with torch.no_grad():
            assert torch.equal(model(batch), expected)
    assert same < 200


def test_foreign_files_are_refused(tmp_path: Path, saved: tuple) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "state.pt")
    refused(tmp_path / "state.pt", "it has no record constants.pkl")
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("archive/data.txt", "text")
    refused(tmp_path / "some.zip", "it has no record constants.pkl")
    optimized("small")[0].save(tmp_path / "m.safetensors")
    refused(tmp_path / "m.safetensors")


def test_a_file_that_grows_a_thousandfold_is_refused_unread(saved: tuple, tmp_path: Path) -> None:
    with zipfile.ZipFile(saved[0]) as archive, zipfile.ZipFile(tmp_path / "m", "w", zipfile.ZIP_DEFLATED) as bomb:
        for record in archive.infolist():
            bomb.writestr(record.filename, archive.read(record))
        with bomb.open("archive/code/large.py", "w", force_zip64=True) as large:
            for _ in range(512):
                large.write(bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "m", "it claims to hold [0-9]* bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize(("device", "error"), [("mps", ValueError), (3.5, TypeError), ("nowhere", ValueError)])
def test_devices(device: object, error: type[Exception], saved: tuple) -> None:
    with pytest.raises(error, match="device is"):
        load(saved[0], device)
