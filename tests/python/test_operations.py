"""count_operations: against counts by hand, torch's profiler, and a dispatch mode."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from pathlib import Path

import halfstep
import pytest
import torch
from halfstep import count_operations
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

halfstep.load_library()

ROOT = Path(__file__).resolve().parents[2]
HALF = [torch.float16, torch.bfloat16]


def flat(counted) -> dict[tuple[str, str], int]:
    """(operation without its namespace, type) -> count."""
    rows = counted.by_operation().items()
    return {(name.split("::")[1], dtype): n for name, dtypes in rows for dtype, n in dtypes.items()}


def names_in_the_list() -> set[str]:
    text = (ROOT / "torch_ops" / "operation_list.cpp").read_text()
    aten, rest = text.split("kAten[] = {")[1].split("};", 1)
    ours = rest.split("kHalfstep[] = {")[1].split("};", 1)[0]
    quoted = re.compile(r'"(\w+)"')
    return {f"aten::{n}" for n in quoted.findall(aten)} | {f"halfstep::{n}" for n in quoted.findall(ours)}


# ---------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("dtype", HALF)
def test_a_network_counted_by_hand(device: torch.device, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4)).to(device)
    x, target = torch.randn(5, 8, device=device), torch.randint(4, (5,), device=device)
    with count_operations() as counted:
        with torch.autocast(device.type, dtype=dtype):
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
    half = str(dtype).removeprefix("torch.")
    # On the CPU torch's layer norm reads half as it is, beside its float32 weights; on CUDA autocast widens it first.
    norm = "mixed" if device.type == "cpu" else "float32"
    # torch asks for a softmax in the logits' own type, which CUDA's autocast leaves so; the CPU's casts the loss whole.
    softmax = "float32" if device.type == "cpu" else half
    assert flat(counted) == {
        ("addmm", half): 2,  # the two linear layers
        ("clamp_min", half): 1,  # ReLU calls it
        ("native_layer_norm", norm): 1,
        ("_log_softmax", softmax): 1,  # cross entropy: a softmax
        ("nll_loss_forward", "float32"): 1,  # and a loss
        ("nll_loss_backward", "float32"): 1,
        ("_log_softmax_backward_data", softmax): 1,
        ("mm", half): 3,  # gradients of both weights, and of the second layer's input; x needs none
        ("sum", half): 2,  # gradients of both biases
        ("native_layer_norm_backward", norm): 1,
        ("threshold_backward", half): 1,  # of ReLU
    }
    expected = {"float16": 0, "bfloat16": 0, "float32": 2, "float64": 0, "mixed": 0}
    expected[softmax] += 2
    expected[half] += 9
    expected[norm] += 2
    assert counted.by_dtype() == expected
    # Elements: x 40, weights 128 and 64, biases 16 and 4, hidden 80, logits 20; a cast moves 2 + 4 bytes of each.
    narrowed = [40, 128, 16, 64, 4, 20]  # the layers' inputs; in backward the gradient of the logits
    widened = [20, 128, 16, 64, 4]  # the logits; in backward the gradients of weights and biases
    if device.type == "cuda":
        narrowed += [80, 80]  # the second layer's input; the gradient of the norm's input
        widened += [80, 80]  # the norm's input; the gradient of the second layer's
    assert sorted(counted.casts()) == sorted(
        [("float32", half, len(narrowed), 6 * sum(narrowed)), (half, "float32", len(widened), 6 * sum(widened))]
    )


def test_one_linear_under_autocast_is_one_operation(device: torch.device) -> None:
    layer, x = nn.Linear(4, 4).to(device), torch.randn(2, 4, device=device)
    with count_operations() as counted, torch.autocast(device.type, dtype=torch.bfloat16), torch.no_grad():
        layer(x)
    assert flat(counted) == {("addmm", "bfloat16"): 1}


def test_types(device: torch.device) -> None:
    wide = torch.randn(3, 4, device=device)
    half, double, integers = wide.half(), wide.double(), torch.ones(3, 4, device=device).long()
    scalar = torch.ones((), device=device)
    cases = {
        "float16": [lambda: half + half, lambda: half * 2.5, lambda: half * scalar, lambda: half + integers],
        "float32": [lambda: wide - 1, lambda: scalar + scalar, lambda: wide.mul_(2), lambda: wide.exp_()],
        "float64": [lambda: double / 2, lambda: torch.tanh(double)],
        "mixed": [lambda: wide + half, lambda: wide.add_(double), lambda: torch.addcmul(wide, half, half)],
    }
    for dtype, functions in cases.items():
        for number, function in enumerate(functions):
            with count_operations() as counted:
                function()
            assert list(counted.by_operation().values()) == [{dtype: 1}], f"{dtype} {number}"
    with count_operations() as counted:  # out= is no input
        torch.add(half, half, out=torch.empty_like(wide))
    assert flat(counted) == {("add", "float16"): 1}


def test_what_is_not_counted(device: torch.device) -> None:
    x, integers = torch.randn(4, 4, device=device), torch.ones(4, device=device).long()
    with count_operations() as counted:
        x.t().reshape(16).clone().zero_()
        torch.cat([x, x]).copy_(torch.ones(8, 4, device=device))
        torch.rand_like(x), x > 0, x[integers], integers * integers, x.to(torch.complex64) * 2
        torch.ones(3, device="meta") + torch.ones(3, device="meta").half().float()
        nn.functional.dropout(x, training=False)
    assert counted.by_operation() == {}
    assert counted.casts() == []
    assert set(counted.by_dtype().values()) == {0}


def test_casts_and_their_bytes(device: torch.device) -> None:
    x = torch.randn(3, 5, device=device)
    out = torch.empty(2, 3, 5, device=device, dtype=torch.float64)
    with count_operations() as counted:
        x.half(), x.half()  # 15 elements of 4 + 2 bytes, twice
        x.to(torch.bfloat16).float()  # 6 bytes each way
        out.copy_(x)  # reads 15 floats, writes 30 doubles
        x.float(), x.long(), x.clone(), out.copy_(out), x.to(x)  # none
        x + 1.0, torch.rsub(x, 1.0)  # Python numbers
    assert counted.casts() == [
        ("bfloat16", "float32", 1, 90),
        ("float32", "float16", 2, 180),
        ("float32", "bfloat16", 1, 90),
        ("float32", "float64", 1, 60 + 240),
    ]


@pytest.mark.cuda
def test_a_cast_between_devices_is_one() -> None:
    with count_operations() as counted:
        torch.ones(10).to("cuda", torch.float16)
        torch.ones(10, device="cuda").to("cpu", torch.float16)
    assert counted.casts() == [("float32", "float16", 2, 120)]


def test_halfsteps_own_operations(device: torch.device) -> None:
    x = torch.randn(6, 8, device=device).half().requires_grad_()
    target = torch.randint(8, (6,), device=device)
    with count_operations() as counted:
        normed = torch.ops.halfstep.rms_norm(x, [8])
        torch.ops.halfstep.cross_entropy(normed, target).backward()
    assert flat(counted) == {
        ("norm_forward", "float16"): 1,
        ("cross_entropy_forward", "float16"): 1,
        ("cross_entropy_backward", "mixed"): 1,  # half logits, float32 sums
        ("norm_backward", "mixed"): 1,
    }


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_updates_of_optimizers_are_not_counted(device: torch.device, optimizer: str) -> None:
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        layer = nn.Linear(4, 4).to(device)
        step = getattr(torch.optim, optimizer)(layer.parameters(), lr=0.1, **options)
        with count_operations() as counted:
            layer(torch.ones(2, 4, device=device)).sum().backward()
            step.step()
            step.zero_grad()
            layer(torch.ones(2, 4, device=device))
        assert flat(counted) == {("addmm", "float32"): 2, ("mm", "float32"): 1, ("sum", "float32"): 2}


# ---------------------------------------------------------------------------------------------- independent counters


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.adaptive_avg_pool2d(self.layers(x), 1).flatten(1)).square().sum()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.block(self.embedding(x))
        return nn.functional.mse_loss(hidden, torch.zeros_like(hidden)) + hidden.norm()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6, num_layers=2)
        self.cell = nn.LSTMCell(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.cell(self.gru(x)[0][-1])
        return nn.functional.smooth_l1_loss(hidden.sigmoid(), torch.ones_like(hidden), reduction="sum")


MODELS = {
    "convolutions": (Convolutions, lambda: torch.randn(2, 3, 12, 12)),
    "attention": (Attention, lambda: torch.randint(11, (2, 7))),
    "recurrent": (Recurrent, lambda: torch.randn(5, 2, 4)),
}

PROFILED_TYPES = {"float": "float32", "double": "float64", "c10::Half": "float16", "c10::BFloat16": "bfloat16"}


def innermost(spans: list[tuple]) -> Counter[tuple]:
    """Count what is behind thread, start and end, of the spans of time that hold no other span."""
    spans = sorted(spans, key=lambda span: (span[0], span[1], -span[2]))
    # In this order, a span that holds others is followed by one that it holds.
    following = [*spans[1:], None]
    return Counter(
        span[3:]
        for span, later in zip(spans, following, strict=False)
        if later is None or later[0] != span[0] or later[1] >= span[2]
    )


def operations_profiled(events, listed: set[str]) -> Counter[tuple[str, str]]:
    spans = []
    for event in events:
        name = event.name().removesuffix("_")
        dtypes = event.dtypes()
        if name == "aten::sum" and len(dtypes) == 5:  # mean() on the CPU calls it with out=
            dtypes = dtypes[:4]
        tensors = [(t, s) for t, s in zip(dtypes, event.shapes(), strict=False) if t in PROFILED_TYPES]
        types = {t for t, s in tensors if s} or {t for t, _ in tensors}
        if name.split("_backward")[0] in listed and types:
            dtype = PROFILED_TYPES[types.pop()] if len(types) == 1 else "mixed"
            spans.append((event.start_thread_id(), event.start_ns(), event.end_ns(), name.split("::")[1], dtype))
    return innermost(spans)


def casts_profiled(events) -> Counter[tuple[str, str, int]]:
    """(from, to, bytes) -> how many; every cast of torch ends in a copy_."""
    spans = []
    for event in events:
        if event.name() == "aten::copy_":
            target, source = (PROFILED_TYPES.get(t) for t in event.dtypes()[:2])
            sizes = [math.prod(shape) for shape in event.shapes()[:2]]
            is_number = source == "float64" and event.shapes()[1] == []  # no model has tensors of this type
            if target and source and target != source and not is_number:
                moved = sizes[0] * getattr(torch, target).itemsize + sizes[1] * getattr(torch, source).itemsize
                spans.append((event.start_thread_id(), event.start_ns(), event.end_ns(), source, target, moved))
    return innermost(spans)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [None, *HALF], ids=str)
def test_the_profiler_counts_the_same(device: torch.device, name: str, dtype: torch.dtype | None) -> None:
    make, make_input = MODELS[name]
    model, x = make().to(device), make_input().to(device)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile,
        count_operations() as counted,
    ):
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(x)
        loss.backward()
    events = profile.profiler.kineto_results.events()
    operations, casts = operations_profiled(events, names_in_the_list()), casts_profiled(events)
    assert flat(counted) == dict(operations)
    assert len(operations) >= 8
    counts, moved = Counter(), Counter()
    for (source, target, each), n in casts.items():
        counts[source, target] += n
        moved[source, target] += n * each
    assert {(c.source, c.target): (c.count, c.bytes) for c in counted.casts()} == {
        pair: (counts[pair], moved[pair]) for pair in counts
    }
    assert bool(casts) == (dtype is not None)


# ------------------------------------------------------------------------------------------- TorchScript and compilers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.norm(self.first(x)).tanh() * 2.0 + x).mean()


def test_torchscript_counts_as_eager(no_jit_fuser: None, device: torch.device) -> None:
    model = Block().to(device)
    x = torch.randn(3, 8, device=device)
    scripted = torch.jit.script(model)
    with count_operations() as eager:
        model(x).backward()
    for _ in range(4):
        with count_operations() as counted:
            scripted(x)
        with count_operations() as expected, torch.no_grad():
            model(x)
        forward = counted.by_dtype()
        assert forward == expected.by_dtype()
    assert eager.by_dtype()["float32"] > forward["float32"]


def test_operations_on_threads_that_torchscript_forks() -> None:
    def forked(x: torch.Tensor) -> torch.Tensor:
        futures = [torch.jit.fork(torch.mm, x, x) for _ in range(8)]
        return torch.stack([torch.jit.wait(future) for future in futures]).sum()

    scripted = torch.jit.script(forked)
    with count_operations() as counted:
        scripted(torch.randn(4, 4))
    assert flat(counted) == {("mm", "float32"): 8, ("sum", "float32"): 1}


def test_the_counter_in_torchscript() -> None:
    @torch.jit.script
    def products(x: torch.Tensor) -> tuple[list[tuple[str, str, int]], torch.Tensor]:
        counter = torch.classes.halfstep.OperationCounter()
        counter.start()
        x = torch.mm(x, x)
        counter.reset()
        x = torch.mm(x, x)
        counter.stop()
        x = torch.mm(x, x)
        return counter.counts(), x

    assert products(torch.randn(3, 3))[0] == [("aten::mm", "float32", 1)]


def test_tracing_counts_nothing() -> None:
    torch._dynamo.reset()
    model, x = Block(), torch.randn(3, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    counts = []
    for _ in range(2):  # the first call compiles
        model.zero_grad()
        with count_operations() as counted:
            compiled(x).backward()
        counts.append(counted.by_operation())
    assert counts[0] == counts[1]
    with count_operations() as counted:
        torch.export.export(model, (x,))
    assert counted.by_operation() == {}


# ------------------------------------------------------------------------------------------------------- start and stop


def test_one_count_at_a_time() -> None:
    x = torch.ones(2)
    with count_operations() as counted:
        with pytest.raises(RuntimeError, match="another count runs in this process"), count_operations():
            pass
        other = torch.classes.halfstep.OperationCounter()
        assert not other.start()
        other.stop()  # of a counter that does not run: nothing
        x + x
    assert counted.by_dtype()["float32"] == 1
    assert other.counts() == []
    assert other.start()
    del other  # stops
    with count_operations() as counted:
        x + x
    x + x
    assert counted.by_dtype()["float32"] == 1


def test_a_counter_goes_on_where_it_stopped() -> None:
    counter, x = torch.classes.halfstep.OperationCounter(), torch.ones(2)
    counter.stop()
    for _ in range(3):
        assert counter.start()
        assert not counter.start()
        x + x
        counter.stop()
        counter.stop()
        x + x
    assert counter.counts() == [("aten::add", "float32", 3)]
    counter.reset()
    assert counter.counts() == []


def test_only_the_thread_that_started_it_counts() -> None:
    x = torch.ones(2)
    with count_operations() as counted:
        thread = threading.Thread(target=lambda: [x * x for _ in range(10)])
        thread.start()
        thread.join()
        x + x
    assert flat(counted) == {("add", "float32"): 1}


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient.exp()
        raise ValueError("no gradient")


def test_operations_that_raise(device: torch.device) -> None:
    x = torch.ones(2, 3, device=device, requires_grad=True)
    with count_operations() as counted:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                nn.functional.linear(x, x.t())
        with pytest.raises(ValueError, match="no gradient"):
            Raises.apply(x).backward(torch.ones(2, 3, device=device))
        nn.functional.linear(x, x)
    product = {("mm", "float32"): 1}
    assert flat(counted) == {("mul", "float32"): 1, ("exp", "float32"): 1, **product}


class Stops(TorchDispatchMode):
    def __init__(self, counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counter.stop()
        out = func(*args, **(kwargs or {}))
        assert self.counter.start()
        return out


def test_stopping_within_an_operation() -> None:
    counter, x = torch.classes.halfstep.OperationCounter(), torch.ones(2)
    counter.start()
    with Stops(counter):
        x + x
    x * x
    counter.stop()
    assert counter.counts() == [("aten::mul", "float32", 1)]


# ---------------------------------------------------------------------------------------------------- list and table


def test_every_listed_name_is_an_operator_of_torch() -> None:
    present = {schema.name for schema in torch._C._jit_get_all_schemas()}
    names = names_in_the_list()
    backward = {name.split("_backward")[0] for name in present}
    assert names - present - backward == set()
    assert len(names) > 300


def test_the_table() -> None:
    x = torch.ones(2, 3)
    with count_operations() as counted:
        x + x, x + x, torch.mm(x.half(), x.t().half())
    assert counted.table() == "\n".join(
        [
            "operation  float16  float32",
            "aten::add                 2",
            "aten::mm         1",
            "all              1        2",
            "2 casts from float32 to float16, 72 bytes",
        ]
    )
