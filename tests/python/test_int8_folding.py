"""Batch norms folded into convolutions: the same results, and only where the graph proves it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from halfstep.int8_folding import fold_batch_norms
from int8_graph_cases import MODELS, made, run, settled, traced
from torch import nn

NORMS = {"resnet": 8, "mobilenet": 4, "plain": 0, "mlp": 0, "signal": 1}


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert (out - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", MODELS)
def test_folded_models_compute_the_same(name: str) -> None:
    model, batch = made(name)
    before = copy.deepcopy(model.state_dict())
    graph_module = traced(model)
    folded, kept = fold_batch_norms(graph_module)
    assert len(folded) == NORMS[name]
    assert kept == {}
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in graph_module.modules())
    assert not any("bn" in str(node) for node in graph_module.graph.nodes)
    close(run(graph_module, batch), run(model, batch))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    close(run(torch.jit.script(graph_module), batch), run(model, batch))


def test_the_names_of_what_was_folded() -> None:
    model, _ = made("signal")
    assert fold_batch_norms(traced(model)) == ([("conv1", "bn")], {})


@pytest.mark.parametrize(
    ("conv", "norm"),
    [
        (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)),
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.BatchNorm2d(6, eps=0.1)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6, momentum=None)),
        (nn.Conv1d(4, 6, 3, dilation=2), nn.BatchNorm1d(6)),
    ],
)
def test_kinds_of_convolutions(conv: nn.Module, norm: nn.Module) -> None:
    model = settled(nn.Sequential(conv, norm))
    graph_module = traced(model)
    assert fold_batch_norms(graph_module) == ([("0", "1")], {})
    x = torch.randn(2, 4, *([9] * (conv.weight.dim() - 2)))
    close(run(graph_module, x), run(model, x))


class Model(nn.Module):
    """A convolution, a norm and another of each, in the way that a test wants."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.way = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(self, x)


def _seen(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.conv(x)
    return self.bn(y) + y


def training(model: Model) -> None:
    model.bn.training = True


def no_statistics(model: Model) -> None:
    model.bn = nn.BatchNorm2d(4, track_running_stats=False).eval()


def hook_on_norm(model: Model) -> None:
    model.bn.register_forward_hook(lambda module, args, out: out + 1)


def hook_on_conv(model: Model) -> None:
    model.conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def normed_weight(model: Model) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.conv)


def old_normed_weight(model: Model) -> None:
    torch.nn.utils.weight_norm(model.conv)


def shared_weight(model: Model) -> None:
    model.other.weight = model.conv.weight


def shared_memory(model: Model) -> None:
    model.other.weight = nn.Parameter(model.conv.weight.detach())


def shared_conv(model: Model) -> None:
    model.other = model.conv


@pytest.mark.parametrize(
    ("forward", "change", "reason"),
    [
        (lambda self, x: self.bn(self.bn(self.conv(x))), None, "its input is not the output of a Conv1d or Conv2d"),
        (lambda self, x: self.bn(self.conv(x)) + self.bn(self.other(x)), None, "bn is used 2 times"),
        (lambda self, x: self.bn(self.conv(self.conv(x))), None, "conv is used 2 times"),
        (lambda self, x: self.bn(self.conv(x)) + self.other(x), shared_conv, "conv is used 2 times"),
        (lambda self, x: self.bn(self.conv(x)) + self.conv.weight.sum(), None, "conv is used 2 times"),
        (_seen, None, "the output of conv has 2 readers"),
        (lambda self, x: self.bn(F.relu(self.conv(x))), None, "its input is not the output of a Conv1d or Conv2d"),
        (lambda self, x: self.bn(x), None, "its input is not the output of a Conv1d or Conv2d"),
        (lambda self, x: self.bn(self.fc(x)), None, "its input is not the output of a Conv1d or Conv2d"),
        (lambda self, x: self.bn(self.conv(x)), training, "it is in training mode"),
        (lambda self, x: self.bn(self.conv(x)), no_statistics, "it has no running statistics"),
        (lambda self, x: self.bn(self.conv(x)), hook_on_norm, "bn has hooks or a forward of its own"),
        (lambda self, x: self.bn(self.conv(x)), hook_on_conv, "conv has hooks or a forward of its own"),
        (lambda self, x: self.bn(self.conv(x)), normed_weight, "its input is not the output of a Conv1d or Conv2d"),
        (lambda self, x: self.bn(self.conv(x)), old_normed_weight, "conv has hooks or a forward of its own"),
        (lambda self, x: self.bn(self.conv(x)) + self.other(x), shared_weight, "the weight of conv is shared"),
        (lambda self, x: self.bn(self.conv(x)) + self.other(x), shared_memory, "the weight of conv is shared"),
    ],
)
def test_what_is_left_and_why(forward: Any, change: Any, reason: str) -> None:
    model = settled(Model(forward))
    if change is not None:
        change(model)
    graph_module = traced(model)
    x = torch.randn(2, 4, 4, 4)
    if change is not training:
        expected = run(copy.deepcopy(model) if change is None else model, x)
    folded, kept = fold_batch_norms(graph_module)
    assert folded == []
    assert kept == {"bn": reason}
    if change is not training:
        assert torch.equal(run(graph_module, x), expected)


def test_a_conv_that_a_part_called_whole_also_uses() -> None:
    class Part(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else x

    model = settled(Model(lambda self, x: self.part(self.bn(self.conv(x)))))
    model.part = Part(model.conv).eval()
    graph_module = traced(model)
    assert fold_batch_norms(graph_module) == ([], {"bn": "conv is used 2 times"})
