"""The models of bench/policies.py, each with an input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from train_models import GPT2


def seeds_network() -> tuple[nn.Module, torch.Tensor]:
    """Return the network of the user's document, whose last layer is the head."""
    body = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(512, 10))), torch.randn(32, 784)


def resnet50() -> tuple[nn.Module, torch.Tensor]:
    """Return torchvision's ResNet-50; its classifier is called fc there."""
    from torchvision.models import resnet50 as build

    body = build()
    head, body.fc = body.fc, nn.Identity()
    return nn.Sequential(OrderedDict(body=body, head=head)), torch.randn(8, 3, 224, 224)


def vit() -> tuple[nn.Module, torch.Tensor]:
    """Return torchvision's ViT-B/16, whose classifier is called heads."""
    from torchvision.models import vit_b_16

    model = vit_b_16()
    nn.init.normal_(model.heads.head.weight, std=0.02)  # 0 as it comes
    return model, torch.randn(8, 3, 224, 224)


def gpt() -> tuple[nn.Module, torch.Tensor]:
    """Return GPT-2 small with four layers; the head is tied to the embedding."""
    return GPT2(layers=4), torch.randint(50304, (2, 256))


class Stage(nn.Module):
    """Two convolutions, each with a group norm."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, outside), nn.GroupNorm(8, outside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return as many pixels, of `outside` channels."""
        x = nn.functional.silu(self.norm1(self.conv1(x)))
        return nn.functional.silu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """Three scales down and up again, with connections across."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.down1, self.down2 = Stage(3, width), Stage(width, 2 * width)
        self.middle = Stage(2 * width, 4 * width)
        self.lift2, self.lift1 = (nn.ConvTranspose2d(n * width, n * width // 2, 2, stride=2) for n in (4, 2))
        self.up2, self.up1 = Stage(4 * width, 2 * width), Stage(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return two values per pixel of x [batch, 3, height, width], height and width multiples of 4."""
        first = self.down1(x)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        deep = self.middle(nn.functional.max_pool2d(second, 2))
        second = self.up2(torch.cat([self.lift2(deep), second], 1))
        return self.head(self.up1(torch.cat([self.lift1(second), first], 1)))


class Tagger(nn.Module):
    """A recurrent network over tokens."""

    def __init__(self, tokens: int = 1000, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 17)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return 17 logits per token of tokens [batch, length]."""
        return self.head(self.lstm(self.embed(tokens))[0])


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "seed": seeds_network,
    "resnet50": resnet50,
    "vit": vit,
    "gpt": gpt,
    "unet": lambda: (UNet(), torch.randn(2, 3, 128, 128)),
    "lstm": lambda: (Tagger(), torch.randint(1000, (4, 60))),
}
