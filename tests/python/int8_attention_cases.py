"""What the tests of attention in parts share: models, inputs, and how to compare."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from halfstep.int8_attention import replace_attention
from torch import nn

WIDTH, HEADS, BATCH, QUERIES, KEYS = 24, 4, 3, 5, 7


def close(result: torch.Tensor, expected: torch.Tensor, relative: float = 1e-6) -> bool:
    """Whether the norm of the difference is within `relative` of the expected norm."""
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    return bool((result.double() - expected.double()).norm() <= relative * expected.double().norm())


def attention(**options: object) -> nn.MultiheadAttention:
    """An attention whose biases are not torch's zeros."""
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    return randomized(module)


def randomized(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def replaced(model: nn.Module) -> nn.Module:
    result, names, left = replace_attention(copy.deepcopy(model))
    assert names
    assert left == {}
    return result


def inputs(batch_first: bool, keys: int = KEYS, key_width: int = WIDTH, value_width: int = WIDTH) -> list[torch.Tensor]:
    query, key, value = (
        torch.randn(BATCH, QUERIES, WIDTH),
        torch.randn(BATCH, keys, key_width),
        torch.randn(BATCH, keys, value_width),
    )
    return [query, key, value] if batch_first else [x.transpose(0, 1).contiguous() for x in (query, key, value)]


def hidden(*shape: int) -> torch.Tensor:
    """A bool mask that leaves every query its first key."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def encoder(layers: int = 3, **options: object) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **{"batch_first": True, **options})
    return randomized(nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH))).eval()


LEFT_ALIGNED = torch.arange(KEYS).expand(BATCH, KEYS) >= torch.tensor([[KEYS], [4], [1]])


def calls_of_products(model: nn.Module, *args: torch.Tensor) -> dict[str, int]:
    """How often a call of the model calls each of its nn.Linear."""
    calls = {name: 0 for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    handles = [model.get_submodule(name).register_forward_hook(count(name)) for name in calls]
    model(*args)
    for handle in handles:
        handle.remove()
    return calls


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """No gradients, none of torch's warnings about its own fast path, one thread."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*enable_nested_tensor is True.*")
        warnings.filterwarnings("ignore", message=".*prototype stage.*")
        warnings.filterwarnings("ignore", message=".*mismatched.*is deprecated.*")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # these are small products: on a busy machine threads wait for each other
        yield
        torch.set_num_threads(threads)
