"""torch.classes.halfstep.Observer: the tensors it takes, TorchScript, copies, damaged pickles, threads and GPUs."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading

import pytest
import torch
from calibration_cases import CASES, METHODS, normal, observer_of
from halfstep.int8_fake import register_fakes
from torch import nn

# --------------------------------------------------------------------------------------------------------- tensors


def test_non_finite_values_are_counted_and_passed_over(device: torch.device) -> None:
    observer = observer_of(torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -2.0], device=device))
    assert (observer.count(), observer.nonfinite()) == (2, 3)
    assert (observer.min(), observer.max()) == (-2.0, 1.0)
    nothing = observer_of(torch.tensor([float("nan")], device=device))
    for method in METHODS:
        with pytest.raises(ValueError, match="no finite value was observed"):
            nothing.parameters(method)
    with pytest.raises(ValueError, match="no finite value was observed"):
        nothing.min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_layout(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 6, 5, 7, device=device).to(dtype)
    for dim in (0, 1, 2, 3, -1):
        expected = x.float().movedim(dim, 0).flatten(1)
        for same in (
            x,
            x.to(memory_format=torch.channels_last),
            x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
            torch.cat([x, x], 2)[:, :, :5],
            x.requires_grad_(),
        ):
            observer = observer_of(same, channels_dim=dim)
            assert torch.equal(observer.channel_max(), expected.detach().abs().amax(1).cpu())
            assert torch.allclose(observer.channel_mean(), expected.detach().double().mean(1).cpu(), rtol=1e-12)
            assert torch.equal(observer.histogram()[0], observer_of(x.detach().cpu()).histogram()[0])
    expanded = torch.tensor([[1.0], [2.0]], device=device).expand(2, 10)
    assert observer_of(expanded).count() == 20


def test_channels_that_have_no_finite_value() -> None:
    x = torch.tensor([[1.0, float("nan")], [3.0, float("inf")]])
    observer = observer_of(x, channels_dim=-1)
    assert observer.channel_max().tolist() == [3.0, 0.0]
    assert observer.channel_mean().tolist() == [2.0, 0.0]


def test_sums_of_channels_do_not_depend_on_threads() -> None:
    torch.manual_seed(4)
    before = torch.get_num_threads()
    try:
        for shape, dim in (((20000, 33), 1), ((30, 7, 50, 50), 1)):
            x = torch.randn(shape) * 100
            means = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                means.append(observer_of(x, channels_dim=dim).channel_mean())
            assert torch.equal(means[0], means[1])
            assert torch.equal(means[0], means[2])
    finally:
        torch.set_num_threads(before)


def test_what_is_refused() -> None:
    observer = observer_of(channels_dim=1)
    for dtype in (torch.float64, torch.int32, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match="expected Float, Half or BFloat16"):
            observer.observe(torch.zeros(2, 2, dtype=dtype))
    with pytest.raises(ValueError, match="expected a strided tensor"):
        observer.observe(torch.eye(2).to_sparse())
    with pytest.raises(NotImplementedError, match="meta"):
        observer.observe(torch.ones(2, 2, device="meta"))
    with pytest.raises(ValueError, match="has 1 dimensions, so none of index 1"):
        observer.observe(torch.ones(3))
    for tensor in (torch.ones(0), torch.ones(3, 0)):
        observer.observe(tensor)
    assert observer.batches() == 0
    with pytest.raises(ValueError, match="there are no channels"):
        observer.channel_max()
    observer.observe(torch.ones(2, 3))
    with pytest.raises(ValueError, match="got 4 channels, expected 3"):
        observer.observe(torch.ones(2, 4))
    assert observer.count() == 6
    for arguments, message in {
        ("max",): "method is 'max'",
        ("mse", False, 9): "bits is 9",
        ("mse", False, 2**32 + 8): "bits is 4294967304",
        ("percentile", False, 8, 0.0): "percentile is 0",
        ("percentile", False, 8, float("nan")): "percentile is nan",
    }.items():
        with pytest.raises(ValueError, match=message):
            observer.parameters(*arguments)
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode, pytest.raises((TypeError, NotImplementedError)):
        observer.observe(mode.from_tensor(torch.ones(2, 3)))


def test_reset() -> None:
    observer = observer_of(torch.ones(2, 3), channels_dim=0)
    observer.reset()
    assert (observer.count(), observer.batches(), observer.channels_dim()) == (0, 0, 0)
    observer.observe(torch.full((5, 1), 0.5))
    assert observer.channel_max().tolist() == [0.5] * 5


# ------------------------------------------------------------------------------------- TorchScript, copies, threads


class Scripted(nn.Module):
    def __init__(self, observer) -> None:
        super().__init__()
        self.observer = observer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, float, int]:
        self.observer.observe(x)
        scale, zero_point = self.observer.parameters("percentile", bits=7, percentile=99.0)
        return self.observer.histogram()[0], scale, zero_point


def same(a, b) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(flat(a.__getstate__()), flat(b.__getstate__()), strict=True)
    )


def flat(state) -> list:
    return [leaf for entry in state for leaf in (flat(entry) if isinstance(entry, list | tuple) else [entry])]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_torchscript(device: torch.device) -> None:
    scripted = torch.jit.script(Scripted(observer_of(normal(), channels_dim=None))).to(device)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    x = torch.randn(300, device=device)
    counts, scale, zero_point = loaded(x)
    expected = observer_of(normal(), x)
    assert torch.equal(counts, expected.histogram()[0])
    assert (scale, zero_point) == expected.parameters("percentile", False, 7, 99.0)
    assert scripted.observer.batches() == 1

    @torch.jit.script
    def made_inside(y: torch.Tensor) -> torch.Tensor:
        observer = torch.classes.halfstep.Observer(-1)
        observer.observe(y)
        return observer.channel_max()

    assert made_inside(torch.tensor([[1.0, -3.0], [-2.0, 0.0]])).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("channels_dim", [None, 0])
def test_copies_are_equal_and_apart(device: torch.device, channels_dim: int | None) -> None:
    for tensors in ([], [torch.tensor([float("nan")])], [torch.randn(5, 9), torch.randn(5, 2) * 1e-40]):
        observer = observer_of(*(tensor.to(device) for tensor in tensors), channels_dim=channels_dim)
        for other in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
            assert same(observer, other)
            assert other.channels_dim() == channels_dim
            size = 5 if len(tensors) == 2 else 1
            other.observe(torch.randn(size, 3, device=device))
            assert not same(observer, other)


def damaged_states():
    def changed(entry: int, index: int | slice, value: float):
        def damage(state: list) -> None:
            state[entry][index] = value

        return damage

    def replaced(entry: int, value):
        def damage(state: list) -> None:
            state[entry] = value

        return damage

    def channel(entry: int, value: torch.Tensor):
        def damage(state: list) -> None:
            state[3][entry] = value

        return damage

    return {
        "a negative count": changed(1, 2100, -1),
        "a count outside": changed(1, 0, 1),
        "too many zeros": changed(1, 4096, 100),
        "no batches": changed(1, 4098, 0),
        "short counts": replaced(1, torch.zeros(7, dtype=torch.int64)),
        "float counts": replaced(1, torch.zeros(4099)),
        "counts of two dimensions": replaced(1, torch.zeros(4099, 1, dtype=torch.int64)),
        "strided counts": replaced(1, torch.zeros(2 * 4099, dtype=torch.int64)[::2]),
        "a NaN": changed(2, 0, float("nan")),
        "another range": changed(2, 1, 2.0**20),
        "an infinity": changed(2, 1, float("inf")),
        "an average outside": changed(2, 2, -100.0),
        "short numbers": replaced(2, torch.zeros(3, dtype=torch.float64)),
        "channels without a dimension": replaced(0, None),
        "no channels": replaced(3, []),
        "fewer maxima": channel(0, torch.ones(1)),
        "an infinite maximum": channel(0, torch.tensor([1.0, float("inf")])),
        "a sum above the maximum": channel(1, torch.tensor([0.0, 1e9], dtype=torch.float64)),
        "another number of values": channel(2, torch.tensor([4, 5])),
        "a negative number of values": channel(2, torch.tensor([9, -1])),
    }


@pytest.mark.parametrize("damage", damaged_states())
def test_damaged_pickles_are_refused(damage: str) -> None:
    observer = observer_of(torch.tensor([[1.0, -2.0, 0.0, 0.5], [3.0, 0.25, 0.0, 1.0]]), channels_dim=0)
    (channels_dim, counts, numbers, channels), name = observer.__getstate__()
    state = [channels_dim, counts.clone(), numbers.clone(), list(channels)]

    def unpickle():
        made = torch._C.ScriptObject.__new__(torch._C.ScriptObject)
        made.__setstate__((tuple(state), name))
        return made

    assert same(unpickle(), observer)
    damaged_states()[damage](state)
    with pytest.raises(ValueError, match="RangeHistogram: |Observer: |ChannelStatistics: "):
        unpickle()


def test_several_threads(device: torch.device) -> None:
    torch.manual_seed(5)
    batches = [torch.randn(3000, 4, device=device) * 2.0**i for i in range(-6, 6)]
    expected = observer_of(*batches, channels_dim=1)
    observer = observer_of(channels_dim=1)
    failures = []

    def observe(own: list[torch.Tensor]) -> None:
        try:
            for batch in own:
                observer.observe(batch)
                observer.parameters("percentile")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=observe, args=(batches[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert torch.equal(observer.histogram()[0], expected.histogram()[0])
    assert (observer.count(), observer.batches()) == (expected.count(), 12)
    assert torch.equal(observer.channel_max(), expected.channel_max())
    assert torch.allclose(observer.channel_mean(), expected.channel_mean(), rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_the_gpu_counts_as_the_cpu_does(case: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor(CASES[case]).to(dtype)
        on_cpu, on_gpu = observer_of(x, x[:7] * 1e-3, x * 4), observer_of(*(y.cuda() for y in (x, x[:7] * 1e-3, x * 4)))
        assert same(on_cpu, on_gpu)


@pytest.mark.cuda
def test_cpu_and_gpu_batches_in_one_observer() -> None:
    batches = [torch.randn(100, 3) * 10.0**i for i in range(5)]
    mixed = observer_of(*(x.cuda() if i % 2 else x for i, x in enumerate(batches)), channels_dim=1)
    assert torch.equal(mixed.histogram()[0], observer_of(*batches).histogram()[0])
    assert torch.equal(mixed.channel_max(), torch.cat(batches).abs().amax(0))


@pytest.mark.cuda
def test_several_streams() -> None:
    streams = [torch.cuda.Stream() for _ in range(4)]
    batches = [torch.randn(200000, device="cuda") * 2.0 ** (i % 5) for i in range(20)]
    torch.cuda.synchronize()
    observer = observer_of()
    for i, batch in enumerate(batches):
        with torch.cuda.stream(streams[i % 4]):
            observer.observe(batch)
    assert torch.equal(observer.histogram()[0], observer_of(*(x.cpu() for x in batches)).histogram()[0])


@pytest.mark.cuda
def test_capturing_a_graph_is_refused() -> None:
    x = torch.ones(4, device="cuda")
    observer = observer_of(x)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="calibrate before the capture"), torch.cuda.graph(graph):
        observer.observe(x)
    assert observer.batches() == 1


def test_export_keeps_the_observation(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    register_fakes()

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.observer = torch.classes.halfstep.Observer(-1)
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.observer.observe(x)
            return self.linear(x)

    model = Watched().to(device).eval()
    x = torch.randn(5, 4, device=device)
    program = torch.export.export(model, (x,), strict=False)
    assert not [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert model.observer.batches() == 0  # tracing observes nothing
    exported = program.module()
    with torch.no_grad():
        assert torch.equal(exported(x), model(x))
        exported(2 * x)
    observers = {id(each): each for each in (model.observer, *exported.__dict__.values()) if hasattr(each, "observe")}
    seen = sum(each.batches() for each in observers.values())
    assert seen == 3
    assert max(each.max() for each in observers.values()) == pytest.approx(2 * x.max().item())


def test_observers_are_not_read_in_exported_code() -> None:
    register_fakes()

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.observer = torch.classes.halfstep.Observer(None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.observer.max()

    with pytest.raises(NotImplementedError, match=r"Observer.max\(\) has no meaning in a traced program"):
        torch.export.export(Reads(), (torch.ones(2),), strict=False)
