"""What went wrong once in adaptive contexts, and must not again."""

from __future__ import annotations

import copy

import pytest
import torch
from adaptive_cases import small_model, step
from halfstep import AdaptivePrecisionManager, GradScaler
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """A checkpoint in the middle: what is in front of it gets its gradient through the inner pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(checkpoint(self.b, self.a(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_in_the_middle(device: torch.device, reentrant: bool) -> None:
    model = Checkpointed(reentrant).to(device)
    x = torch.randn(16, 8, device=device)
    model(x).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with AdaptivePrecisionManager(initial_loss_scale=1024.0).adaptive_context(model, 0):
        model(x).square().mean().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_value_, nn.utils.clip_grad_norm_])
def test_clipping_hides_no_overflow(device: torch.device, clip) -> None:
    model = nn.Linear(8, 1).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    before = copy.deepcopy(model.state_dict())
    adaptive = AdaptivePrecisionManager()
    with adaptive.adaptive_context(model, 0) as context:
        loss = model(torch.rand(64, 8, device=device)).mul(1e6).mean()
        assert context.is_stable(loss)
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    stats = adaptive.get_adaptation_stats()
    assert (stats["skipped_steps"], stats["loss_scale"]) == (1, 2.0**15)


@pytest.mark.parametrize("fused", [False, True])
def test_closures(device: torch.device, fused: bool) -> None:
    model = small_model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=fused)
    adaptive = AdaptivePrecisionManager(initial_loss_scale=1024.0)
    x = torch.randn(16, 8, device=device)
    for number, factor in enumerate((1.0, 1e9, 1.0)):
        before = copy.deepcopy(model.state_dict())

        def closure(factor: float = factor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean() * factor
            loss.backward()
            return loss

        with adaptive.adaptive_context(model, number):
            optimizer.step(closure)
        moved = any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert moved == (factor == 1.0)
    assert adaptive.get_adaptation_stats()["skipped_steps"] == 1


def test_a_scaler_is_at_work_only_where_it_is_used(device: torch.device) -> None:
    model = small_model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = GradScaler(device.type, init_scale=2.0)
    adaptive = AdaptivePrecisionManager()
    x = torch.randn(16, 8, device=device)
    with adaptive.adaptive_context(model, 0):
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    with adaptive.adaptive_context(model, 1):
        (model(x).mean() * 1e-8).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters()), "scaled again"
    before = copy.deepcopy(model.state_dict())
    with adaptive.adaptive_context(model, 2):
        (model(x).mean() * 1e12).backward()
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_two_models_in_nested_contexts(device: torch.device) -> None:
    """A GAN's loop: each optimizer is held back by its own model's gradients."""
    first, second = small_model().to(device), small_model().to(device)
    one, two = (torch.optim.SGD(model.parameters(), 0.1) for model in (first, second))
    adaptive = AdaptivePrecisionManager(initial_loss_scale=16.0)
    x = torch.randn(16, 8, device=device)
    before = copy.deepcopy([first.state_dict(), second.state_dict()])
    with adaptive.adaptive_context(first, 0), adaptive.adaptive_context(second, 0):
        (second(x).mean() * 1e12).backward()
        first(x).mean().backward()
        one.step()
        two.step()
    assert not torch.equal(before[0]["0.weight"], first[0].weight)
    assert torch.equal(before[1]["0.weight"], second[0].weight)


def test_hooks_of_parameters_see_true_gradients(device: torch.device) -> None:
    model = nn.Linear(4, 1).to(device)
    model.weight.register_hook(lambda gradient: gradient.clamp(-0.5, 0.5))
    with AdaptivePrecisionManager().adaptive_context(model, 0):
        (model(torch.ones(1, 4, device=device)).sum() * torch.tensor(0.25, device=device)).backward()
    assert model.weight.grad.tolist() == [[0.25] * 4]


def test_a_float16_loss_is_scaled(device: torch.device) -> None:
    model = small_model().to(device)
    x = torch.randn(16, 8, device=device)
    with AdaptivePrecisionManager().adaptive_context(model, 0), torch.autocast(device.type, dtype=torch.float16):
        loss = (model(x) * 1e-6).mean()
        assert loss.dtype is torch.float16
        loss.backward()
    assert model[0].weight.grad.abs().max() > 0


class Masked(nn.Module):
    """A causal mask, a module of its own, in front of a layer that float16 cannot hold."""

    class Mask(nn.Module):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))

    def __init__(self) -> None:
        super().__init__()
        self.query, self.mask, self.wide = nn.Linear(8, 8), Masked.Mask(), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 1)
        with torch.no_grad():
            self.wide.weight.mul_(1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.mask(self.query(x) @ x.transpose(1, 2).to(self.query(x).dtype)).softmax(-1)
        return self.head(self.norm(self.wide(weights.to(x.dtype) @ x)))


def test_a_mask_is_told_from_an_overflow_in_the_first_batch(device: torch.device) -> None:
    torch.manual_seed(0)
    model = Masked().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(4, 6, 8, device=device)
    adaptive = AdaptivePrecisionManager()
    for batch in range(4):
        step(adaptive, model, optimizer, lambda: model(x).square().mean(), batch)
    stats = adaptive.get_adaptation_stats()
    assert [name for name, layer in stats["layers"].items() if layer["state"] == "float32"] == ["wide"]
    assert (stats["unstable_batches"], stats["demotions"]) == (1, 1)


def test_a_bad_batch_is_no_layers_fault(device: torch.device) -> None:
    model = small_model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    adaptive = AdaptivePrecisionManager()
    x = torch.randn(4, 8, device=device)
    for batch in range(4):
        data = x * float("inf") if batch in (1, 2) else x
        step(adaptive, model, optimizer, lambda data=data: model(data).square().mean(), batch)
    stats = adaptive.get_adaptation_stats()
    assert (stats["unstable_batches"], stats["demotions"], stats["fp16_ratio"]) == (2, 0, 1.0)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters()), "their gradients were dropped"


class Vanishing(nn.Module):
    """exp(-x^2) of an output beyond float16 is 0, and its gradient NaN: the loss is finite throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        with torch.no_grad():
            self.wide.weight.mul_(1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.exp(-self.wide(self.first(x)).square()))


def test_gradients_that_stay_nan_are_explained_before_the_scale_is_gone(device: torch.device) -> None:
    torch.manual_seed(0)
    model = Vanishing().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    adaptive = AdaptivePrecisionManager(adaptation_interval=1000)
    x = torch.randn(4, 8, device=device)
    for batch in range(40):
        step(adaptive, model, optimizer, lambda: (model(x) - 1.0).square().mean(), batch)
    stats = adaptive.get_adaptation_stats()
    assert stats["layers"]["wide"]["state"] == "float32"
    assert stats["skipped_steps"] < 25
    assert stats["loss_scale"] > 2.0**8, "what held it down is mended"


def test_an_optimizer_that_steps_within_backward(device: torch.device) -> None:
    model = small_model().to(device)
    optimizers = {parameter: torch.optim.SGD([parameter], 0.1) for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda leaf: optimizers[leaf].step())
    before = copy.deepcopy(model.state_dict())
    with AdaptivePrecisionManager().adaptive_context(model, 0):
        (model(torch.randn(4, 8, device=device)).mean() * 1e12).backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_in_eval_mode_is_watched_too(device: torch.device) -> None:
    model = small_model().to(device).eval()
    with torch.no_grad():
        model[2].weight.mul_(1e9)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    adaptive = AdaptivePrecisionManager()
    x = torch.randn(4, 8, device=device)
    for batch in range(3):
        step(adaptive, model, optimizer, lambda: model(x).div(1e9).square().mean(), batch)
    assert adaptive.get_adaptation_stats()["layers"]["2"]["state"] == "float32"


def test_another_half_type_around_the_model_is_an_error(device: torch.device) -> None:
    model = small_model().to(device)
    with (
        AdaptivePrecisionManager().adaptive_context(model, 0),
        torch.autocast(device.type, dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r'precision="bfloat16"'),
    ):
        model(torch.randn(4, 8, device=device))
