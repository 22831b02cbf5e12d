"""Files of optimized models for tests: models of many kinds, and files taken apart and put together again."""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from halfstep import InferencePrecisionOptimizer, int8_speed_guard
from halfstep.half_model import half_model
from halfstep.int8_carriers import Carriers
from int8_graph_cases import MODELS, made
from torch import nn


class Small(nn.Module):
    """A convolution with its batch norm, a layer norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(F.relu(self.bn(self.conv(x))).mean((2, 3))))


class Encoder(nn.Module):
    """Attention behind an embedding, with a mask given by name and constants of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.register_buffer("places", torch.randn(6, 16), persistent=False)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.layer(self.words(ids) * scale + self.places).mean(1))}


class Branching(nn.Module):
    """Cannot be traced: what it does depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.sum() > 1e6:
            x = -x
        return self.second(torch.relu(x))


class Tied(nn.Module):
    """Two layers that are one, two that share a weight, and an LSTM, which stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(16, 16)
        self.same = self.one
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.right.weight = self.left.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.same(F.relu(self.one(x)))
        return self.right(F.relu(self.left(self.lstm(x.unsqueeze(1))[0][:, 0])))


class TwoInputs(nn.Module):
    """Called with a tuple, and with a shape that a zero-dimensional constant is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], power: float = 0.5) -> torch.Tensor:
        return torch.relu(self.a(pair[0])) + self.b(pair[1]) * power


def _channels_last() -> nn.Module:
    return made("resnet")[0].to(memory_format=torch.channels_last)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    **{
        name: (lambda name=name: made(name)[0], lambda n, name=name: torch.randn(n, *MODELS[name][1]().shape[1:]))
        for name in MODELS
    },
    "small": (lambda: Small().eval(), lambda n: torch.randn(n, 2, 6, 6)),
    "encoder": (lambda: Encoder().eval(), lambda n: {"ids": torch.randint(0, 20, (n, 6)), "scale": 0.5}),
    "branching": (lambda: Branching().eval(), lambda n: torch.randn(n, 16)),
    "tied": (lambda: Tied().eval(), lambda n: torch.randn(n, 16)),
    "single": (lambda: nn.Linear(16, 4).eval(), lambda n: torch.randn(n, 16)),
    "two inputs": (lambda: TwoInputs().eval(), lambda n: [(torch.randn(n, 16), torch.randn(n, 16)), 0.25]),
    "channels last": (_channels_last, lambda n: torch.randn(n, 3, 12, 12)),
}


def call(model: nn.Module, batch: Any) -> torch.Tensor:
    """Call the model as the optimizer does, and return the tensor that it answers with."""
    kwargs = batch if isinstance(batch, dict) else {}
    args = batch if isinstance(batch, list) else () if kwargs else (batch,)
    with torch.no_grad():
        out = model(*args, **kwargs)
    return out["logits"] if isinstance(out, dict) else out


def optimized(kind: str, device: str = "cpu", target: str = "int8", **options: Any) -> tuple:
    """Return (optimizer, result, another batch) of a model of this kind; whatever it costs in accuracy."""
    model, batch = KINDS[kind][0](), KINDS[kind][1]
    options = {"speed_guard": False, "progress": False, **options}
    inference = InferencePrecisionOptimizer(target, accuracy_threshold=1.0, eval_fn=lambda _model: 1.0, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = inference.optimize_for_inference(model, [batch(12), batch(12), batch(12)], device)
    assert inference.report()["result"] == target
    return inference, result, torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batch(5))


def carry(dtype: torch.dtype, monkeypatch: Any) -> None:
    """Make the next optimizations take this carrier, and int8 whatever it costs: for speed_guard=True."""

    def choose(carriers: Carriers, *_: Any) -> None:
        carriers.fastest = carriers.carrier = dtype
        if dtype != carriers.own:
            carriers.inners[dtype] = half_model(carriers.inners[carriers.own], dtype).module

    monkeypatch.setattr(Carriers, "choose", choose)
    monkeypatch.setattr(int8_speed_guard, "loses", lambda _mine, _rival: False)


def taken_apart(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the bytes of the tensors."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(file: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def plan_in(header: dict[str, Any]) -> dict[str, Any]:
    return json.loads(header["__metadata__"]["halfstep_plan"])


def checksums_of(header: dict[str, Any], data: bytes) -> dict[str, int]:
    """Return the checksums of the plan of such a file."""
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: zlib.crc32(data[begin:end]) for name, (begin, end) in places.items()}


def with_plan(file: Path, source: Path, plan: Any, data: bytes | None = None) -> Path:
    """Write `source` with another plan, a value or a text, and the digest that belongs to it; perhaps other data."""
    header, own = taken_apart(source)
    data = own if data is None else data
    text = plan if isinstance(plan, str) else json.dumps(plan)
    digest = hashlib.sha256(text.encode()).hexdigest()
    header["__metadata__"].update(halfstep_plan=text, halfstep_plan_sha256=digest)
    return put_together(file, header, data)
