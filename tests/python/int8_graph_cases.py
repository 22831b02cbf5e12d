"""Small models of the kinds that int8 meets, and their layers made int8."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from halfstep.int8_graph import trace
from halfstep.int8_layers import Int8Conv1d, Int8Conv2d, Int8Linear, pack
from halfstep.int8_nodes import input_of
from halfstep.int8_runs import capture
from torch import nn
from torch.fx import GraphModule


class BasicBlock(nn.Module):
    """The block of ResNet-18: one ReLU for both places, and an addition in place."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class MobileNet(nn.Module):
    """An inverted residual of MobileNetV3, with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8, eps=1e-3), nn.Hardswish(inplace=True))
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.BatchNorm2d(24), nn.Hardswish(inplace=True)
        )
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.Linear(8, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = F.hardsigmoid(self.fc2(F.relu(self.fc1(self.squeeze(y))))) * y
        y = self.project(y)
        y += x
        return self.head(y.mean((2, 3)))


class Plain(nn.Module):
    """Convolutions, max pooling and a view, as in many tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = F.max_pool2d(self.conv2(x).relu(), 2, stride=2, padding=1)
        x = x.view(x.size(0), -1)
        return self.fc2(F.dropout(torch.relu(self.fc1(x)), training=self.training))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.fc2(F.relu(self.fc1(x), inplace=True)))
        return self.fc3(torch.add(x, y))


class Signal(nn.Module):
    """One dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.conv2, self.fc = nn.Conv1d(8, 8, 3, padding=2, dilation=2), nn.Linear(8 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.bn(self.conv1(x)))
        return self.fc(torch.flatten(F.relu(self.conv2(x) + x), 1))


def images() -> torch.Tensor:
    return torch.randn(5, 3, 12, 12)


MODELS: dict[str, tuple[type[nn.Module], Any]] = {
    "resnet": (ResNet, images),
    "mobilenet": (MobileNet, images),
    "plain": (Plain, images),
    "mlp": (Mlp, lambda: torch.randn(5, 16)),
    "signal": (Signal, lambda: torch.randn(5, 4, 16)),
}


def call(model: nn.Module, batch: torch.Tensor) -> Any:
    return model(batch)


def run(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(batch.clone())


def settled(model: nn.Module) -> nn.Module:
    """Give the batch norms statistics and weights that do something, and return the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, low + 1)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    kind, batch = MODELS[name]
    return settled(kind()), batch()


def traced(model: nn.Module) -> GraphModule:
    graph_module, reason = trace(model)
    assert graph_module is not None, reason
    return graph_module


def int8_layer(layer: nn.Module, seen: torch.Tensor) -> nn.Module:
    """Make a Linear or convolution int8, by the range of one input: from 0 on where nothing is below."""
    largest, positive = float(seen.abs().max()), bool((seen >= 0).all())
    options = {"input_scale": largest / (255 if positive else 127), "input_zero_point": -128 if positive else 0}
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        return Int8Linear(pack(layer.weight, bias), **options)
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
    weight, kind = layer.weight, Int8Conv2d
    if isinstance(layer, nn.Conv1d):
        geometry = {name: (int(name != "padding"), *value) for name, value in geometry.items()}
        weight, kind = weight.unsqueeze(2), Int8Conv1d
    return kind(pack(weight, bias, groups=layer.groups, **geometry), **options)


def with_int8(graph_module: GraphModule, batch: torch.Tensor, but: tuple[str, ...] = ()) -> GraphModule:
    """Return a copy in which all linear layers and convolutions but these are int8."""
    twin = copy.deepcopy(graph_module)
    for node in list(twin.graph.nodes):
        layer = twin.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) and node.target not in but:
            source = input_of(node).name
            seen = capture(graph_module, batch, call, [source])[source]
            twin.set_submodule(node.target, int8_layer(layer, seen))
    return twin
