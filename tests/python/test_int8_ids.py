"""Layers called from Python hand over a number for their weights; graphs, copies and files know nothing of it."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from halfstep.int8_fake import FakePackedInt8
from halfstep.int8_layers import Int8Conv1d, Int8Conv2d, Int8Linear, pack
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

ops = torch.ops.halfstep
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Int8Linear(pack(torch.randn(6, 8), torch.randn(6)), input_scale=0.05), (3, 8)),
    "conv2d": (lambda: Int8Conv2d(pack(torch.randn(6, 4, 3, 3), torch.randn(6), padding=1)), (2, 4, 5, 5)),
    "conv1d": (lambda: Int8Conv1d(pack(torch.randn(6, 4, 1, 3), torch.randn(6), padding=(0, 1))), (2, 4, 5)),
}


def called(function: Callable[[], object]) -> set[str]:
    """Return the ops of halfstep's that run, by their names."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {
        event.key.removeprefix("halfstep::") for event in profile.key_averages() if event.key.startswith("halfstep")
    }


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_calls_from_python_give_the_bits_of_calls_with_the_object(name: str, device: torch.device) -> None:
    make, shape = CASES[name]
    layer, x = make().to(device), torch.randn(shape, device=device)
    scripted = torch.jit.script(layer)
    assert torch.equal(layer(x), scripted(x))
    op = "int8_linear" if name == "linear" else "int8_conv2d"
    assert f"{op}_by_id" in called(lambda: layer(x))
    assert called(lambda: scripted(x)) & {op, f"{op}_by_id"} == {op}


def test_an_id_names_one_object_as_long_as_it_lives() -> None:
    packed, other, x = pack(torch.randn(4, 8)), pack(torch.randn(4, 8)), torch.randn(2, 8)
    number = packed.id()
    assert packed.id() == number != other.id()
    assert torch.equal(ops.int8_linear_by_id(x, number), ops.int8_linear(x, packed))
    second = [packed]
    del packed
    gc.collect()
    assert torch.equal(ops.int8_linear_by_id(x, number), ops.int8_linear(x, second[0]))
    second.clear()
    gc.collect()
    for wrong in (number, 0, -1, 1 << 40):
        with pytest.raises(ValueError, match=f"no object of this process has the id {wrong}"):
            ops.int8_linear_by_id(x, wrong)
    assert pack(torch.randn(4, 8)).id() > number


def test_memory_is_given_back() -> None:
    kept = torch.randn(64, 64).char()
    storage = kept.untyped_storage()._weak_ref()
    packed = torch.classes.halfstep.PackedInt8(kept, torch.ones(64), None)
    packed.id()
    del kept
    assert not torch.UntypedStorage._expired(storage)
    del packed
    gc.collect()
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state", "attribute", "move"])
def test_copies_and_changed_layers_use_their_own_weights(way: str) -> None:
    make, shape = CASES["linear"]
    layer, other, x = make(), make(), torch.randn(shape)
    expected = layer(x), other(x)
    assert not torch.equal(*expected)
    if way in ("deepcopy", "pickle"):
        twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
        assert torch.equal(twin(x), expected[0])
        assert twin._id.of(twin.packed) != layer._id.of(layer.packed)
        del layer
        gc.collect()
        assert torch.equal(twin(x), expected[0])
        return
    if way == "state":
        layer.load_state_dict(other.state_dict())
    elif way == "attribute":
        layer.packed = other.packed
    else:
        layer.packed = layer.packed.to(torch.device("cpu"))
    assert torch.equal(layer(x), expected[0 if way == "move" else 1])


@pytest.mark.parametrize("name", CASES)
def test_graphs_hold_the_object(name: str) -> None:
    make, shape = CASES[name]
    layer, x = make().eval(), torch.randn(shape)
    expected = layer(x)
    with torch.no_grad(), pytest.warns(DeprecationWarning, match="deprecated"):
        traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert "by_id" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), expected)
    program = torch.export.export(layer, (x,))
    assert "by_id" not in str(program.graph)
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    graph = make_fx(lambda x: layer(x))(x)
    assert "by_id" not in graph.code
    assert "by_id" not in make_fx(lambda x: layer(x), pre_dispatch=True)(x).code
    with Ops() as mode:
        assert torch.equal(layer(x), expected)
    assert not any("by_id" in each for each in mode.seen)


def test_a_residual_of_another_class_sees_the_op_of_objects() -> None:
    seen: list[str] = []

    class Other(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    make, shape = CASES["linear"]
    layer, x = make(), torch.randn(shape)
    layer(x, torch.randn(3, 6).as_subclass(Other))
    assert any("int8_linear" in each for each in seen)
    assert not any("by_id" in each for each in seen)


def test_exports_know_all_methods_of_the_object(caplog: pytest.LogCaptureFixture) -> None:
    make, shape = CASES["linear"]
    layer, x = make().eval(), torch.randn(shape)
    layer(x)
    torch.export.export(layer, (x,))
    assert "doesn't implement" not in caplog.text
    with pytest.raises(NotImplementedError, match="no meaning in a traced program"):
        FakePackedInt8().id()


def test_former_weights_die_at_once() -> None:
    kept = torch.randn(6, 8).char()
    storage = kept.untyped_storage()._weak_ref()
    layer = Int8Linear(torch.classes.halfstep.PackedInt8(kept, torch.ones(6), None))
    layer(torch.randn(3, 8))
    del kept
    assert not torch.UntypedStorage._expired(storage)
    layer.load_state_dict(Int8Linear(pack(torch.randn(6, 8))).state_dict())
    gc.collect()
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)


@pytest.mark.parametrize("name", CASES)
def test_tensors_without_values(name: str) -> None:
    make, shape = CASES[name]
    layer, x = make(), torch.randn(shape)
    expected = layer(x)
    out = layer(x.to("meta"))
    assert out.is_meta
    assert out.shape == expected.shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == expected.shape


def test_threads_share_a_layer_that_has_no_id_yet() -> None:
    make, shape = CASES["linear"]
    x = torch.randn(shape)
    for _ in range(20):
        layer = make()
        expected = torch.jit.script(layer)(x)
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(out, expected) for out in pool.map(layer, [x] * 8))
