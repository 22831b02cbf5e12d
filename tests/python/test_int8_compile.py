"""torch.compile on whole int8 models: one graph, halfstep's ops whole in it, and the bits of eager calls."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from halfstep.int8_layers import Int8Layer, Int8Linear, pack
from int8_compile_cases import EXPECTED, calls_in, calls_of, int8_model, noise
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.bfloat16]
SIZES = (8, 5, 12, 3)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """A backend, and the calls of halfstep's ops in each graph that it was given, which is one of ATen ops.

    inductor: whether the graphs are compiled; if not, they run op by op.
    """

    def __init__(self, inductor: bool) -> None:
        self.graphs: list[Counter[str]] = []
        self._inductor = inductor

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if self._inductor:
            return compile_fx(graph_module, inputs, inner_compile=self._compile)
        return aot_autograd(fw_compiler=self._compile)(graph_module, inputs)

    def _compile(self, graph_module: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        self.graphs.append(calls_in(graph_module.graph))
        return compile_fx_inner(graph_module, inputs, **options) if self._inductor else graph_module


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", EXPECTED)
def test_one_graph_has_all_ops_and_the_bits_of_eager_calls(
    kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler behind it: what the float operations in the graph are made into is no business of ours."""
    model, batch = int8_model(kind, dtype, device, monkeypatch)
    backend = Backend(inductor=False)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for size in SIZES:
            x = batch(size)
            assert torch.equal(compiled(x), model(x))
    assert backend.graphs == [EXPECTED[kind]] * 2  # of the first size, and of all sizes


@pytest.mark.slow  # a minute for all: Inductor compiles with the C++ compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", EXPECTED)
def test_inductor_calls_each_op_as_often(
    kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = int8_model(kind, dtype, device, monkeypatch)
    backend = Backend(inductor=True)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    # A graph that is in torch's cache would not reach the backend.
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        for size in SIZES:
            x = batch(size)
            # Inductor sums in another order, and rounds to bfloat16 less often than torch does.
            assert noise(compiled(x), model(x)) <= (0.002 if dtype == torch.float32 else 0.02)
        assert backend.graphs == [EXPECTED[kind]] * 2
        assert calls_of(compiled, x) == EXPECTED[kind]
        assert len(backend.graphs) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_int8_between_float_operations_without_reductions_has_equal_bits(device: str) -> None:
    """In float32, Inductor's additions and products are torch's."""
    layers = [Int8Linear(pack(torch.randn(16, 16)), input_scale=0.1), nn.ReLU()]
    layers += [Int8Linear(pack(torch.randn(8, 16)))]
    model = nn.Sequential(*layers).to(device)
    compiled = torch.compile(lambda x: model(x * 2) + 1, fullgraph=True)
    x = torch.randn(5, 16, device=device)
    assert torch.equal(compiled(x), model(x * 2) + 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["quantize_int8", "dequantize_int8"])
@pytest.mark.parametrize("view", ["sliced", "expanded", "permuted"])
def test_tensors_of_any_strides_are_quantized_in_compiled_code(view: str, op: str, device: str) -> None:
    x = torch.randint(-100, 100, (4, 6, 8), device=device)
    x = x.to(torch.int8) if op == "dequantize_int8" else x.float()
    x = {
        "sliced": lambda: x.transpose(0, 1)[:, :, ::2],
        "expanded": lambda: x[:, :, :1].transpose(0, 1).expand(6, 4, 5),
        "permuted": lambda: x.permute(2, 0, 1),
    }[view]()
    function = getattr(torch.ops.halfstep, op)
    expected = function(x, 0.5, 1)
    assert function(x.to("meta").as_strided(x.shape, x.stride()), 0.5, 1).stride() == expected.stride()
    assert torch.equal(torch.compile(lambda x: function(x, 0.5, 1), fullgraph=True)(x), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_are_loaded_later_are_used(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = int8_model("bag", torch.float32, device, monkeypatch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch(4)
    with torch.no_grad():
        before = compiled(x)
        other = copy.deepcopy(model)
        for module in other.modules():
            if isinstance(module, Int8Layer):
                state = module.get_extra_state()
                module.set_extra_state({**state, "weight": -state["weight"]})
        model.load_state_dict(other.state_dict())
        assert torch.equal(compiled(x), other(x))
        assert not torch.equal(compiled(x), before)
