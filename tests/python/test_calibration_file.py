"""Files of calibrations that were stopped: resumed, and refused if they are damaged or of something else."""

from __future__ import annotations

import os
import re
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer, int8_calibration, int8_calibration_file
from halfstep.calibration_data import Batch, collect
from halfstep.int8_calibration import Calibration
from halfstep.int8_calibration_file import CalibrationFile
from halfstep.int8_model import find_candidates
from torch import nn


class Net(nn.Module):
    """Two layers; call number `stop` is interrupted between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls, self.stop = 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.first(x)
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return self.second(x)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def data_of(model: nn.Module, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return collect(model, [torch.randn(5, 8, generator=generator) for _ in range(6)], 100)


def calibrate(model: nn.Module, data: list[Batch], file: Path | None) -> Calibration:
    calibration = Calibration(find_candidates(model, (), ())[0], data, file and CalibrationFile(file))
    calibration.run(model, False)
    return calibration


def numbers_of(calibration: Calibration) -> list[Any]:
    methods = int8_calibration.METHODS
    found = [[calibration.parameters(name, method, 8) for method in methods] for name in calibration.observers]
    return [*found, [(each.count(), each.batches()) for each in calibration.observers.values()]]


def test_an_interruption_in_a_batch_keeps_the_batches_before(tmp_path: Path) -> None:
    file = tmp_path / "calibration.pt"
    stopped = net()
    stopped.stop = 4
    with pytest.raises(KeyboardInterrupt):
        calibrate(stopped, data_of(stopped), file)
    assert torch.load(file, weights_only=True)["done"] == 3
    model = net()
    resumed = calibrate(model, data_of(model), file)
    assert model.calls == 3
    assert numbers_of(resumed) == numbers_of(calibrate(model, data_of(model), None))
    assert torch.load(file, weights_only=True)["done"] == 6


def test_a_file_of_other_weights_or_data_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "calibration.pt"
    model = net()
    calibrate(model, data_of(model), file)
    with pytest.raises(ValueError, match="of other weights"):
        calibrate(net(2), data_of(model), file)
    with pytest.raises(ValueError, match="of other batches"):
        calibrate(model, data_of(model, 3), file)
    model.first.bias.data[0] += 1
    with pytest.raises(ValueError, match="of other weights"):
        calibrate(model, data_of(model), file)


def test_every_sample_of_a_batch_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_calibration_file, "_PIECE", 7)  # the samples are in several
    file, model = tmp_path / "calibration.pt", net()
    data = data_of(model)
    calibrate(model, data, file)
    calibrate(model, data_of(model), file)
    assert model.calls == len(data)
    data[4].args[0][-1, -1] += 1
    with pytest.raises(ValueError, match="of other batches"):
        calibrate(model, data, file)


def test_a_digest_is_of_values_and_not_of_strides() -> None:
    digest_of = int8_calibration_file.digest_of
    x = torch.randn(6, 4, dtype=torch.complex64)
    assert digest_of([x.t().contiguous().t()]) == digest_of([x])
    assert digest_of([x.conj()]) == digest_of([x.conj().resolve_conj()]) != digest_of([x])
    assert digest_of([torch.tensor(1.0)]) != digest_of([torch.tensor(2.0)]) != digest_of([torch.tensor([2.0])])
    assert digest_of([torch.empty(0, 3)]) != digest_of([torch.empty(3, 0)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("observers"), "its observers"),
        (lambda state: state["observers"].pop("second"), "its observers"),
        (lambda state: state["observers"].update(second=3), "the observer of second"),
        (lambda state: state["observers"]["second"][2].fill_(float("nan")), "the observer of second"),
        (lambda state: state.pop("done"), "done is None"),
        (lambda state: state.update(done=7), "done is 7, of 6"),
        (lambda state: state.pop("weights"), "of other weights"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    file = tmp_path / "calibration.pt"
    model = net()
    calibrate(model, data_of(model), file)
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    with pytest.raises(ValueError, match=message):
        calibrate(model, data_of(model), file)


class Counted(nn.Module):
    """Counts the copies that are made of it, and its calls."""

    copies = calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def __deepcopy__(self, memo: dict) -> Counted:
        Counted.copies += 1
        made = Counted()
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.calls += 1
        return self.layer(x)


def optimize(model: nn.Module, file: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = InferencePrecisionOptimizer(
        calibration_file=file, eval_fn=lambda _model: 1.0, progress=False, speed_guard=False
    )
    optimizer.optimize_for_inference(model, [torch.randn(4, 8, generator=generator) for _ in range(3)], "cpu")


def test_what_is_wrong_with_a_file_is_known_before_the_model_is_copied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Counted().eval()
    good = tmp_path / "good"
    optimize(model, good)
    content = good.read_bytes()
    for name, written in (("cut", content[:-9]), ("text", b"calibration"), ("empty", b"")):
        (tmp_path / name).write_bytes(written)
    torch.save({"weights": 1}, tmp_path / "foreign")
    torch.save({**torch.load(good, weights_only=True), "done": "all"}, tmp_path / "done")
    changed = torch.load(good, weights_only=True)
    changed["observers"]["layer"] = 1
    torch.save(changed, tmp_path / "observer")
    os.mkfifo(tmp_path / "pipe")
    Counted.copies = Counted.calls = 0
    for name, said in (
        ("cut", "is damaged, or none of halfstep's: delete it"),
        ("text", "is damaged"),
        ("empty", "empty is empty"),
        ("foreign", "is no calibration of halfstep"),
        ("done", "is damaged: done is 'all'"),
        ("observer", "is damaged: the observer of layer"),
        ("pipe", "pipe is not a file"),
        (".", "is not a file"),
        ("none/file", "there is no folder"),
        ("/proc/file", "/proc/file, which cannot be written"),
    ):
        with pytest.raises(ValueError, match=f"calibration_file.*{said}"):
            optimize(model, tmp_path / name)
    with pytest.raises(ValueError, match="of other parameters than this calibration"):
        optimize(Counted().eval(), good)
    assert Counted.copies == Counted.calls == 0
    with pytest.raises(ValueError, match="of other batches than this calibration"):
        optimize(model, good, seed=2)
    assert Counted.calls == 0
    assert sorted(os.listdir(tmp_path)) == ["cut", "done", "empty", "foreign", "good", "observer", "pipe", "text"]
    assert good.read_bytes() == content
    with pytest.raises(TypeError, match="calibration_file is int, expected a path"):
        InferencePrecisionOptimizer(calibration_file=3)


def test_a_disk_that_is_full_is_an_error_with_the_path(tmp_path: Path) -> None:
    model, file = net(), tmp_path / "calibration.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"calibration_file {file} cannot be written"):
            calibrate(model, data_of(model), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_noticed_before_the_calibration(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(ValueError, match="there is no folder"):
        calibrate(model, data_of(model), tmp_path / "none" / "calibration.pt")
    assert model.calls == 0


def test_a_file_that_grows_a_thousandfold_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "calibration"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("calibration/data.pkl", b"\x80\x02}q\x00.")
        with archive.open("calibration/data/0", "w", force_zip64=True) as large:
            for _ in range(512):
                large.write(bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="is damaged, or none of halfstep's") as caught:
        CalibrationFile(file)
    assert re.search("it claims to hold [0-9]* bytes", str(caught.value.__cause__))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_checksums_are_written_whatever_torch_is_told(tmp_path: Path) -> None:
    model, file = net(), tmp_path / "calibration"
    torch.serialization.set_crc32_options(False)
    try:
        calibrate(model, data_of(model), file)
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert calibrate(model, data_of(model), file).done == 6
