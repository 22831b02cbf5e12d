"""lower() and memory: what forward writes is cast where it is used, and tensors of one memory share it in the copy."""

from __future__ import annotations

import pytest
import torch
from halfstep import lower
from lower_cases import WIDTH
from test_lower import policy, script, under_autocast
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Cache(nn.Module):
    """A view of a buffer is taken, then the buffer is written, then the view is used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, WIDTH))
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.cache[0:4]
        self.cache[0:4] = x
        return self.q(x) @ keys.t()


class OtherView(nn.Module):
    """Two buffers of one memory: one is written, the other is read before and after."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.zeros(8, WIDTH)
        self.register_buffer("whole", both)
        self.register_buffer("part", both[2:6])
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.q(x)
        before = y @ self.part.t()
        self.whole[2:6].copy_(x)
        return before + y @ self.part.t()


class InAList(nn.Module):
    """The buffer is written through a list that it was put into."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, WIDTH))
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.cache.t()
        tensors = [x, self.cache]
        tensors[1].copy_(x)
        return self.q(x) @ keys


class ByAnotherName(nn.Module):
    """The buffer becomes another attribute, by which it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, WIDTH))
        self.register_buffer("current", torch.zeros(4, WIDTH))
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.cache.t()
        self.current = self.cache
        self.current.copy_(x)
        return self.q(x) @ keys


@pytest.mark.parametrize(
    ("make", "how"),
    [(Cache, "script"), (Cache, "trace"), (InAList, "script"), (InAList, "trace"), (ByAnotherName, "script")],
)
def test_views_of_buffers_that_forward_writes(device: torch.device, make: type, how: str) -> None:
    model, x = make().eval().to(device), torch.randn(4, WIDTH, device=device)
    plan = policy("half")[0].plan(model)
    (expected,) = under_autocast(model, plan, torch.bfloat16, (x,))
    with torch.no_grad():
        module = script(model, (x,), how)
        model.cache.zero_()  # tracing has run it
        lowered = lower(module, plan)
        assert expected.abs().max() > 0.1
        assert torch.equal(lowered(x), expected)
    assert lowered.q.weight.dtype is torch.bfloat16, "nobody writes it"
    assert lowered.cache.dtype is torch.float32
    assert torch.equal(lowered.cache, x)


def test_other_view_over_two_calls() -> None:
    model, x = OtherView().eval(), torch.randn(4, WIDTH)
    lowered = lower(torch.jit.script(model), policy("half")[0].plan(model))
    assert lowered.part.data_ptr() == lowered.whole[2:6].data_ptr(), "of one memory in the copy too"
    assert lowered.part.untyped_storage().data_ptr() != model.part.untyped_storage().data_ptr()
    half = torch.bfloat16
    with torch.no_grad():
        y = x.to(half) @ model.q.weight.to(half).t() + model.q.bias.to(half)
        product = y @ x.to(half).t()
        torch.testing.assert_close(lowered(x), product, rtol=0.03, atol=0.03)
        torch.testing.assert_close(lowered(x), 2 * product, rtol=0.03, atol=0.03)
    assert torch.equal(lowered.part, x)
    assert not model.whole.any(), "the original's"
