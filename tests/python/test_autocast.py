"""halfstep's autocast context: re-entered, nested, in traced code, and the switch for cross entropy that it sets."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from halfstep import AutocastContext, MixedPrecisionConfig, MixedPrecisionManager
from torch import nn
from torch.utils.checkpoint import checkpoint


@pytest.fixture
def cuda_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CUDA autocast be entered on a machine without a GPU; nothing is computed in it."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)


def switch() -> bool:
    value = torch.ops.halfstep.set_half_reductions(False)
    torch.ops.halfstep.set_half_reductions(value)
    return value


def context(on: bool = True, enabled: bool = True) -> AutocastContext:
    return AutocastContext("cuda", dtype=torch.float16, enabled=enabled, half_cross_entropy=on)


@pytest.mark.usefixtures("cuda_contexts")
def test_a_context_sets_the_switch_and_restores_it() -> None:
    for outer in (False, True):
        torch.ops.halfstep.set_half_reductions(outer)
        try:
            with context():
                assert switch()
                with context(on=False):
                    assert not switch()
                    with AutocastContext("cpu", dtype=torch.bfloat16):
                        assert not switch()
                with context(enabled=False), torch.autocast("cuda", dtype=torch.float16):
                    assert not switch()
                assert switch()
            assert switch() == outer
            with pytest.raises(KeyError), context():
                raise KeyError
            assert switch() == outer
        finally:
            torch.ops.halfstep.set_half_reductions(False)


@pytest.mark.usefixtures("cuda_contexts")
def test_one_context_may_be_entered_again() -> None:
    shared = context()

    @shared
    def depth(n: int) -> int:
        assert switch()
        assert torch.is_autocast_enabled("cuda")
        return depth(n - 1) + 1 if n else 0

    assert depth(3) == 3
    assert not switch()
    assert not torch.is_autocast_enabled("cuda"), "torch's own context would leave it on"
    with shared, pytest.raises(ZeroDivisionError), shared:
        math.floor(1 / 0)
    assert not switch()
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.usefixtures("cuda_contexts")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_context_inside_compiled_code(fullgraph: bool) -> None:
    torch._dynamo.reset()
    shared = context()

    def run(x: torch.Tensor) -> torch.Tensor:
        with shared:
            return x * 2

    compiled = torch.compile(run, fullgraph=fullgraph, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert not switch()
    assert not torch.is_autocast_enabled("cuda")


class Scoped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with context():
            return x * 2


@pytest.mark.usefixtures("cuda_contexts")
def test_a_context_inside_an_exported_program() -> None:
    program = torch.export.export(Scoped(), (torch.ones(2),), strict=False)
    assert "halfstep" not in program.graph_module.print_readable(print_output=False)
    assert torch.equal(program.module()(torch.ones(2)), torch.full((2,), 2.0))
    assert not switch()


@pytest.mark.usefixtures("cuda_contexts")
def test_the_manager_hands_out_contexts_by_its_setting() -> None:
    manager = MixedPrecisionManager(config=MixedPrecisionConfig(autocast_device_type="cuda"))
    manager._manager._device_type = "cuda"
    with manager.autocast_context():
        assert switch()
    manager.update_config(half_reductions=("layer_norm",))
    with manager.autocast_context():
        assert not switch()
    manager.update_config(half_reductions=("cross_entropy",), enable_autocast=False)
    with manager.autocast_context():
        assert not switch()


def cross_entropy_step(manager: MixedPrecisionManager, run: Callable, logits: torch.Tensor, target: torch.Tensor):
    with manager.autocast_context():
        loss = run(logits, target)
    (grad,) = torch.autograd.grad(loss, logits)
    return loss, grad


@pytest.mark.cuda
def test_cross_entropy_of_a_policy_on_a_gpu() -> None:
    logits = (torch.randn(64, 1001, device="cuda") * 3).half().requires_grad_()
    target = torch.randint(1001, (64,), device="cuda")
    manager = MixedPrecisionManager()
    on = cross_entropy_step(manager, F.cross_entropy, logits, target)
    compiled = cross_entropy_step(manager, torch.compile(F.cross_entropy, fullgraph=True), logits, target)
    manager.update_config(half_reductions=())
    off = cross_entropy_step(manager, F.cross_entropy, logits, target)
    assert "CrossEntropyFunction" in on[0].grad_fn.name()
    assert "CrossEntropyFunction" not in off[0].grad_fn.name()
    wide = logits.detach().double().requires_grad_()
    exact = F.cross_entropy(wide, target)
    exact = [exact, *torch.autograd.grad(exact, wide)]
    for ours, torchs, fused, expected in zip(on, off, compiled, exact, strict=True):
        error, peer = ((value.double() - expected).abs().max().item() for value in (ours, torchs))
        assert error <= 1.05 * peer + 1e-6, f"ours is off by {error:.3g}, torch's path by {peer:.3g}"
        torch.testing.assert_close(fused, torchs, rtol=1e-3, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_cross_entropy_on_a_gpu(reentrant: bool) -> None:
    """The loss is computed again in backward(), on another thread and after the context has ended."""
    logits = torch.randn(64, 1001, device="cuda").half().requires_grad_()
    target = torch.randint(1001, (64,), device="cuda")
    manager = MixedPrecisionManager()
    with manager.autocast_context():
        loss = checkpoint(F.cross_entropy, logits, target, use_reentrant=reentrant)
    loss.backward()
    _, expected = cross_entropy_step(manager, F.cross_entropy, logits, target)
    torch.testing.assert_close(logits.grad, expected, rtol=2e-3, atol=1e-6)
