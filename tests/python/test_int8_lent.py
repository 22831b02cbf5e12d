"""What an eval_fn may do to the models that it is given, and that nothing of it reaches the optimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from halfstep import InferencePrecisionOptimizer, int8_optimize
from halfstep.int8_lent import lent
from halfstep.int8_metric import choose_metric
from torch import nn


class Net(nn.Module):
    """Has statistics and random numbers, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.head = (
            nn.Linear(16, 32),
            nn.BatchNorm1d(32),
            nn.Dropout(),
            nn.Linear(32, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.first(x)))))


X = torch.randn(60, 16, generator=torch.Generator().manual_seed(1))
Y = torch.arange(60) % 4


def right(model: nn.Module) -> torch.Tensor:
    return (model(X).argmax(1) == Y).float()


def left_in_training(model: nn.Module) -> torch.Tensor:
    found = right(model.eval())
    model.train()
    model(X + 3)
    return found


def with_gradients(model: nn.Module) -> torch.Tensor:
    with torch.enable_grad():
        model.requires_grad_(True)
        F.cross_entropy(model(X.clone().requires_grad_()), Y).backward()
    return right(model)


def moved_to_double(model: nn.Module) -> torch.Tensor:
    found = right(model)
    model.double()
    return found


def with_a_hook_and_another_buffer(model: nn.Module) -> torch.Tensor:
    found = right(model)
    for module in model.modules():
        module.register_forward_hook(lambda *_: torch.full((60, 4), float("nan")))
        for name, buffer in list(module.named_buffers(recurse=False)):
            buffer.zero_()
            setattr(module, name, torch.full_like(buffer, 7))
    return found


def with_random_numbers(model: nn.Module) -> torch.Tensor:
    torch.rand(1000)
    return right(model)


MISUSES = [left_in_training, with_gradients, moved_to_double, with_a_hook_and_another_buffer, with_random_numbers]


class Run:
    """One optimization, and the models that it worked with."""

    def __init__(self, eval_fn: Callable[[nn.Module], Any], **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Net().eval()
        self.model.norm.running_mean.normal_()
        run = int8_optimize.Int8Run.run

        def recorded(optimization: int8_optimize.Int8Run) -> nn.Module:
            self.inside = optimization
            return run(optimization)

        options = {"accuracy_threshold": 1.0, "progress": False, **options}
        self.optimizer = InferencePrecisionOptimizer(eval_fn=eval_fn, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(int8_optimize.Int8Run, "run", recorded)
            self.result = self.optimizer.optimize_for_inference(self.model, [X], "cpu")


@pytest.mark.parametrize("misuse", MISUSES)
def test_nothing_that_an_eval_fn_does_is_left(misuse: Callable[[nn.Module], Any]) -> None:
    expected = Run(right, speed_guard=False)
    before = torch.get_rng_state()
    found = Run(misuse, speed_guard=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert (found.optimizer.report(), found.optimizer.report()["result"]) == (expected.optimizer.report(), "int8")
    with torch.no_grad():
        assert torch.equal(found.result(X), expected.result(X))
    models = [found.result, found.inside.reference, found.inside.form.model, *found.inside.carriers.inners.values()]
    for model in models:
        assert not any(module.training for module in model.modules())
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        assert {p.dtype for p in model.parameters()} <= {torch.float32}
    with torch.no_grad():
        assert torch.equal(found.inside.reference(X), found.model(X))
    for name, buffer in found.inside.reference.named_buffers():
        assert torch.equal(buffer, found.model.get_buffer(name)), name


def test_models_are_timed_in_eval_mode_with_their_statistics() -> None:
    found = Run(left_in_training)
    for model in (found.inside.reference, found.inside.form.model, found.result):
        assert not any(module.training for module in model.modules())
    for name, buffer in found.inside.reference.named_buffers():
        assert torch.equal(buffer, found.model.get_buffer(name)), name


def test_an_eval_fn_that_raises_in_between() -> None:
    def fails(model: nn.Module) -> float:
        model.train()
        model(X)
        torch.rand(3)
        raise RuntimeError("no data")

    model, state = Net().eval(), torch.get_rng_state()
    mean = model.norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="no data"):
        choose_metric(fails, [], lambda model, batch: model(batch), model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.norm.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_call_has_the_same_random_numbers() -> None:
    drawn = []

    def sampled(model: nn.Module) -> torch.Tensor:
        drawn.append(torch.randperm(60))
        return right(model)[drawn[-1]]

    Run(sampled, speed_guard=False)
    assert len(drawn) >= 2
    assert all(torch.equal(drawn[0], each) for each in drawn)


def test_random_numbers_of_the_model_are_given_back() -> None:
    class Noisy(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(F.dropout(x, 0.1, training=True))

    for target in ("int8", "bfloat16"):
        optimizer = InferencePrecisionOptimizer(target, accuracy_threshold=1.0, speed_guard=False, progress=False)
        model, state = Noisy().eval(), torch.get_rng_state()
        optimizer.optimize_for_inference(model, [X], "cpu")
        assert torch.equal(torch.get_rng_state(), state)


def test_what_is_lent_shares_the_memory_of_weights() -> None:
    model = Net().eval()
    model.tied = model.head
    model.first.weight.mark = "kept"
    with lent(model) as copy:
        pass
    assert copy.tied is copy.head is not model.head
    for name, parameter in model.named_parameters():
        other = copy.get_parameter(name)
        assert other is not parameter
        assert other.data_ptr() == parameter.data_ptr()
    assert copy.first.weight.mark == "kept"
    for name, buffer in model.named_buffers():
        assert copy.get_buffer(name).data_ptr() != buffer.data_ptr()


@pytest.mark.parametrize("misuse", [left_in_training, with_gradients, with_random_numbers])
def test_a_model_that_cannot_be_copied_is_put_back(misuse: Callable[[nn.Module], Any]) -> None:
    class Uncopied(Net):
        def __deepcopy__(self, memo: dict) -> Uncopied:
            raise TypeError("there is one of me")

    model = Uncopied().eval().requires_grad_(False)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with lent(model) as same:
        assert same is model
        misuse(same)
        model.norm.running_mean = torch.ones(32)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, model.state_dict().values(), strict=True))


def test_a_copy_of_the_models_own_making_is_in_eval_mode() -> None:
    class Made(Net):
        def __deepcopy__(self, memo: dict) -> Made:
            made = Made()
            made.load_state_dict(self.state_dict())
            return made

    model = Made().eval()
    with lent(model) as copy:
        assert copy is not model
        assert not any(module.training for module in copy.modules())
