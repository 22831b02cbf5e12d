"""torch.classes.halfstep.StabilityMonitor: from Python, in TorchScript, in copies and in CUDA graphs."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from halfstep import PrecisionPlan, load_library
from halfstep.layer_watch import watching
from halfstep.policy import PlannedLayer
from torch import nn

load_library()

# Layout: csrc/include/halfstep/stability.h.
SEEN, ELEMENTS, NON_FINITE, EARLIEST, MAXIMUM, BEYOND, SQUARES, ZEROS, BELOW_HALF = range(9)
OUTPUT, OUTPUT_GRADIENT, INPUT_GRADIENT = range(3)


def monitor_of(*names: str, **options):
    plan = PrecisionPlan("test", [PlannedLayer(name, "Linear", "float16", "") for name in names])
    return torch.classes.halfstep.StabilityMonitor(plan._plan, **options)


def reference(tensors: list[torch.Tensor]) -> dict[int, float]:
    """The statistics in float64, one tensor after the other."""
    flat = [tensor.detach().double().flatten() for tensor in tensors]
    finite = [values[values.isfinite()] for values in flat]
    clean = [values for values in flat if values.isfinite().all()]
    return {
        SEEN: len(flat),
        ELEMENTS: sum(values.numel() for values in flat),
        NON_FINITE: sum(int((~values.isfinite()).sum()) for values in flat),
        MAXIMUM: max((values.abs().max().item() for values in finite if values.numel()), default=0.0),
        SQUARES: sum(values.square().sum().item() for values in clean),
        ZEROS: sum(int((values == 0).sum()) for values in clean),
        BELOW_HALF: sum(int(((values != 0) & (values.abs() < 2.0**-14)).sum()) for values in clean),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_those_of_float64(device: torch.device, dtype: torch.dtype) -> None:
    monitor = monitor_of("a", "b")
    tensors = [torch.randn(1000, device=device).mul(scale).relu().to(dtype) for scale in (1.0, 1e-5, 1e4, 1e15, 3e-39)]
    tensors.append(torch.randn(7, 100_003, device=device).to(dtype))
    for tensor in tensors:
        monitor.watch_output(1, tensor, False)
    row = monitor.rows()[1, OUTPUT]
    for column, value in reference(tensors).items():
        assert row[column].item() == pytest.approx(value, rel=1e-5), column
    assert monitor.rows()[0].abs().max() == 0.0
    monitor.reset()
    assert monitor.rows().abs().max() == 0.0


def test_a_model_is_watched_without_being_changed(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)).to(device)
    x = torch.randn(3, 4, device=device, requires_grad=True)
    seen: list[torch.Tensor] = []
    model[2].register_full_backward_hook(lambda module, inward, outward: seen.append(outward[0].clone()))

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        x.grad = None
        loss = model(x).square().sum()
        loss.backward()
        return [loss.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]

    expected, before = run(), {name: dict(vars(module)) for name, module in model.named_modules()}
    monitor = monitor_of("0", "1", "2")
    layers = {module: number for number, module in enumerate(model)}
    with watching(monitor, layers, gradients=True):
        loss = model(x).square().sum()
    model.zero_grad()
    x.grad = None
    loss.backward()
    got = [loss.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert {name: vars(module) for name, module in model.named_modules()} == before
    assert len(seen) == 2, "the user's own hooks run"
    rows = monitor.rows()
    assert rows[0, OUTPUT, ELEMENTS] == 24
    assert rows[2, OUTPUT, ELEMENTS] == 6
    assert rows[2, OUTPUT_GRADIENT, MAXIMUM].item() == pytest.approx(seen[0].abs().max().item())
    assert rows[0, INPUT_GRADIENT, MAXIMUM].item() == pytest.approx(x.grad.abs().max().item())
    assert rows[1, INPUT_GRADIENT, SEEN] == 0, "a layer that writes to its input is given no view"
    run()
    assert torch.equal(monitor.rows(), rows), "no hook is left"


def test_what_each_of_several_readers_sends_on_is_told_apart(device: torch.device) -> None:
    x = torch.ones(4, device=device, requires_grad=True) * 1.0
    monitor = monitor_of("a", "b")
    a = monitor.watch_input(0, x) * 3
    b = monitor.watch_input(1, x) * 5
    (a + b).sum().backward()
    assert monitor.rows()[0, INPUT_GRADIENT, MAXIMUM] == 3
    assert monitor.rows()[1, INPUT_GRADIENT, MAXIMUM] == 5


class Scripted(nn.Module):
    """Holds a monitor, as TorchScript may."""

    def __init__(self, monitor) -> None:
        super().__init__()
        self.monitor = monitor
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.monitor.begin_step()
        y = self.layer(self.monitor.watch_input(0, x))
        self.monitor.watch_output(0, y, True)
        return y


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_torchscript(device: torch.device) -> None:
    scripted = torch.jit.script(Scripted(monitor_of("layer", threshold=0.5, hold=3))).to(device)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    y = loaded(torch.ones(2, 4, device=device))
    y.sum().backward()
    rows = loaded.monitor.rows()
    assert rows[0, OUTPUT, ELEMENTS] == 8
    assert rows[0, OUTPUT_GRADIENT, SQUARES] == 8
    assert loaded.monitor.to_json() == scripted.monitor.to_json()


def test_copies_and_pickles_have_the_states_and_no_statistics() -> None:
    monitor = monitor_of("a", "b", threshold=0.25, hold=2)
    summary = monitor.summary()
    summary[1, 0] = 0.5  # lost
    assert monitor.observe(3, summary, "usual") == []
    ((batch, layer, before, after, score, hold, reason),) = monitor.decide(3, 1024.0)
    assert (batch, layer, before, after, score, hold) == (3, "b", "half", "float32", 0.5, 2)
    assert "too small" in reason
    assert monitor.half_share() == 0.5
    monitor.watch_output(0, torch.ones(3), False)
    for other in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert other.to_json() == monitor.to_json()
        assert PrecisionPlan._of(other.plan()) == PrecisionPlan._of(monitor.plan())
        assert other.rows().abs().max() == 0.0


@pytest.mark.cuda
def test_in_a_cuda_graph() -> None:
    monitor = monitor_of("a")
    weight = torch.tensor([1.0, 2.0, 3.0], device="cuda", requires_grad=True)
    x = torch.tensor([1.0, 1.0, 1.0], device="cuda")

    def step() -> None:
        monitor.begin_step()
        y = x * weight
        monitor.watch_output(0, y, True)
        y.sum().backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        weight.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    monitor.reset()
    graph.replay()
    x.copy_(torch.tensor([0.0, float("inf"), 1.0]))
    graph.replay()
    rows = monitor.rows()
    assert rows[0, OUTPUT, SEEN] == 2
    assert rows[0, OUTPUT, NON_FINITE] == 1
    assert rows[0, OUTPUT, EARLIEST] == 1.0, "places are those of the capture"
    assert rows[0, OUTPUT_GRADIENT, SQUARES] == 6


def test_bad_arguments() -> None:
    monitor = monitor_of("a")
    with pytest.raises(ValueError, match="layer is 1, expected 0 to 0"):
        monitor.watch_output(1, torch.ones(1), True)
    with pytest.raises(ValueError, match="expected 'usual', 'unstable' or 'float32'"):
        monitor.observe(0, monitor.summary(), "odd")
    with pytest.raises(ValueError, match="16 values|2 values|expected 8"):
        monitor.observe(0, torch.zeros(2, dtype=torch.float64), "usual")
    with pytest.raises(ValueError, match="float64"):
        monitor.observe(0, torch.zeros(8), "usual")
    with pytest.raises(ValueError, match="threshold is 0"):
        monitor_of("a", threshold=0.0)
    with pytest.raises(ValueError, match="layers"):
        monitor.restore("{}")
