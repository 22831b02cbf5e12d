"""What the running torch's autocast does with each op: `python -m halfstep policy --ops`, docs/autocast_ops/."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from halfstep._library import load_library

DEVICES = ("cpu", "cuda")

_HEADER = """\
# What autocast does with each op in torch {version}, by `python -m halfstep policy --ops`. Ops that are not here take
# what they are given, or are made of ops that are here. Integers and float64 are never cast.
#   lower_precision       floating-point inputs are cast to the autocast dtype (aten::_cudnn_rnn: always to float16)
#   float32               half inputs are cast to float32
#   float32_set_dtype     the same by the argument `dtype`, unless it is given
#   float32_append_dtype  the same by another overload, which has a dtype
#   promote               inputs are cast to the widest of them and the autocast dtype
#   banned                an error
#   halfstep              torch has no kernel there, halfstep has: as if not listed until `half_reductions` are on
"""


def autocast_ops(device: str) -> dict[str, str]:
    """Return the class of each ATen op that autocast treats on "cpu" or "cuda", which needs no GPU; sorted by op."""
    load_library()
    return torch.ops.halfstep.autocast_ops(device)


def format_ops(devices: Iterable[str] = DEVICES) -> str:
    """Return the lists as text: comments, then one line per device and op."""
    lines = [f"{device:4} {op:44} {kind}\n" for device in devices for op, kind in autocast_ops(device).items()]
    return _HEADER.format(version=torch.__version__.split("+")[0]) + "".join(lines)


def parse_ops(text: str) -> dict[str, dict[str, str]]:
    """Read what format_ops() wrote: device -> op -> class."""
    ops: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            device, op, kind = line.split()
            ops.setdefault(device, {})[op] = kind
    return ops
