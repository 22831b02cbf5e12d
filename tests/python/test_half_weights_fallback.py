"""What fails on half copies and works under autocast: it gets the float32 parameter, which has no copy from then on."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from halfstep.half_tensor import NOT_IN_HALF, OF_NORM
from test_half_weights import WIDTH, WORDS, Run
from test_half_weights_edges import Net
from torch import nn
from torch.nn import functional as F


class Directly(nn.Module):
    """Holds a matrix and a vector, and does one thing with them on a float32 stream."""

    def __init__(self, what) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(WIDTH) + 0.01 * torch.randn(WIDTH, WIDTH))
        self.vector = nn.Parameter(torch.rand(WIDTH))
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.what(self, x.float())


def log_determinant(module: Directly, x: torch.Tensor) -> torch.Tensor:
    return x @ module.matrix + torch.slogdet(module.matrix)[1]


def masked_scatter(module: Directly, x: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[0, 0] = True
    return x.masked_scatter(mask, module.vector)


def interpolation(module: Directly, x: torch.Tensor) -> torch.Tensor:
    return torch.lerp(x, x.roll(1, 1), module.vector)


def interpolation_by_name(module: Directly, x: torch.Tensor) -> torch.Tensor:
    return torch.lerp(x, x.roll(1, 1), weight=module.vector)


def layer_norm(module: Directly, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (WIDTH,), module.vector, module.vector)


def group_norm(module: Directly, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x.transpose(1, 2), 2, module.vector, module.vector).transpose(1, 2)


def batch_norm(module: Directly, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x.transpose(1, 2), None, None, module.vector, module.vector, training=True).transpose(1, 2)


def of_a_result(module: Directly, x: torch.Tensor) -> torch.Tensor:
    """The operation that fails sees no parameter."""
    return torch.lerp(x, x.roll(1, 1), torch.sigmoid(module.vector))


def log_determinant_of_a_result(module: Directly, x: torch.Tensor) -> torch.Tensor:
    return x @ module.matrix + torch.slogdet(module.matrix + module.matrix.t())[1]


DIRECT = [log_determinant, masked_scatter, interpolation, interpolation_by_name, layer_norm, group_norm, batch_norm]
DERIVED = [of_a_result, log_determinant_of_a_result]


def pair(device: torch.device, middle) -> tuple[Run, Run]:
    """Return the same training on half copies, of the embedding too, and as the plain loop."""
    runs = []
    for capture in (True, False):
        torch.manual_seed(0)
        runs.append(Run(device, Net(middle()), capture=capture))
    return runs[0], runs[1]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("what", [*DIRECT, *DERIVED])
def test_what_fails_in_half_gets_float32(device: torch.device, what, compiled: bool) -> None:
    torch._dynamo.reset()
    half, plain = pair(device, lambda: Directly(what))
    counter = torch._dynamo.testing.CompileCounter()
    if compiled:
        half.model.compile(backend=counter, fullgraph=True)
    assert half.losses(6) == pytest.approx(plain.losses(6), rel=0.05)
    assert half.model.head.weight in half.half.copies
    assert counter.frame_count == (1 if compiled else 0)
    if device.type == "cuda" and what not in (layer_norm, group_norm, batch_norm):
        return  # which of these fail in half there is torch's matter
    name = "middle.matrix" if what in (log_determinant, log_determinant_of_a_result) else "middle.vector"
    reason = OF_NORM if what in (layer_norm, group_norm, batch_norm) else NOT_IN_HALF
    assert half.half.kept[name] == reason
    assert reason in half.step.explain()
    assert half.half.generation == 1


def test_a_bilinear_layer_on_a_float32_stream(device: torch.device) -> None:
    class Twice(nn.Bilinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float(), x.float())

    for residual in ("half", "float32"):
        torch.manual_seed(0)
        half = Run(device, Net(Twice(WIDTH, WIDTH, WIDTH)), residual=residual)
        torch.manual_seed(0)
        plain = Run(device, Net(Twice(WIDTH, WIDTH, WIDTH)), capture=False)
        assert half.losses(4) == pytest.approx(plain.losses(4), rel=0.05 if residual == "half" else 0)
        # On CUDA autocast promotes a bilinear product to the wider input's float32, which a copy does not hinder.
        assert (device.type == "cuda" and residual == "half") or "middle.weight" in half.half.kept


def test_a_new_way_through_a_compiled_module_is_looked_at_when_it_fails(device: torch.device) -> None:
    class Later(nn.Linear):
        later = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + (torch.slogdet(self.weight)[1] if self.later else 0)

    torch._dynamo.reset()
    half, plain = pair(device, lambda: Later(WIDTH, WIDTH))
    half.model.compile(backend="eager")
    for later in (False, True):
        half.model.middle.later = plain.model.middle.later = later
        assert half.losses(4) == pytest.approx(plain.losses(4), rel=0.05)
    assert half.half.kept["middle.weight"] == NOT_IN_HALF  # slogdet has no half kernel anywhere


def test_an_error_that_float32_has_too_is_the_one_raised(device: torch.device) -> None:
    calls: list[torch.Tensor] = []

    class Wrong(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            try:
                return x @ self.weight[:3]
            except RuntimeError as error:
                raise ValueError("in forward") from error

    class Outer(Directly):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.vector

    def middle() -> nn.Module:
        module = Outer(None)
        module.inner = Wrong(WIDTH, WIDTH)
        return module

    half, _ = pair(device, middle)
    with pytest.raises(ValueError, match="in forward") as caught:
        half.step()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(calls) == 2, "once more where it was raised, and not for the modules around it"
    assert half.half.generation == 0
    assert half.half._final is None


def test_an_error_for_lack_of_memory_is_not_tried_again(device: torch.device) -> None:
    calls: list[torch.Tensor] = []

    class Large(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            raise torch.OutOfMemoryError("in forward")

    half, _ = pair(device, lambda: Large(WIDTH, WIDTH))
    with pytest.raises(torch.OutOfMemoryError):
        half.step()
    assert len(calls) == 1


def test_a_compiled_module_that_has_no_room_as_it_is_runs_compiled(device: torch.device) -> None:
    class Large(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling():
                raise torch.OutOfMemoryError("in forward")
            return super().forward(x)

    torch._dynamo.reset()
    half, _ = pair(device, lambda: Large(WIDTH, WIDTH))
    half.model.compile(backend="eager", fullgraph=True)
    losses = half.losses(4)
    assert losses[-1] < losses[0]


def test_a_weight_in_forward_is_a_parameter(device: torch.device) -> None:
    class Asks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.weight, nn.Parameter)
            assert not isinstance(self.weight * 2, nn.Parameter)
            assert dict(self.named_parameters())["weight"] is self.weight
            self.seen = self.weight.dtype
            return super().forward(x)

    half, _ = pair(device, lambda: Asks(WIDTH, WIDTH))
    half.losses(3)
    assert half.model.middle.seen is torch.bfloat16


@pytest.mark.parametrize("frozen", [True, False])
def test_a_weight_that_forward_registers_once_more_is_the_parameter(device: torch.device, frozen: bool) -> None:
    class Again(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.other = self.weight
            return F.linear(x, self.other, self.bias)

    half, plain = pair(device, lambda: Again(WIDTH, WIDTH).requires_grad_(not frozen))
    assert half.losses(4) == pytest.approx(plain.losses(4), rel=0.05)
    assert half.model.middle.other is half.model.middle.weight


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_does_not_zero_its_gradients_is_refused(device: torch.device, set_to_none: bool) -> None:
    run = Run(device, nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)))

    def train(zero: bool) -> torch.Tensor:
        if zero:
            run.optimizer.zero_grad(set_to_none=set_to_none)
        loss = run.loss()
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        return loss.detach()

    step = run.manager.capture(train)
    for _ in range(2):
        step(True)
    with pytest.raises(RuntimeError, match=r"call optimizer.zero_grad\(\) in it"):
        step(False)
    run.optimizer.zero_grad()  # outside is as good
    assert step(False).isfinite()
