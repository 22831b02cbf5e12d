"""Models traced for int8: what is traced, what is refused, the proof, and parts of a graph run alone."""

from __future__ import annotations

import concurrent.futures
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from halfstep.calibration_data import collect
from halfstep.int8_graph import subgraph, trace
from halfstep.int8_judge import call as call_batch
from halfstep.int8_runs import capture, disagreement, given_arguments, shapes_of
from int8_graph_cases import MODELS, call, made, run, traced
from torch import nn


class Branching(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x
        y = self.fc(x)
        return y if y.sum() > 0 else -y


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), inner, nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(F.relu(self.first(x))))


class Optional(nn.Module):
    """Parameters with defaults, as language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, twice: bool = False, *rest: Any, **more: Any
    ) -> dict[str, torch.Tensor]:
        if mask is not None:
            x = x * mask
        y = self.fc(x)
        return {"out": y + y if twice else y, "seen": x}


@pytest.mark.parametrize("name", MODELS)
def test_a_traced_model_keeps_its_layers_and_computes_the_same_bits(name: str) -> None:
    model, batch = made(name)
    graph_module, reason = trace(model)
    assert graph_module is not None, reason
    assert reason == ""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.modules.batchnorm._BatchNorm)
    kept = {name for name, module in model.named_modules() if isinstance(module, layers)}
    assert {name for name, module in graph_module.named_modules() if isinstance(module, layers)} == kept
    assert disagreement(graph_module, model, [batch, batch[:2]], call) == ""
    assert not any(module.training for module in graph_module.modules())
    names = [node.name for node in graph_module.graph.nodes]
    assert [node.name for node in copy.deepcopy(graph_module).graph.nodes] == names
    assert not any("drop" in name for name in names)


def test_a_trace_shares_the_memory_of_parameters_and_no_module() -> None:
    model, _ = made("resnet")
    graph_module = traced(model)
    assert graph_module.layer1 is not model.layer1
    assert graph_module.get_submodule("layer1.0.conv1") is not model.layer1[0].conv1
    assert graph_module.fc.weight.data_ptr() == model.fc.weight.data_ptr()


def test_control_flow_in_the_model_is_refused_with_its_reason() -> None:
    model = Branching().eval()
    graph_module, reason = trace(model)
    assert graph_module is None
    assert "control flow" in reason
    assert not hasattr(model, "last")


def test_control_flow_in_a_part_leaves_the_part_whole() -> None:
    model = Around(Branching()).eval()
    graph_module, reason = trace(model)
    assert graph_module is not None, reason
    assert reason.startswith("inner: left whole, TraceError")
    assert [node.target for node in graph_module.graph.nodes if node.op == "call_module"] == ["first", "inner", "last"]
    assert disagreement(graph_module, model, [torch.randn(4, 8)], call) == ""
    assert isinstance(graph_module.inner, Branching)
    graph_module, _ = trace(Around(Branching()).eval())
    assert not hasattr(graph_module.inner, "last")  # the tracer's stand-in for a tensor would stay there
    copy.deepcopy(graph_module)


def test_a_part_that_is_traced_within_a_part_that_cannot_be_is_left_with_it() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Around(nn.Sequential(Branching(), nn.ReLU()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.part(x)
            return y if bool(y.min() < 0) else x

    model = nn.Sequential(Wrapper(), nn.Linear(4, 2)).eval()
    graph_module, reason = trace(model)
    assert graph_module is not None, reason
    assert reason.startswith("0: left whole, ")
    assert "part" not in reason
    assert disagreement(graph_module, model, [torch.randn(4, 8)], call) == ""


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "in training mode"),
        (nn.Linear(4, 4).eval(), "a single layer"),
        (torch.jit.script(nn.Sequential(nn.Linear(4, 4)).eval()), "scripted"),
        (torch.compile(nn.Sequential(nn.Linear(4, 4)).eval()), "compiled"),
    ],
)
def test_models_that_are_not_traced(model: nn.Module, reason: str) -> None:
    graph_module, found = trace(model)
    assert graph_module is None
    assert reason in found


def test_a_model_with_hooks_is_not_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model.register_forward_hook(lambda module, args, out: out + 1)
    assert trace(model) == (None, "the model itself has hooks")


def test_a_model_that_cannot_be_copied_is_not_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model.lines = (line for line in "ab")
    graph_module, reason = trace(model)
    assert graph_module is None
    assert reason.startswith("the model cannot be copied: TypeError")


def test_scripted_modules_and_layers_called_twice() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, torch.jit.script(Around(nn.Linear(8, 8)))).eval()
    graph_module, reason = trace(model)
    assert graph_module is not None, reason
    assert [node.target for node in graph_module.graph.nodes if node.op == "call_module"] == ["0", "1", "0", "3"]
    assert disagreement(graph_module, model, [torch.randn(4, 8)], call) == ""


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding, nn.LSTM, nn.ConvTranspose2d, nn.MultiheadAttention])
def test_subclasses_of_layers_with_large_weights_are_called_whole(kind: type[nn.Module]) -> None:
    special = type("Special", (kind,), {"__module__": __name__, "forward": lambda self, x: x + self.a})
    layer = special(*{nn.ConvTranspose2d: (3, 3, 3), nn.MultiheadAttention: (8, 2)}.get(kind, (8, 8)))
    layer.a = nn.Parameter(torch.ones(8))
    graph_module = traced(nn.Sequential(nn.ReLU(), layer).eval())
    assert [node.target for node in graph_module.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert type(graph_module.get_submodule("1")) is special


@pytest.mark.parametrize("given", [("x",), ("x", "mask")])
def test_parameters_that_no_call_passes_keep_their_defaults(given: tuple[str, ...]) -> None:
    model = Optional().eval()
    batch = {name: torch.rand(4, 8) for name in given}

    def by_name(module: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return module(**batch)

    assert given_arguments(model, batch, by_name) == given
    assert not model._forward_pre_hooks
    graph_module, reason = trace(model, given=given)
    assert graph_module is not None, reason
    assert disagreement(graph_module, model, [batch], by_name) == ""
    assert [node.target for node in graph_module.graph.nodes if node.op == "placeholder"] == list(given)
    with pytest.raises(TypeError, match="twice"):
        graph_module(**batch, twice=True)
    scripted = torch.jit.script(graph_module)
    assert torch.equal(scripted(**batch)["out"], model(**batch)["out"])


def test_what_a_trace_baked_in_shows() -> None:
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if len(x) == 5 else x

    class Baked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    x = torch.randn(5, 3)
    found = disagreement(traced(Baked().eval()), Padded().eval(), [x], call)
    assert found == "on batch 0: the outputs differ, with fewer samples"


def test_an_addition_in_place_that_another_name_sees_is_a_disagreement() -> None:
    """torch.fx traces `x += y` as x = x + y."""

    class Seen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = y = x + 1
            x += 1
            return y

    model = Seen().eval()
    assert disagreement(traced(model), model, [torch.randn(3)], call) == "on batch 0: the outputs differ"


def test_outputs_of_another_shape_or_an_error_are_disagreements() -> None:
    graph_module = traced(nn.Sequential(nn.Flatten(1)).eval())
    x = torch.randn(4, 3, 2)
    assert "structure, shape or dtype" in disagreement(graph_module, nn.Sequential(nn.Flatten(0)).eval(), [x], call)
    graph_module = traced(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval())
    found = disagreement(graph_module, nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), [x], call)
    assert found.startswith("on batch 0: RuntimeError")


def test_batches_are_not_written_to() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4)).eval()
    batch = torch.randn(4, 8)
    kept = batch.clone()
    graph_module = traced(model)
    assert disagreement(graph_module, model, [batch], call) == ""
    shapes_of(graph_module, batch, call)
    capture(graph_module, batch, call, ["_1"])
    assert torch.equal(batch, kept)


def test_shapes_are_taken_at_two_batch_sizes_where_the_model_takes_them() -> None:
    model, batch = made("plain")
    shapes = shapes_of(traced(model), batch, call)
    assert shapes["fc2"] == ((torch.Size([5, 4]), torch.float32), (torch.Size([4, 4]), torch.float32))
    assert "size" not in shapes

    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, -1, 3)

    shapes = shapes_of(traced(Pairs().eval()), torch.randn(8, 3), call)
    assert [shape[0] for shape, _ in shapes["reshape"]] == [2, 2]
    assert len(shapes_of(traced(Pairs().eval()), torch.randn(2, 3), call)["reshape"]) == 1


def test_a_subgraph_computes_what_its_nodes_do() -> None:
    model, batch = made("resnet")
    graph_module = traced(model)
    names = ["layer1_0_conv2", "layer1_0_bn2", "add", "layer1_0_relu_1"]
    part, inputs = subgraph(graph_module, names)
    assert set(inputs) == {"maxpool", "layer1_0_relu"}
    values = capture(graph_module, batch, call, [*inputs, names[-1]])
    before = {name: value.clone() for name, value in values.items()}
    assert torch.equal(run_part(part, inputs, values), values[names[-1]])
    assert all(torch.equal(value, before[name]) for name, value in values.items())


def test_a_subgraph_writes_to_none_of_its_inputs_and_returns_all_that_is_read() -> None:
    model, batch = made("resnet")
    graph_module = traced(model)
    part, inputs = subgraph(graph_module, ["layer2_0_downsample_0", "layer2_0_downsample_1", "add_2"])
    values = capture(graph_module, batch, call, inputs)
    before = {name: value.clone() for name, value in values.items()}
    run_part(part, inputs, values)
    assert all(torch.equal(value, before[name]) for name, value in values.items())
    part, inputs = subgraph(graph_module, ["maxpool", "layer1_0_conv1"])
    assert inputs == ["relu"]
    values = capture(graph_module, batch, call, ["relu", "maxpool", "layer1_0_conv1"])
    for out, name in zip(run_part(part, inputs, values), ("maxpool", "layer1_0_conv1"), strict=True):
        assert torch.equal(out, values[name])


def run_part(part: nn.Module, inputs: list[str], values: dict[str, Any]) -> Any:
    with torch.no_grad():
        return part(*(values[name] for name in inputs))


def test_names_that_no_node_has() -> None:
    model, batch = made("mlp")
    graph_module = traced(model)
    with pytest.raises(ValueError, match="none of the nodes"):
        subgraph(graph_module, ["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        capture(graph_module, batch, call, ["fc1", "nothing"])


def test_a_traced_model_can_be_scripted_and_exported() -> None:
    for name in MODELS:
        model, batch = made(name)
        graph_module = traced(model)
        expected = run(model, batch)
        assert torch.equal(run(torch.jit.script(graph_module), batch), expected)
        program = torch.export.export(graph_module, (batch,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        assert torch.equal(run(program.module(), batch), expected)
        assert run(program.module(), batch[:3]).shape == expected[:3].shape


@dataclass
class Sample:
    x: torch.Tensor


def test_a_size_that_a_trace_baked_in_shows_in_a_dataclass() -> None:
    class Padded(nn.Module):
        def forward(self, sample: Sample) -> torch.Tensor:
            return sample.x + 1 if len(sample.x) == 5 else sample.x

    class Baked(nn.Module):
        def forward(self, sample: Sample) -> torch.Tensor:
            return sample.x + 1

    found = disagreement(traced(Baked().eval()), Padded().eval(), [Sample(torch.randn(5, 3))], call)
    assert found == "on batch 0: the outputs differ, with fewer samples"


class Masked(nn.Module):
    """A mask [tokens, tokens] that is not cut with the batch, though it is as long."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.matmul(mask, x) * (x.shape[0] if self.size is None else self.size)


@pytest.mark.parametrize("sizes", [(4, 3), (4, 4)], ids=["known to be shared", "in doubt"])
def test_a_mask_as_long_as_the_batch_hides_no_size_that_was_baked_in(sizes: tuple[int, int]) -> None:
    mask, model = torch.ones(4, 4).tril(), Masked(None).eval()
    data = collect(model, [(torch.randn(size, 4, 2), mask) for size in sizes], 1000)
    assert data[0].whole == (sizes[0] == sizes[1])
    graph_module, _ = trace(model)
    assert disagreement(graph_module, model, data, call_batch) == ""
    found = disagreement(traced(Masked(4).eval()), model, data[:1], call_batch)
    assert found == "on batch 0: the outputs differ, with fewer samples"


def test_a_traced_model_is_scripted_without_warnings() -> None:
    """GraphModule's own annotations make torch.jit.script warn of each of them; copies of the model are alike."""
    graph_module = traced(nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval())
    for model in (graph_module, copy.deepcopy(graph_module), subgraph(graph_module, ["_0", "_1"])[0]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # TorchScript itself is deprecated
            torch.jit.script(model)


class Waiting(nn.Module):
    """While it is traced it calls `inside`, where another thread has its turn."""

    def __init__(self, inside: Callable[[], None]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self._inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self._inside()
        return self.second(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        made = Waiting(self._inside)
        made.load_state_dict(self.state_dict())
        return made.eval()


def test_other_threads_call_and_trace_models_meanwhile() -> None:
    other, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(3, 4)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        asked: list[concurrent.futures.Future] = []

        def inside() -> None:
            called = threads.submit(other, x)
            assert torch.equal(called.result(60), other_output)
            asked.append(threads.submit(trace, other))  # waits until this trace is done

        other_output = other(x)
        model = Waiting(inside).eval()
        graph, why = trace(model)
        assert graph is not None, why
        assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["first", "second"]
        (found,) = asked
        traced, why = found.result(60)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert torch.equal(traced(x), other_output)
