"""The file in which a calibration is kept that was stopped and goes on."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep._library import load_library
from halfstep.calibration_data import Batch
from halfstep.int8_wrappers import plain_name
from halfstep.whole_files import check_archive, check_readable, replacing

_KIND = "calibration"
_PIECE = 1 << 22  # elements


class CalibrationFile:
    """A calibration's state at `path`, if there is one, and the place to write it.

    With a `model` it is known at once whether the state is of another one. ValueError for a file of others, a damaged
    one, a missing folder, and whatever is no file or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        self.path = Path(path)
        self._fingerprint: dict[str, Any] = {}
        self._state: dict[str, Any] | None = None
        self._batches: Sequence[Batch] | None = None
        if not self.path.parent.is_dir():
            raise ValueError(f"calibration_file is {self.path}, but there is no folder {self.path.parent}")
        if self.path.exists():
            self._state = self._read()
        try:  # the only way to know
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise ValueError(f"calibration_file is {self.path}, which cannot be written: {error}") from error
        if model is not None:
            named = (*model.named_parameters(), *model.named_buffers())
            self.expect(parameters=[[plain_name(name) for name, _ in named], digest_of(tensor for _, tensor in named)])

    def expect(self, **fingerprint: Any) -> None:
        """Compare a state with what is known of the calibration: ValueError if it is of another one."""
        self._fingerprint.update(fingerprint)
        for key, value in fingerprint.items():
            if self._state is not None and self._state.get(key) != value:
                raise ValueError(
                    f"calibration_file {self.path} is of other {key} than this calibration; delete it, or name another "
                    "file"
                )

    def expect_batches(self, batches: Sequence[Batch]) -> None:
        """Compare a state with the batches: their sizes and all their tensors."""
        if batches is not self._batches:  # else they are known: all data takes its time
            self._batches = batches
            self.expect(batches=[[batch.size, digest_of(batch.tensors().values())] for batch in batches])
        done = 0 if self._state is None else self._state["done"]
        if done > len(batches):
            raise ValueError(f"calibration_file {self.path} is damaged: done is {done}, of {len(batches)} batches")

    def restore(self, observers: Mapping[str, torch.ScriptObject]) -> int:
        """Fill the observers with the state, and return how many batches they have seen. Asked after expect()."""
        if self._state is None:
            return 0
        for name, observer in observers.items():
            observer.restore(self._state["observers"][name])
        return self._state["done"]

    def save(self, done: int, observers: Mapping[str, Any]) -> None:
        """Write a state: the observers' states after `done` batches. An interruption leaves the old one. OSError."""
        state = {"halfstep": _KIND, "done": done, "observers": dict(observers), **self._fingerprint}
        with replacing(self.path) as part:
            before = torch.serialization.get_crc32_options()
            torch.serialization.set_crc32_options(True)  # _read() compares them
            try:
                torch.save(state, part)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"calibration_file {self.path} cannot be written: {error}") from error
            finally:
                torch.serialization.set_crc32_options(before)

    def _read(self) -> dict[str, Any]:
        try:
            check_readable(self.path)
        except (OSError, ValueError) as error:
            raise ValueError(f"calibration_file {self.path} cannot be read: {error}") from error
        try:
            check_archive(self.path, "data.pkl")
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # anything, an errno too, of what is no whole archive of plain tensors
            raise ValueError(
                f"calibration_file {self.path} is damaged, or none of halfstep's: delete it, or name another file"
            ) from error
        if not isinstance(state, dict) or state.get("halfstep") != _KIND:
            raise ValueError(f"calibration_file {self.path} is no calibration of halfstep")
        damaged = f"calibration_file {self.path} is damaged"
        done, observers, layers = state.get("done"), state.get("observers"), state.get("layers")
        if type(done) is not int or done < 0:
            raise ValueError(f"{damaged}: done is {done!r}, expected a number of batches")
        if not isinstance(observers, dict) or not isinstance(layers, dict) or observers.keys() != layers.keys():
            raise ValueError(f"{damaged}: its observers are not those of its layers")
        load_library()
        for name, observer in observers.items():
            try:
                torch.classes.halfstep.Observer(None).restore(observer)
            except Exception as error:  # of another type than state() gives, or refused
                raise ValueError(f"{damaged}: the observer of {name}: {error}") from error
        return state


def digest_of(tensors: Iterable[torch.Tensor]) -> str:
    """Return a digest of dtypes, shapes and bytes, which are moved to the CPU in pieces."""
    digest = hashlib.blake2b(digest_size=32)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        if tensor.layout is torch.strided and not tensor.is_nested:
            for piece in tensor.detach().resolve_conj().resolve_neg().flatten().split(_PIECE):
                digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
        else:  # an input that has no plain bytes: by what is printed of it
            digest.update(str(tensor).encode())
    return digest.hexdigest()
