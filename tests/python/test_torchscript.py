"""The ops and the scaler class in TorchScript: in this process, and in one without Python."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import halfstep
import pytest
import torch
from without_python import run_without_python

halfstep.load_library()
warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.jit")


class Unscale(torch.nn.Module):
    """Calls the ops by name."""

    def forward(
        self, grads: list[torch.Tensor], scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = torch.zeros((), device=scale.device)
        norm = torch.zeros((), device=scale.device)
        statistics = torch.zeros(len(grads), 6, device=scale.device)
        torch.ops.halfstep.check_gradients_(grads, scale, found, norm, statistics)
        copies = [grad.clone() for grad in grads]
        torch.ops.halfstep.unscale_(copies, scale, found)
        return torch.cat([copy.float().flatten() for copy in copies]), torch.stack([found, norm]), statistics


class Classifier(torch.nn.Module):
    """The norms and cross entropy by name, and the gradient of the loss."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        width = x.size(-1)
        hidden = torch.ops.halfstep.layer_norm(x, [width], weight)
        hidden = torch.ops.halfstep.rms_norm(hidden, [width], weight)
        loss = torch.ops.halfstep.cross_entropy(torch.ops.halfstep.group_norm(hidden, 4), target)
        gradient = torch.autograd.grad([loss], [x])[0]
        assert gradient is not None
        return loss.detach(), gradient


class Descent(torch.nn.Module):
    """Holds a scaler and minimises a quadratic with it: gradients by hand, since scripts have no optimizer."""

    def __init__(self, scaler) -> None:
        super().__init__()
        self.scaler = scaler

    def forward(self, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p = start.clone()
        for i in range(6):
            grad = self.scaler.scale(2.0 * p)
            if i == 2:
                grad = grad / torch.zeros_like(grad)
            found = self.scaler.unscale_([grad])
            p = torch.where(found == 0.0, p - 0.25 * grad, p)
            self.scaler.update()
        return p, self.scaler.counters().clone(), torch.tensor(self.scaler.get_scale())


def grads(device: torch.device) -> list[torch.Tensor]:
    return [torch.randn(1000, device=device) * 9, torch.randn(33, device=device).half(), torch.empty(0, device=device)]


@pytest.fixture
def run_script(build_folder: Path) -> Path:
    program = build_folder / "tests" / "halfstep_run_script"
    assert program.exists(), f"{program} is not built; run these tests with make test"
    return program


def test_ops_in_a_scripted_module(device: torch.device) -> None:
    inputs = grads(device), torch.tensor(512.0, device=device)
    for got, expected in zip(torch.jit.script(Unscale())(*inputs), Unscale()(*inputs), strict=True):
        assert torch.equal(got, expected)


def test_the_same_bits_in_a_process_without_python(device: torch.device, run_script: Path, tmp_path: Path) -> None:
    inputs = [grads(device), torch.tensor(512.0, device=device)]
    outputs = run_without_python(run_script, torch.jit.script(Unscale()), inputs, tmp_path)
    for got, expected in zip(outputs, Unscale()(*inputs), strict=True):
        assert torch.equal(got, expected)


def test_norms_and_cross_entropy_in_a_process_without_python(
    device: torch.device, run_script: Path, tmp_path: Path
) -> None:
    x = torch.randn(6, 16, device=device).bfloat16()
    inputs = [x, torch.rand(16, device=device), torch.arange(6, device=device)]
    expected = Classifier()(*inputs)
    scripted = torch.jit.script(Classifier())
    outputs = run_without_python(run_script, scripted, inputs, tmp_path)
    for got, other, value in zip(outputs, scripted(*inputs), expected, strict=True):
        assert torch.equal(got, value)
        assert torch.equal(other, value)


def test_the_scaler_class_in_a_process_without_python(device: torch.device, run_script: Path, tmp_path: Path) -> None:
    start = torch.tensor([1.0, -3.0], device=device)

    def scaler():
        return torch.classes.halfstep.GradScaler(init_scale=64.0, growth_interval=2, hysteresis=1)

    p, counters, scale = torch.jit.script(Descent(scaler()))(start)
    assert p.tolist() == (start * 0.5**5).tolist(), "five of six steps are applied"
    assert counters.tolist() == [6, 1, 0, 2, 1, 0, 1, 0] or counters.tolist() == [6, 1, 0, 2, 1, 0, 0, 1]
    assert scale.item() == 128.0
    outputs = run_without_python(run_script, torch.jit.script(Descent(scaler())), [start], tmp_path)
    for got, expected in zip(outputs, (p, counters, scale), strict=True):
        assert torch.equal(got, expected)


def test_a_saved_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    module = torch.jit.script(Descent(torch.classes.halfstep.GradScaler(init_scale=64.0, growth_interval=4)))
    module(torch.ones(2))
    scale, counters = module.scaler.get_scale(), module.scaler.counters().clone()
    module.save(str(tmp_path / "module.pt"))
    loaded = torch.jit.load(str(tmp_path / "module.pt"))
    assert loaded.scaler.get_scale() == scale
    assert torch.equal(loaded.scaler.counters(), counters)
    module(torch.ones(2)), loaded(torch.ones(2))
    assert torch.equal(loaded.scaler.counters(), module.scaler.counters())


def test_the_state_stays_on_its_first_device() -> None:
    scaler = torch.classes.halfstep.GradScaler(init_scale=64.0)
    scaler.scale(torch.ones(()))
    counters = scaler.counters()
    scaler.scale(torch.ones((), device="meta"))
    assert scaler.get_scale() == 64.0
    scaler.check_([torch.ones(2)])
    scaler.update()
    assert counters[0].item() == 1, "the live state, not a copy"


def test_one_bad_gradient_leaves_all_others_scaled() -> None:
    scaler = torch.classes.halfstep.GradScaler(init_scale=8.0)
    scaler.scale(torch.ones(()))
    good = torch.full((2,), 8.0)
    with pytest.raises((TypeError, RuntimeError), match=r"GradScaler: grads\[0\] has dtype ComplexFloat"):
        scaler.unscale_([good, torch.ones(2, dtype=torch.complex64, device="meta")])
    assert good.tolist() == [8.0] * 2


@pytest.mark.cuda
def test_gradients_of_several_devices() -> None:
    scaler = torch.classes.halfstep.GradScaler(init_scale=8.0)
    scaler.scale(torch.ones((), device="cuda"))
    grads = [torch.full((2,), 8.0, device="cuda"), torch.full((2,), 16.0), torch.full((1,), 24.0, device="cuda")]
    assert scaler.unscale_(grads).item() == 0.0
    assert [grad[0].item() for grad in grads] == [1.0, 2.0, 3.0]
    assert scaler.check_([torch.tensor([math.inf]), torch.ones(1, device="cuda")]).item() == 1.0


def test_the_class_checks_its_arguments() -> None:
    make = torch.classes.halfstep.GradScaler
    with pytest.raises((ValueError, RuntimeError), match="init_scale is -1"):
        make(init_scale=-1.0)
    with pytest.raises((ValueError, RuntimeError), match="refill is 'x'"):
        make(refill="x")
    scaler = make()
    with pytest.raises(RuntimeError, match="unscale_ was called before scale"):
        scaler.unscale_([torch.ones(2)])
    with pytest.raises(RuntimeError, match="without a check of gradients"):
        scaler.update()
    for bad in (-1.0, 0.0, math.nan, 1e-60, 1e39):
        with pytest.raises((ValueError, RuntimeError), match="scale is"):
            scaler.set_scale(bad)
    assert scaler.get_scale() == 65536.0
    scaler.scale(torch.ones(()))
    assert scaler.check_([torch.tensor([math.inf])]).item() == 1.0
    assert scaler.found().item() == 1.0
    scaler.update()
    assert scaler.get_scale() == 32768.0
    assert scaler.history()[0, :3].tolist() == [1.0, 65536.0, 1.0]
    assert set(scaler.state_dict()) == {"rule", "scale", "growth_tracker", "hysteresis_left", "counters", "history"}
