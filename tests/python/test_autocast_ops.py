"""The list of what autocast does with each op: against what the ops do, and against the lists in docs/autocast_ops."""

from __future__ import annotations

import contextlib
import difflib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import halfstep
import pytest
import torch
from autocast_cases import CASES, Inputs
from halfstep.autocast_ops import DEVICES, autocast_ops, format_ops, parse_ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
LISTS = ROOT / "docs" / "autocast_ops"
OLDEST, NEWEST = "2.11", "2.15"
halfstep.load_library()

# Overloads for named tensors, which torch 2.15 has no more.
UNCOVERED = {
    "index_copy.dimname",
    "prod.dim_Dimname",
    "cumprod.dimname",
    "cumsum.dimname",
    "softmax.Dimname",
    "log_softmax.Dimname",
    "norm.names_ScalarOpt_dim",
    "sum.dim_DimnameList",
}
# What these do is in their arguments, as they arrive below autocast: fake tensors and some processors cannot run them.
NOT_RUN = {
    "_convolution",
    "_thnn_fused_gru_cell",
    "_thnn_fused_lstm_cell",
    "cudnn_convolution",
    "cudnn_convolution_transpose",
    "mkldnn_rnn_layer",
}
# Its autocast kernel packs the weights in one tensor before it calls on, which needs a driver.
NEEDS_A_GPU = {"_cudnn_rnn"}
# The same kernel casts to float16 under bfloat16 autocast too.
ALWAYS_FLOAT16 = {"_cudnn_rnn"}
half = torch.bfloat16


def first_floating(values: Any) -> torch.dtype | None:
    """The dtype of the first floating-point or complex tensor in a structure."""
    for value in torch.utils._pytree.tree_leaves(values):
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            return value.dtype
    return None


class BelowAutocast(TorchDispatchMode):
    """Notes with which dtype the first op below autocast was called, casts apart, and stands in for NOT_RUN."""

    def __init__(self, stand_in: bool) -> None:
        super().__init__()
        self.stand_in = stand_in
        self.received: torch.dtype | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name != "_to_copy":
            self.received = self.received or first_floating(args)
        if self.stand_in and name in NOT_RUN:
            out = torch.empty(2, 4, dtype=first_floating(args), device="meta")
            return (out,) * len(func._schema.returns) if len(func._schema.returns) > 1 else out
        return func(*args, **(kwargs or {}))


def call(name: str, device: str, stand_in: bool, *dtypes: torch.dtype) -> torch.dtype:
    """The dtype of what the op returns, or computes with if it returns no floating-point tensor."""
    base, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, base), overload or "default")
    arguments = CASES[name](Inputs(device, *dtypes))
    with BelowAutocast(stand_in) as below:
        dtype = first_floating(op(*arguments)) or below.received
    assert dtype is not None, name
    return torch.float32 if dtype == torch.complex64 else dtype


def observed(name: str, device: str, stand_in: bool) -> str:
    """What autocast does with an op, from calls with float32, half and both."""
    try:
        from_float32 = call(name, device, stand_in, torch.float32)
    except RuntimeError as error:
        if "unsafe to autocast" in str(error):
            return "banned"
        raise
    if from_float32 == (torch.float16 if name in ALWAYS_FLOAT16 else half):
        return "lower_precision"
    from_half = call(name, device, stand_in, half)
    if from_half == torch.float32:
        return "float32"
    both = {call(name, device, stand_in, *mixed) for mixed in ((half, torch.float32), (torch.float32, half))}
    assert (from_float32, from_half, both) == (torch.float32, half, {torch.float32}), name
    return "promote"


@contextlib.contextmanager
def autocast_on(device: str) -> Iterator[None]:
    """CUDA's without a GPU too: torch.autocast would turn itself off."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, half)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


def check(device: str, fake: bool) -> None:
    """Compare the list with what every op in it does."""
    ops = {op.removeprefix("aten::"): kind for op, kind in autocast_ops(device).items()}
    as_seen = dict.fromkeys(("float32_set_dtype", "float32_append_dtype", "halfstep"), "float32")
    wrong = {}
    with autocast_on(device), FakeTensorMode() if fake else contextlib.nullcontext():
        for name, kind in ops.items():
            if name in UNCOVERED or (fake and name in NEEDS_A_GPU):
                continue
            assert name in CASES, f"{name}, {kind} on {device}: new in this torch, add its arguments to CASES"
            seen = observed(name, device, fake or name == "mkldnn_rnn_layer")
            if seen != as_seen.get(kind, kind):
                wrong[name] = (kind, seen)
    assert wrong == {}
    assert {"lower_precision", "float32", "promote"} <= set(ops.values())


@pytest.mark.filterwarnings("ignore")
def test_the_cpus_list_is_what_the_ops_do() -> None:
    check("cpu", fake=False)


@pytest.mark.filterwarnings("ignore")
def test_cudas_list_is_what_the_ops_do_to_fake_tensors() -> None:
    check("cuda", fake=True)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
def test_cudas_list_is_what_the_ops_do() -> None:
    check("cuda", fake=False)


@pytest.mark.parametrize("device", DEVICES)
def test_the_list_is_the_dispatchers(device: str) -> None:
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device]
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    assert list(autocast_ops(device)) == sorted(op for op in registered if op.startswith("aten::"))


def test_halfsteps_own_kernel_is_not_torchs() -> None:
    code = (
        "import torch\n"
        "registered = torch._C._dispatch_get_registrations_for_dispatch_key\n"
        "print('aten::cross_entropy_loss' in registered('AutocastCUDA'))"
    )
    torch_has_it = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    expected = "halfstep" if torch_has_it.strip() == "False" else "float32"
    assert autocast_ops("cuda")["aten::cross_entropy_loss"] == expected
    assert [op for op, kind in autocast_ops("cuda").items() if kind == "halfstep"] in ([], ["aten::cross_entropy_loss"])
    assert autocast_ops("cpu")["aten::cross_entropy_loss"] == "float32"


def test_other_libraries_and_fallthroughs_are_left_out() -> None:
    before = {device: autocast_ops(device) for device in DEVICES}
    with torch.library._scoped_library("halfstep_test_ops", "DEF") as library:
        library.define("custom(Tensor x) -> Tensor")
        library.impl("custom", lambda x: x, "AutocastCPU")
        with torch.library._scoped_library("aten", "IMPL") as aten:
            aten.impl("tanh", torch.library.fallthrough_kernel, "AutocastCUDA")
            assert {device: autocast_ops(device) for device in DEVICES} == before


@pytest.mark.parametrize("device", ["cuda:0", "mps", ""])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"autocast_ops: device is '{device}', expected 'cpu' or 'cuda'"):
        autocast_ops(device)


def test_a_script_asks_too() -> None:
    @torch.jit.script
    def kind_of(op: str) -> str:
        return torch.ops.halfstep.autocast_ops("cpu")[op]

    assert kind_of("aten::linear") == "lower_precision"


# ------------------------------------------------------------------------------------------- lists by torch version


def of_file(minor: str) -> dict[str, dict[str, str]]:
    return parse_ops((LISTS / f"torch-{minor}.txt").read_text())


def test_the_running_torchs_list_is_the_one_in_the_docs() -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    path = LISTS / f"torch-{minor}.txt"
    running = parse_ops(format_ops())
    if torch.version.cuda is None:  # cuDNN's recurrent layers register in libtorch_cuda
        running["cuda"] |= {"aten::_cudnn_rnn": "lower_precision"}
    if not path.exists():  # between the oldest and the newest: what both have, and nothing that neither has
        for device in DEVICES:
            old, new, now = of_file(OLDEST)[device].items(), of_file(NEWEST)[device].items(), running[device].items()
            assert old & new <= now <= old | new
        return
    recorded = parse_ops(path.read_text())
    lines = [
        [f"{device} {op} {kind}" for device, ops in lists.items() for op, kind in sorted(ops.items())]
        for lists in (recorded, running)
    ]
    difference = "\n".join(
        difflib.unified_diff(*lines, f"docs/autocast_ops/{path.name}", torch.__version__, lineterm="")
    )
    assert not difference, (
        f"{difference}\n\nThis torch's autocast differs from the list in the docs. If that is right:\n"
        f"    python -m halfstep policy --ops > docs/autocast_ops/{path.name}"
    )


def test_what_moved_between_the_oldest_and_the_newest_torch() -> None:
    old, new = of_file(OLDEST), of_file(NEWEST)
    came = {device: {op: new[device][op] for op in new[device].keys() - old[device].keys()} for device in DEVICES}
    went = {device: {op: old[device][op] for op in old[device].keys() - new[device].keys()} for device in DEVICES}
    changed = {
        device: {op for op in old[device].keys() & new[device].keys() if old[device][op] != new[device][op]}
        for device in DEVICES
    }
    assert came == {
        "cpu": {"aten::linalg_matrix_sqrth": "float32"},
        "cuda": {"aten::linalg_matrix_sqrth": "float32", "aten::rms_norm": "float32"},
    }
    assert went == {
        # torch 2.15 has no torch.cholesky, torch.qr and named tensors
        "cpu": {
            "aten::cholesky": "float32",
            "aten::qr": "float32",
            "aten::index_copy.dimname": "promote",
            "aten::prod.dim_Dimname": "float32",
        },
        "cuda": {
            "aten::cumprod.dimname": "float32_set_dtype",
            "aten::cumsum.dimname": "float32_set_dtype",
            "aten::log_softmax.Dimname": "float32_set_dtype",
            "aten::norm.names_ScalarOpt_dim": "float32_append_dtype",
            "aten::prod.dim_Dimname": "float32_set_dtype",
            "aten::softmax.Dimname": "float32_set_dtype",
            "aten::sum.dim_DimnameList": "float32_set_dtype",
        },
    }
    assert changed == {"cpu": set(), "cuda": set()}


@pytest.mark.parametrize("minor", [OLDEST, NEWEST])
def test_a_list_names_its_torch(minor: str) -> None:
    assert f"in torch {minor}.0, by" in (LISTS / f"torch-{minor}.txt").read_text().splitlines()[0]
