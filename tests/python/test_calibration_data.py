"""Calibration batches of any container, unharmed by models and loaders, cut by samples; and bad ones that are named."""

from __future__ import annotations

import types
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer
from halfstep.calibration_data import Batch, batch_of, collect, split
from halfstep.containers import map_tensors, tensors_of
from halfstep.half_model import CastModel, float_dtype, half_model, is_uniform
from halfstep.int8_batches import first_samples, with_fewer_samples
from inference_cases import batches, trained_mlp
from torch import nn


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str = "n"
    half: torch.Tensor | None = None


@dataclass
class Initialized:
    """Neither dataclasses.replace nor __init__ can make it again from its fields."""

    x: torch.Tensor
    twice: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.twice = torch.cat([self.x, self.x])


@dataclass
class Output(OrderedDict):
    """Like transformers' ModelOutput: a mapping and a dataclass, whose items and attributes are the same."""

    logits: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden"):
            if getattr(self, name) is not None:
                OrderedDict.__setitem__(self, name, getattr(self, name))

    def __setitem__(self, key: str, value: Any) -> None:
        OrderedDict.__setitem__(self, key, value)
        object.__setattr__(self, key, value)

    def __reduce__(self) -> Any:
        return type(self), (self.logits, self.hidden)


Pair = namedtuple("Pair", "x other")


class Takes(nn.Module):
    """A linear layer behind a forward of any signature."""

    def __init__(self, forward: Callable[..., Any], features: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 4)
        self.forward = types.MethodType(forward, self)


X = torch.arange(48.0).reshape(6, 8)


# ------------------------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize(
    "make",
    [
        lambda x: [x, 3],
        lambda x: Pair(x, "a"),
        lambda x: {"x": x, "n": None},
        lambda x: UserDict(x=x, inside=UserDict(x=x)),
        lambda x: types.MappingProxyType({"x": x}),
        lambda x: Frozen(x),
        Initialized,
        lambda x: Output(x, (x, x)),
        lambda x: torch.max(x, 0),
        lambda x: [{"a": (Frozen(x), UserDict(b=[x]))}],
    ],
)
def test_containers_keep_their_class(make: Callable[[torch.Tensor], Any]) -> None:
    value = make(X)
    before = [tensor.clone() for tensor in tensors_of(value)]
    assert before
    copied = map_tensors(lambda tensor: tensor + 1, value)
    assert type(copied) is type(value)
    assert all(map(torch.equal, tensors_of(value), before))
    assert all(torch.equal(a, b + 1) for a, b in zip(tensors_of(copied), before, strict=True))
    if isinstance(copied, Output):
        assert copied.logits is copied["logits"]


@pytest.mark.parametrize(
    "value",
    [UserDict(x=X), Output(X), types.MappingProxyType({"x": X}), UserDict(x=X, labels=torch.arange(6), other=3)],
)
def test_mappings_of_any_class_are_keyword_arguments(value: Any) -> None:
    def forward(self: Any, x: Any = None, logits: Any = None) -> torch.Tensor:
        return self.linear(logits if x is None else x)

    model = Takes(forward)
    (batch,) = collect(model, value, 100)
    assert torch.equal(batch(model), model.linear(X))
    assert (batch.labels is not None) == ("labels" in value)
    assert torch.equal(batch.part(2, 5)(model), model.linear(X[2:5]))
    assert torch.equal(first_samples(value, 2)["logits" if "logits" in value else "x"], X[:2])


@pytest.mark.parametrize("make", [Frozen, lambda x: {"x": x}, UserDict])
def test_a_container_as_the_only_argument(make: Callable[[Any], Any]) -> None:
    def forward(self: Any, sample: Any) -> torch.Tensor:
        return self.linear(sample.x if isinstance(sample, Frozen) else sample["x"])

    model = Takes(forward)
    value = make({"x": X}) if make is UserDict else make(X)
    batch = batch_of(model, value)
    assert batch.size == 6
    assert torch.equal(batch.part(1, 4)(model), model.linear(X[1:4]))
    assert torch.equal(batch_of(model, (value,))(model), model.linear(X))
    double = Takes(forward).double()
    assert batch.on(torch.device("cpu"), torch.float64)(double).dtype == torch.float64


def test_a_scalar_before_the_samples() -> None:
    def forward(self: Any, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return scale * self.linear(x)

    model = Takes(forward)
    batch = batch_of(model, (torch.tensor(2.0), X))
    assert batch.size == 6
    assert torch.equal(batch.part(0, 2)(model), 2 * model.linear(X[:2]))
    with pytest.raises(TypeError, match="without a tensor of samples"):
        batch_of(model, torch.tensor(2.0))


@pytest.mark.parametrize(
    ("extra", "left_out"),
    [
        (torch.zeros(len(X) - 1, dtype=torch.long), (f"place 1: int64 [{len(X) - 1} for {len(X)} samples]",)),
        (torch.rand(len(X)), ("place 1: float32 [batch]",)),
        (torch.rand(len(X) - 1), ()),
        (torch.zeros(1, dtype=torch.long), ()),
    ],
)
def test_tensors_of_samples_and_labels_of_another_number_that_forward_does_not_take_are_told(
    extra: torch.Tensor, left_out: tuple[str, ...]
) -> None:
    batch = batch_of(nn.Linear(X.shape[1], 2), (X, extra))
    assert batch.labels is None
    assert batch.left_out == left_out


def test_a_model_of_batch_encodings_becomes_int8() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained_mlp()

        def forward(self, pixels: torch.Tensor) -> Output:
            return Output(self.inner(pixels))

    data = [UserDict(pixels=x, labels=y) for x, y in batches()]
    inference = InferencePrecisionOptimizer(speed_guard=False, progress=False)
    result = inference.optimize_for_inference(Net().eval(), data, "cpu")
    report = inference.report()
    assert (report["result"], report["metric"]) == ("int8", "top-1")
    assert isinstance(result(pixels=data[0]["pixels"]), Output)


# ------------------------------------------------------------------------------------------------ unharmed batches


def writes(self: Any, x: Any) -> torch.Tensor:
    inner = x["x"] if isinstance(x, UserDict) else x
    return self.linear(inner.div_(2))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (UserDict(x=x),)])
def test_models_that_write_to_their_input_harm_no_batch(wrap: Callable[[torch.Tensor], Any]) -> None:
    model, x = Takes(writes), X.clone()
    (batch,) = collect(model, [wrap(x)], 100)
    with torch.no_grad():
        for view in (batch, batch.on(torch.device("cpu")), batch.on(torch.device("cpu"), torch.float32)):
            assert torch.equal(view(model), view(model))
        half = batch.part(0, 3)
        assert torch.equal(half(model), half(model))
    assert torch.equal(x, X)
    assert torch.equal(tensors_of(batch.args)[0], X)


def test_a_loader_may_fill_one_buffer_again() -> None:
    buffer, labels = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)

    def loader() -> Iterator[Any]:
        for step in range(5):
            yield buffer.fill_(step), labels.fill_(step)

    found = collect(Takes(takes_x), loader(), 18)
    buffer.fill_(-1)
    labels.fill_(-1)
    assert [batch.size for batch in found] == [4, 4, 4, 4, 2]
    for step, batch in enumerate(found):
        assert torch.equal(batch.args[0], torch.full((batch.size, 8), float(step)))
        assert torch.equal(batch.labels, torch.full((batch.size,), step))


def test_an_input_may_require_gradients() -> None:
    x = X.clone().requires_grad_()
    (batch,) = collect(Takes(takes_x), [x], 100)
    assert batch.arguments()[0][0].requires_grad
    assert batch.arguments()[0][0].is_leaf


# ------------------------------------------------------------------------------------------------------------- cuts


def masked(size: int, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, tokens, 8), torch.ones(tokens, tokens).tril()


def attends(self: Any, x: torch.Tensor, mask: torch.Tensor | None = None, positions: Any = None) -> torch.Tensor:
    return self.linear(x if mask is None else mask @ x)


def test_batches_of_several_sizes_tell_a_mask_from_samples() -> None:
    model = Takes(attends)
    found = collect(model, [masked(6), masked(6), masked(4)], 100)
    part = found[0].part(0, 2)
    assert [tensor.shape[0] for tensor in part.args] == [2, 6]
    with torch.no_grad():
        assert torch.equal(part(model), found[0](model)[:2])
    assert not found[0].whole


def test_what_may_be_a_mask_keeps_a_batch_whole() -> None:
    model = Takes(attends)
    for count in (1, 2, 3):
        found = collect(model, [masked(6) for _ in range(count)], 100)
        calibration, guard = split(found)
        for batch in (*calibration, *guard, found[0].part(0, 2), first_samples(found[0], 2)):
            assert batch.size == len(batch.args[0]) == len(batch.args[1]) == 6
        assert len(calibration) == max(1, count - 1)
        assert len(guard) == 1
        assert count == 1 or guard[0] is not calibration[0]
    positions = [(torch.randn(6, 6, 8), None, torch.arange(6)) for _ in range(3)]
    assert collect(model, positions, 100)[0].part(0, 2).size == 6


def test_a_mask_before_the_samples_keeps_a_batch_whole() -> None:
    def forward(self: Any, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.linear(mask @ x)

    found = collect(Takes(forward), [masked(6)[::-1] for _ in range(2)], 100)
    assert found[0].part(0, 2).size == 6


def test_a_mask_with_a_row_for_each_sample_is_cut() -> None:
    model = Takes(attends)
    full = [(torch.randn(6, 5, 8), torch.ones(6, 5, 5)) for _ in range(3)]  # the same mask in all batches
    varied = [(torch.randn(6, 6, 8), (torch.rand(6, 6) > 0.5).float()) for _ in range(3)]
    square = [torch.randn(6, 6)]  # as many samples as features
    for data in (full, varied, square):
        part = collect(model, data, 100)[0].part(0, 2)
        assert part.size == 2
        assert all(tensor.shape[0] == 2 for tensor in part.args)
    assert [batch.size for batch in collect(model, full, 8)] == [6, 2]


def test_arguments_are_followed_by_name() -> None:
    """An optional argument that comes only sometimes does not make another one look shared."""

    def forward(self: Any, x: torch.Tensor, *, a: Any = None, b: Any = None) -> torch.Tensor:
        return self.linear(x if a is None else a @ x)

    model = Takes(forward)
    data = [
        {"x": torch.randn(6, 6, 8), "b": torch.rand(6)},
        {"x": torch.randn(6, 6, 8), "a": torch.ones(6, 6), "b": torch.rand(6)},
        {"x": torch.randn(4, 6, 8), "a": torch.ones(6, 6), "b": torch.rand(4)},
    ]
    first, second, _ = collect(model, data, 100)
    assert {name: len(tensor) for name, tensor in first.part(0, 2).kwargs.items()} == {"x": 2, "b": 2}
    assert {name: len(tensor) for name, tensor in second.part(0, 2).kwargs.items()} == {"x": 2, "a": 6, "b": 2}
    assert first(model).shape == second(model).shape


# ----------------------------------------------------------------------------------------------------------- labels


def takes_lengths(self: Any, x: Any, lengths: Any = None) -> Any: ...
def takes_labels(self: Any, x: Any, labels: Any = None) -> Any: ...
def takes_target(self: Any, x: Any, *, target: Any = None) -> Any: ...
def needs_y(self: Any, x: Any, y: Any) -> Any: ...
def takes_x(self: Any, x: Any) -> Any: ...
def takes_any(self: Any, *inputs: Any) -> Any: ...


@pytest.mark.parametrize(
    ("forward", "arguments"),
    [(takes_lengths, 2), (takes_labels, 1), (takes_target, 1), (needs_y, 2), (takes_x, 1), (takes_any, 1)],
)
def test_integers_at_the_end_of_a_tuple(forward: Callable[..., Any], arguments: int) -> None:
    batch = batch_of(Takes(forward), (X, torch.arange(6)))
    assert len(batch.args) == arguments
    assert (batch.labels is None) == (arguments == 2)
    assert batch_of(Takes(forward), (torch.arange(6),)).labels is None


@pytest.mark.parametrize(
    ("forward", "key", "taken_off"),
    [(takes_labels, "labels", True), (takes_target, "target", True), (takes_x, "y", True), (needs_y, "y", False)],
)
def test_integers_in_a_mapping(forward: Callable[..., Any], key: str, taken_off: bool) -> None:
    batch = batch_of(Takes(forward), {"x": X, key: torch.arange(6)})
    assert (batch.labels is not None) == taken_off
    assert set(batch.kwargs) == ({"x"} if taken_off else {"x", key})


# ---------------------------------------------------------------------------------------------- halves and mixtures


@pytest.mark.parametrize("wrap", [Frozen, Initialized, lambda x: UserDict(x=x), Output])
def test_half_models_cast_containers(wrap: Callable[[torch.Tensor], Any]) -> None:
    def forward(self: Any, given: Any) -> Any:
        return wrap(self.linear(tensors_of(given)[0]))

    model = Takes(forward)
    half = CastModel(Takes(forward).to(torch.bfloat16), torch.bfloat16, torch.float32)
    given = wrap(X)
    out = half(given)
    assert type(out) is type(model(given))
    assert {tensor.dtype for tensor in tensors_of(out)} == {torch.float32}
    assert tensors_of(given)[0] is X or given["x"] is X


def test_models_of_mixed_types() -> None:
    model = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16), nn.LayerNorm(8))
    assert float_dtype(model) == torch.bfloat16
    assert not is_uniform(model)
    assert half_model(model, torch.bfloat16) is model
    assert float_dtype(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8).half())) == torch.float32
    assert is_uniform(nn.Linear(8, 8).double())
    assert is_uniform(nn.ReLU())
    assert float_dtype(nn.ReLU()) == torch.float32


# ------------------------------------------------------------------------------------------------------------- messages


def optimized(model: nn.Module, data: Any, target: str = "int8") -> None:
    optimizer = InferencePrecisionOptimizer(target, progress=False, speed_guard=False, accuracy_threshold=1.0)
    optimizer.optimize_for_inference(model.eval(), data, "cpu")


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (
            (X, torch.arange(6)),
            TypeError,
            r"is a tuple of inputs and labels, .* iterable of batches: \[\(x, labels\)\]",
        ),
        ([X, torch.arange(6)], TypeError, "is a list of inputs and labels"),
        (
            [(X[0], 3), (X[1], 4)],
            ValueError,
            "ends in 3, one class that forward has no parameter for: a sample without",
        ),
        ([(X[0], torch.tensor(3))], ValueError, r"ends in tensor\(3\), one class"),
        (
            [{"pixels": X, "masks": X[:, 0]}] * 3,
            ValueError,
            r"batch 0 .*(?s:.*)none of its keys pixels, masks is a parameter of forward\(x\), so the mapping itself",
        ),
        (
            [X, X, X, X[:, :2]],
            ValueError,
            r"batch 3 of calibration_data makes the model raise RuntimeError: (?s:.*), 2\]",
        ),
        ([X, X, X[:, :2]], ValueError, "batch 2 of calibration_data makes"),  # the guard's
        (X.numpy(), TypeError, r"calibration_data is ndarray, .*; torch.from_numpy\(array\) or torch.as_tensor"),
        ([X.numpy()] * 3, TypeError, r"a calibration batch is ndarray without .*; torch.from_numpy\(array\)"),
        ([(X.numpy(), None)] * 3, TypeError, r"a calibration batch is tuple without .*; torch.from_numpy\(array\)"),
        (
            [UserDict(x=X.numpy())] * 3,
            TypeError,
            r"a calibration batch is UserDict without .*; torch.from_numpy\(array\)",
        ),
        (["x"], TypeError, "whose first dimension is the batch$"),
    ],
)
def test_bad_data_is_named(data: Any, kind: type[Exception], message: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)

    with pytest.raises(kind, match=message):
        optimized(Takes(forward), data)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ((X, torch.arange(6)), "(x=float32[6, 8], depth=int64[6]), the first"),
        ({"depth": torch.arange(6), "x": X}, "(x=float32[6, 8], depth=int64[6]), the first"),
        ((X, None, X[:, 0], 2), "(x=float32[6, 8], depth=NoneType, float32[6], int), the first"),
        ({"x": [X, X], "other": X[:, :1]}, "(x=list of float32[6, 8], float32[6, 8], other=float32[6, 1]), the first"),
        ({"depth": X}, "(depth=float32[6, 8]), the first"),  # x is missing
    ],
)
def test_arguments_on_which_the_model_raises_are_named_as_forward_does(value: Any, said: str) -> None:
    def forward(self: Any, x: Any, depth: Any = None, *rest: Any, **more: Any) -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(ValueError, match="batch 0 of calibration_data makes the model raise") as caught:
        optimized(Takes(forward), [value] * 3)
    assert f"\nIt was called with {said}" in str(caught.value)


def test_bad_data_of_a_half_model_is_named() -> None:
    with pytest.raises(ValueError, match="batch 2 of calibration_data makes the model raise RuntimeError"):
        optimized(Takes(lambda self, x: self.linear(x)), [X, X, X[:, :2]], "bfloat16")


def test_batches_that_only_look_like_inputs_and_labels() -> None:
    """Lists of batches, and integers that forward has a parameter for."""
    table = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    optimized(table, [torch.arange(6), torch.arange(6)])
    optimized(Takes(lambda self, x: self.linear(x)), [X, X])

    def scaled(self: Any, x: torch.Tensor, factor: int) -> torch.Tensor:
        return self.linear(x) * factor

    optimized(Takes(scaled), [(X, 3), (X, 3), (X, 3)])


@pytest.mark.parametrize(
    ("device", "kind"), [(None, TypeError), (0, TypeError), ("xyz", ValueError), ("cuda:x", ValueError)]
)
def test_bad_devices_are_named(device: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"target_device is {device!r}, expected .*cpu or cuda"):
        InferencePrecisionOptimizer().optimize_for_inference(Takes(lambda self, x: x), [X], device)


def test_ways_to_cut_a_batch() -> None:
    x, mask, places = torch.randn(4, 4, 2), torch.ones(4, 4), torch.arange(4)
    known = Batch((Frozen(x), mask), {}, None, 4, shared=frozenset({(1, 1, 0)}))
    (cut,) = known.ways_to_cut(3)
    assert [list(tensor.shape) for tensor in cut.tensors().values()] == [[3, 4, 2], [4, 4]]
    doubtful = Batch((x,), {"mask": mask, "places": places}, None, 4, whole=True)
    ways = [[len(tensor) for tensor in each.tensors().values()] for each in doubtful.ways_to_cut(1)]
    assert ways == [[1, 1, 1], [1, 4, 4]]
    assert doubtful.part(0, 1) is doubtful
    assert list(with_fewer_samples(Batch((x[:1],), {}, None, 1))) == []
    assert [batch.size for batch in with_fewer_samples(Batch((x,), {}, None, 4))] == [3, 2]
    assert [len(each.x) for each in with_fewer_samples(Frozen(x))] == [3, 2]
    assert list(with_fewer_samples("no tensor")) == []


def test_a_sample_twice() -> None:
    x, mask = torch.randn(1, 3), torch.ones(1, 2)
    batch = Batch((Frozen(x),), {"mask": mask}, torch.tensor([4]), 1, shared=frozenset({("mask", 1, 0)})).twice()
    assert batch.size == 2
    assert torch.equal(batch.args[0].x, torch.cat([x, x]))
    assert torch.equal(batch.kwargs["mask"], mask)
    assert batch.labels.tolist() == [4, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_arguments_without_a_finite_value(dtype: torch.dtype) -> None:
    nothing = torch.full((5, 30), float("nan"), dtype=dtype)
    nothing[0] = float("inf")
    late = nothing.clone()
    late[-1, -1] = torch.finfo(dtype).max
    batch = Batch(
        (nothing, late, torch.ones(5, dtype=torch.int64)), {"mask": nothing[:, 0], "no": nothing[:0]}, None, 5
    )
    assert batch.without_finite_values() == ["argument 0", "mask"]
