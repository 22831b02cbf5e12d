"""Trained models for bench/int8_models.py: scikit-learn's digits, scaled up, as images and as rows of pixels.

The first 1200 digits are for training and calibration, the last 597 for the accuracy that is printed. Trained weights
are rounded to float16 and kept under build/int8_models/, so that every machine that is given these files has the same
model.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

FOLDER = Path(__file__).parents[1] / "build/int8_models"
TRAINED_ON = 1200


@functools.cache
def digits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 1797 digits as images [1797, 1, size, size] of mean about 0, and their labels [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images, torch.tensor(data.target)[order]


def _conv_norm(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(after)))


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3 beside a shortcut (He et al., 2015)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _conv_norm(before, after, 3, stride), _conv_norm(after, after, 3)
        same = stride == 1 and before == after
        self.shortcut = nn.Identity() if same else _conv_norm(before, after, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [batch, before, height, width] as [batch, after, height / stride, width / stride]."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for images of one channel."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = _conv_norm(1, width, 7, 2)
        widths = [width * 2**n for n in range(4)]
        blocks, before = [], width
        for number, after in enumerate(widths):
            blocks += [ResidualBlock(before, after, 1 if number == 0 else 2), ResidualBlock(after, after, 1)]
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return 10 logits per image of x [batch, 1, height, width]."""
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


class Excite(nn.Module):
    """A factor for each channel, by the channels' means (squeeze and excitation)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inside = max(8, (width // 4 + 4) // 8 * 8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.expand = nn.Conv2d(width, inside, 1), nn.Conv2d(inside, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [batch, width, height, width of image], scaled."""
        return x * F.hardsigmoid(self.expand(F.relu(self.squeeze(self.pool(x)))))


class InvertedBlock(nn.Module):
    """Widen, a convolution for each channel, perhaps Excite, narrow (Howard et al., 2019)."""

    def __init__(self, before: int, kernel: int, inside: int, after: int, excite: bool, act: type, stride: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [] if inside == before else [_conv_norm(before, inside, 1), act()]
        parts += [_conv_norm(inside, inside, kernel, stride, inside), act()]
        parts += [Excite(inside)] if excite else []
        self.layers = nn.Sequential(*parts, _conv_norm(inside, after, 1))
        self.residual = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [batch, before, height, width] as [batch, after, height / stride, width / stride]."""
        return x + self.layers(x) if self.residual else self.layers(x)


# kernel, inside, after, excite, hard-swish instead of ReLU, stride: table 2 of the paper
_SMALL = [
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
]


class MobileNetV3Small(nn.Module):
    """MobileNetV3-small for images of one channel; `blocks` of its 11 blocks, for tests."""

    def __init__(self, blocks: int = 11) -> None:
        super().__init__()
        parts: list[nn.Module] = [_conv_norm(1, 16, 3, 2), nn.Hardswish()]
        before = 16
        for kernel, inside, after, excite, swish, stride in _SMALL[:blocks]:
            act = nn.Hardswish if swish else nn.ReLU
            parts.append(InvertedBlock(before, kernel, inside, after, excite, act, stride))
            before = after
        self.features = nn.Sequential(*parts, _conv_norm(before, 6 * before, 1), nn.Hardswish())
        self.hidden, self.head = nn.Linear(6 * before, 1024), nn.Linear(1024, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return 10 logits per image of x [batch, 1, height, width]."""
        return self.head(F.hardswish(self.hidden(self.features(x).mean((2, 3)))))


class ViT(nn.Module):
    """A vision transformer with torch's encoder, which reads patches and answers with the mean of its tokens."""

    def __init__(
        self, width: int = 192, layers: int = 4, size: int = 32, patch: int = 4, heads: int = 0, channels: int = 1
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, heads or width // 32, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return 10 logits per image of x [batch, channels, size, size]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.encoder(tokens).mean(1))


class Lstm(nn.Module):
    """A recurrent network that reads an image row by row."""

    def __init__(self, width: int = 128, size: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(size, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return 10 logits per image of x [batch, 1, size, size]."""
        states, _ = self.lstm(F.relu(self.embed(x.squeeze(1))))
        return self.head(F.relu(self.hidden(states[:, -1])))


@dataclass(frozen=True)
class Recipe:
    """How to make one model: size of the images in pixels, epochs, and the highest learning rate."""

    build: Callable[[], nn.Module]
    size: int
    epochs: int
    rate: float


RECIPES = {
    "resnet18": Recipe(ResNet18, 64, 4, 1e-3),
    "mobilenet": Recipe(MobileNetV3Small, 64, 15, 4e-3),
    "vit": Recipe(ViT, 32, 10, 1e-3),
    "lstm": Recipe(Lstm, 32, 12, 4e-3),
}


def train(model: nn.Module, size: int, epochs: int, rate: float, device: torch.device) -> nn.Module:
    """Train on the first 1200 digits and return the model in eval mode on the CPU, its weights float16's values."""
    images, labels = (tensor[:TRAINED_ON].to(device) for tensor in digits(size))
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * (TRAINED_ON // 60))
    for _ in range(epochs):
        for rows in torch.randperm(TRAINED_ON).to(device).split(60):
            # Shifted by a few pixels, or 1200 images are learned by heart.
            shift = torch.randint(-(size // 16), size // 16 + 1, (2,)).tolist()
            loss = F.cross_entropy(model(images[rows].roll(shift, (2, 3))), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.cpu().half().float().eval().requires_grad_(False)


def trained(name: str, device: torch.device, folder: Path = FOLDER) -> nn.Module:
    """Return the model of RECIPES in eval mode on the CPU, trained on `device` unless its weights are in `folder`."""
    recipe, path = RECIPES[name], folder / f"{name}.pt"
    torch.manual_seed(0)
    model = recipe.build()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.float().eval().requires_grad_(False)
    model = train(model, recipe.size, recipe.epochs, recipe.rate, device)
    folder.mkdir(parents=True, exist_ok=True)
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    torch.save(half, path)
    return model


Batch = tuple[torch.Tensor, torch.Tensor]


def calibration(size: int, count: int = 1000, batch: int = 50) -> list[Batch]:
    """Return batches of images and labels from the digits that were trained on."""
    images, labels = digits(size)
    return list(zip(images[:count].split(batch), labels[:count].split(batch), strict=True))


def classes(model: nn.Module, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the class that the model gives each image: int64 [images]."""
    with torch.no_grad():
        return torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(100)])


def right(model: nn.Module, size: int, device: torch.device) -> torch.Tensor:
    """Return for each digit that was not trained on whether it is classified as it should: bool [597]."""
    images, labels = digits(size)
    return classes(model, images[TRAINED_ON:], device) == labels[TRAINED_ON:]
