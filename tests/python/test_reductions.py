"""The half reductions as the default of a policy: what acts, what is left alone, and what stays possible."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from halfstep import MixedPrecisionConfig, MixedPrecisionManager, reductions
from halfstep.reductions import HalfNorm, remove_half_norms, use_half_norms
from torch import nn
from torch.utils.checkpoint import checkpoint

ALL = ("layer_norm", "rms_norm", "group_norm", "cross_entropy", "float32_input")
HALF = [torch.float16, torch.bfloat16]
NORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "layer_norm": (lambda **options: nn.LayerNorm(64, **options), (32, 64)),
    "rms_norm": (lambda **options: nn.RMSNorm(64, eps=1e-5, **options), (32, 64)),
    "group_norm": (lambda **options: nn.GroupNorm(4, 64, **options), (3, 64, 5, 7)),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*float16 arithmetic", "ignore:Mismatch dtype", "ignore:`torch.jit:DeprecationWarning"
)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all three norms act on the CPU too, where by default RMSNorm alone is faster than torch's."""
    monkeypatch.setattr(reductions, "_FASTER_ON_CPU", (nn.Module,))


def make(kind: str, device: torch.device | str = "cpu", **options) -> tuple[nn.Module, torch.Tensor]:
    """Return a norm with weights of its own, and an input that requires a gradient."""
    factory, shape = NORMS[kind]
    norm = factory(**options).to(device)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm, torch.randn(shape, device=device)


def is_ours(out: torch.Tensor) -> bool:
    return "NormFunction" in out.grad_fn.name()


def acts(norm: nn.Module) -> bool:
    return isinstance(norm.__dict__.get("forward"), HalfNorm)


def network(device: torch.device | str = "cpu") -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 8)).to(device)


def half(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast(torch.device(device).type, dtype=dtype)


# ------------------------------------------------------------------------------------------------------ what acts


def assert_no_further(
    norm: nn.Module, inputs: list[torch.Tensor], grad: torch.Tensor, got: list[torch.Tensor], peer: list[torch.Tensor]
) -> None:
    """Compare results and gradients with float64: ours may be no further from it than torch's."""
    wide = [value.detach().double().requires_grad_() for value in inputs]
    reference = torch.func.functional_call(
        copy.deepcopy(norm).double(),
        dict(zip([name for name, _ in norm.named_parameters()], wide[1:], strict=True)),
        wide[0],
    )
    exact = [reference, *torch.autograd.grad(reference, wide, grad.double())]
    for ours, torchs, expected in zip(got, peer, exact, strict=True):
        error, peer_error = ((value.double() - expected).abs().max().item() for value in (ours, torchs))
        slack = 2e-6 * expected.abs().max().item()  # float32 sums in another order
        assert error <= 1.05 * peer_error + slack, f"ours is off by {error:.3g}, torch's path by {peer_error:.3g}"


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", NORMS)
def test_half_out_and_never_further_from_float64_than_torchs_path(device, kind: str, dtype: torch.dtype) -> None:
    norm, x = make(kind, device)
    x = x.to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    inputs = [x, *norm.parameters()]

    def run(scoped: bool) -> list[torch.Tensor]:
        use_half_norms(norm, [kind] if scoped else [])
        with half(device, dtype):
            out = norm(x)
        assert is_ours(out) == scoped
        return [out.to(dtype), *torch.autograd.grad(out, inputs, grad.to(out.dtype))], out.dtype

    (got, out_dtype), (peer, _) = run(True), run(False)
    assert out_dtype is dtype
    assert_no_further(norm, inputs, grad, got, peer)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", NORMS)
def test_a_float32_stream_gives_half_in_one_pass(device, kind: str, dtype: torch.dtype) -> None:
    norm, x = make(kind, device)
    x.requires_grad_()
    grad = torch.randn_like(x, dtype=dtype)
    inputs = [x, *norm.parameters()]

    def run(*names: str) -> list[torch.Tensor]:
        use_half_norms(norm, names)
        with half(device, dtype):
            out = norm(x)
            cast = out.to(dtype)  # torch's path: what the next product does
        assert is_ours(out) == ("float32_input" in names)
        assert out.dtype is (dtype if is_ours(out) else torch.float32)
        return [cast, *torch.autograd.grad(cast, inputs, grad)]

    got, peer = run(kind, "float32_input"), run(kind)
    assert got[1].dtype is torch.float32, "the stream's gradient is float32 too"
    assert_no_further(norm, inputs, grad, got, peer)


@pytest.mark.usefixtures("everywhere")
def test_the_rule_for_float32_inputs_may_change_under_way(device: torch.device) -> None:
    norm, x = make("layer_norm", device)
    forwards = []
    for names, dtype in ((ALL, torch.bfloat16), (("layer_norm",), torch.float32), (ALL, torch.bfloat16)):
        use_half_norms(norm, names)
        forwards.append(norm.__dict__["forward"])
        with half(device):
            assert norm(x).dtype is dtype
    assert forwards[0] is forwards[1] is forwards[2]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", NORMS)
def test_weights_may_be_half_or_absent(device: torch.device, kind: str) -> None:
    for norm, x in (make(kind, device), make(kind, device, **{plain(kind): False})):
        expected = norm.double()(x.double())
        for dtype in (torch.float32, torch.bfloat16):
            norm = norm.to(dtype)
            use_half_norms(norm, [kind])
            with half(device):
                out = norm(x.bfloat16().requires_grad_())
            assert is_ours(out)
            torch.testing.assert_close(out.double(), expected, rtol=0.03, atol=0.03)


def plain(kind: str) -> str:
    return "affine" if kind == "group_norm" else "elementwise_affine"


@pytest.mark.parametrize("kind", NORMS)
def test_on_the_cpu_torchs_faster_kernels_stay(kind: str) -> None:
    norm, x = make(kind)
    use_half_norms(norm, [kind])
    with half("cpu"):
        out = norm(x.bfloat16().requires_grad_())
    assert is_ours(out) == (kind == "rms_norm")
    assert out.dtype is torch.bfloat16


@pytest.mark.cuda
@pytest.mark.parametrize("kind", NORMS)
def test_on_a_gpu_all_three_act(kind: str) -> None:
    norm, x = make(kind, "cuda")
    x = x.half().requires_grad_()
    use_half_norms(norm, NORMS)
    with half("cuda", torch.float16):
        assert norm(x).dtype is torch.float16
        assert is_ours(norm(x))


# ----------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", NORMS)
def test_everything_else_is_torchs_own(device: torch.device, kind: str) -> None:
    norm, x = make(kind, device)
    scoped = copy.deepcopy(norm)
    use_half_norms(scoped, [kind])
    calls = [
        ("float32 input", True, lambda norm: norm(x)),
        ("autocast off", False, lambda norm: norm(x)),
        ("float64", True, lambda norm: copy.deepcopy(norm).double()(x.double())),
        ("float64 weight", False, lambda norm: copy.deepcopy(norm).double()(x.double())),
        ("a keyword", True, lambda norm: norm(**{"x" if kind == "rms_norm" else "input": x.bfloat16()})),
    ]
    if kind == "group_norm":
        image = x.bfloat16().to(memory_format=torch.channels_last)
        calls.append(("channels_last", True, lambda norm: norm(image)))
        assert scoped(image.float()).stride() == norm(image.float()).stride()
    for name, autocast, call in calls:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            got, expected = call(scoped), call(norm)
        assert got.dtype is expected.dtype, name
        assert got.stride() == expected.stride(), name
        assert torch.equal(got, expected), name
        assert not is_ours(got), name
    with pytest.raises(TypeError, match="argument"):
        scoped()
    with half(device), pytest.raises((RuntimeError, ValueError), match="shape|divisor"):
        scoped(torch.ones(3, 5, device=device, dtype=torch.bfloat16))
    with half(device):
        assert is_ours(scoped(x.bfloat16().requires_grad_())), "an exception leaves it as it was"


@pytest.mark.usefixtures("everywhere")
def test_nested_tensors_are_torchs() -> None:
    norm = nn.LayerNorm(8).bfloat16()
    use_half_norms(norm, ALL)
    rows = [torch.randn(n, 8).bfloat16() for n in (2, 3)]
    with half("cpu"):
        for layout in (torch.strided, torch.jagged):
            out = norm(torch.nested.nested_tensor(rows, layout=layout))
            torch.testing.assert_close(out.unbind()[1], norm(rows[1]), rtol=2e-2, atol=2e-2)


class OwnNorm(nn.LayerNorm):
    pass


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_modules_that_are_not_plainly_torchs_are_left_alone() -> None:
    own, replaced, parametrized, replicated = OwnNorm(8), nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
    replaced.forward = lambda x: x
    forward = replaced.forward
    nn.utils.parametrize.register_parametrization(parametrized, "weight", Doubled())
    plain_norm = nn.LayerNorm(8)
    model = nn.ModuleList([own, replaced, parametrized, nn.DataParallel(nn.Sequential(replicated)), plain_norm])
    use_half_norms(model, ALL)
    assert acts(plain_norm)
    assert not any(map(acts, (own, replaced, parametrized, replicated)))
    remove_half_norms(model)
    assert replaced.forward is forward
    assert "forward" not in plain_norm.__dict__


@pytest.mark.usefixtures("everywhere")
def test_a_parametrization_that_comes_later_is_computed() -> None:
    norm, x = make("layer_norm")
    use_half_norms(norm, ALL)
    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    with half("cpu"):
        out = norm(x.bfloat16())
    expected = F.layer_norm(x.bfloat16().float(), (64,), norm.weight, norm.bias)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------- copies, files and programs


def copy_by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def copy_by_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy_by_pickle, copy_by_save])
def test_a_copys_norm_uses_the_copys_weights(duplicate: Callable) -> None:
    model = network()
    keys = list(model.state_dict())
    use_half_norms(model, ALL)
    assert list(model.state_dict()) == keys
    twin = duplicate(model)
    assert acts(twin[1])
    assert list(twin.state_dict()) == keys
    x = torch.randn(4, 8)
    with half("cpu"):
        before = model(x)
        assert torch.equal(twin(x), before)
        with torch.no_grad():
            twin[1].weight.fill_(3.0)
        torch.clear_autocast_cache()
        assert not torch.equal(twin(x), before)
        assert torch.equal(model(x), before)
    remove_half_norms(twin)
    assert acts(model[1])
    assert not acts(twin[1])


@pytest.mark.usefixtures("everywhere")
def test_one_norm_under_two_names() -> None:
    norm = nn.LayerNorm(8)
    model = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm)
    use_half_norms(model, ALL)
    forward = norm.forward
    use_half_norms(model, ALL)
    assert norm.forward is forward, "compiled code is made for this object"
    with half("cpu"):
        model(torch.randn(4, 8)).float().sum().backward()
    assert norm.weight.grad is not None
    remove_half_norms(model)
    assert not acts(norm)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph_and_follows_changes(device, backend: str, training: bool) -> None:
    torch._dynamo.reset()
    model, x = network(device).train(training), torch.randn(4, 8, device=device)
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def outputs() -> list[torch.Tensor]:
        results = []
        for run in (compiled, model):
            model.zero_grad()
            with half(device):
                out = run(x)
            out.float().square().sum().backward()
            results += [out, model[1].weight.grad.clone()]
        return results

    for names in ((), ALL, ()):
        use_half_norms(model, names)
        got, grad, expected, expected_grad = outputs()
        assert got.dtype is expected.dtype
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grad, expected_grad, rtol=5e-2, atol=5e-2)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(device: torch.device, reentrant: bool) -> None:
    model, x = network(device), torch.randn(4, 8, device=device, requires_grad=True)
    use_half_norms(model, ALL)

    def gradients(run: Callable) -> list[torch.Tensor]:
        with half(device):
            loss = run(x).float().square().mean()
        return torch.autograd.grad(loss, [x, *model.parameters()]) if not reentrant else backward(loss)

    def backward(loss: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        x.grad = None
        loss.backward()
        return [value.grad.clone() for value in (x, *model.parameters())]

    expected = gradients(model)
    for got, value in zip(gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant)), expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.usefixtures("everywhere")
def test_a_second_derivative_needs_the_setting_off(device: torch.device) -> None:
    model = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = MixedPrecisionManager(precision_policy="mixed_bfloat16")
    manager.setup_pytorch_training(model, optimizer)
    x = torch.randn(4, 8, device=device, requires_grad=True)

    def penalty() -> torch.Tensor:
        with manager.autocast_context():
            (grad,) = torch.autograd.grad(model(x).float().square().sum(), x, create_graph=True)
        return grad.float().square().sum()

    with pytest.raises(RuntimeError, match="is differentiable once"):
        penalty().backward()
    manager.update_config(half_reductions=())
    penalty().backward()
    assert model[1].weight.grad.abs().sum() > 0


class WithAutocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    model, x = network(), torch.randn(4, 8)
    use_half_norms(model, ALL)
    for exported in (model, WithAutocast(model)):
        program = torch.export.export(exported, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), exported(x), rtol=2e-2, atol=2e-2)
        program = program.run_decompositions()
        assert not [node for node in program.graph.nodes if "halfstep" in str(node.target)]


@pytest.mark.usefixtures("everywhere")
def test_trace_works_and_script_says_what_to_do() -> None:
    model, x = network(), torch.randn(4, 8)
    manager = MixedPrecisionManager(precision_policy="mixed_bfloat16")
    manager.setup_pytorch_training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        traced = torch.jit.trace(model, x)
        expected = model(x)
    assert "halfstep::layer_norm" in str(traced.inlined_graph)
    assert torch.equal(traced(x), expected)
    with pytest.raises(AttributeError, match=r"call manager\.remove_policy\(model\) first"):
        torch.jit.script(model)
    manager.remove_policy(model)
    assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.usefixtures("everywhere")
def test_function_transforms(device: torch.device) -> None:
    norm, x = make("layer_norm", device)
    x = x.bfloat16()
    use_half_norms(norm, ALL)
    with half(device):
        rows = torch.func.vmap(norm)(x)
        swapped = torch.func.functional_call(norm, {"weight": torch.zeros(64, device=device)}, x)
        assert torch.equal(swapped, norm.bias.bfloat16().expand(32, 64)), "the weights of the call"
        torch.testing.assert_close(rows, norm(x), rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------------------------------------------ the manager


def set_up(manager: MixedPrecisionManager, model: nn.Module):
    return manager.setup_pytorch_training(model, torch.optim.Adam(model.parameters(), lr=3e-3))[1:]


def acting(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if acts(module)]


def test_the_setting_is_checked_and_stored_as_a_tuple() -> None:
    assert MixedPrecisionConfig().half_reductions == ALL
    config = MixedPrecisionConfig(half_reductions=["rms_norm"])
    assert config.half_reductions == ("rms_norm",)
    for bad, error in ((("softmax",), ValueError), ("rms_norm", TypeError), (None, TypeError), ((1,), ValueError)):
        with pytest.raises(error, match="^half_reductions is .*, expected a tuple of names out of 'layer_norm'"):
            config.half_reductions = bad
    assert config.half_reductions == ("rms_norm",)


def test_setup_update_and_removal() -> None:
    model = network()
    manager = MixedPrecisionManager(precision_policy="mixed_bfloat16")
    set_up(manager, model)
    assert acting(model) == ["1", "3"]
    forward = model[1].forward
    manager.update_config(loss_scale_growth_interval=7)
    assert model[1].forward is forward
    manager.update_config(half_reductions=["rms_norm"])
    assert acting(model) == ["3"]
    with pytest.raises(ValueError, match="half_reductions is"):
        manager.update_config(half_reductions=["all"])
    assert acting(model) == ["3"]
    manager.update_config(enable_autocast=False)
    assert acting(model) == []
    manager.update_config(enable_autocast=True, half_reductions=ALL)
    second = network()
    set_up(manager, second)
    manager.update_config(half_reductions=("layer_norm",))
    assert acting(model) == acting(second) == ["1"], "every model that was set up follows"
    manager.remove_policy(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    manager.update_config(half_reductions=ALL)
    assert acting(model) == []
    assert acting(second) == ["1", "3"]
    with pytest.raises(TypeError, match="model is str, expected torch.nn.Module"):
        manager.remove_policy("model")


def test_the_last_setup_of_a_model_counts() -> None:
    model = network()
    for settings, expected in (
        ({"precision_policy": "mixed_float16"}, ["1", "3"]),
        ({"config": MixedPrecisionConfig(half_reductions=("layer_norm", "cross_entropy"))}, ["1"]),
        ({"config": MixedPrecisionConfig(half_reductions=())}, []),
        ({"precision_policy": "mixed_bfloat16"}, ["1", "3"]),
        ({"precision_policy": "float32"}, []),
        ({"config": MixedPrecisionConfig(enable_autocast=False)}, []),
    ):
        set_up(MixedPrecisionManager("pytorch", **settings), model)
        assert acting(model) == expected, settings


class Transformer(nn.Module):
    """Two blocks on sequences of 16 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.place = nn.Parameter(torch.randn(12, 32) * 0.1)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32), nn.RMSNorm(32), nn.Linear(32, 32)])
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place
        for norm, qkv, out, second, mlp in self.blocks:
            q, k, v = qkv(norm(x)).chunk(3, dim=-1)
            x = x + out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
            x = x + F.gelu(mlp(second(x)))
        return self.head(self.norm(x))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.cuda)])
def test_training_falls_as_torchs_does(policy: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    losses: dict[tuple[str, ...], list[float]] = {}
    for names in (ALL, ()):
        torch.manual_seed(1)
        model = Transformer().to(device)
        manager = MixedPrecisionManager(config=MixedPrecisionConfig(policy, half_reductions=names))
        optimizer, scaler = set_up(manager, model)
        assert len(acting(model)) == (5 if names else 0)
        losses[names] = []
        for _ in range(60):
            start = torch.randint(16, (32, 1), device=device)
            tokens = (start + torch.arange(13, device=device) * (1 + start % 3)) % 16  # the next follows from two
            optimizer.zero_grad()
            with manager.autocast_context():
                loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[names].append(loss.item())
    ours, torchs = losses[ALL], losses[()]
    assert torchs[-1] < 0.4 * torchs[0]
    for step in range(0, 60, 10):
        assert ours[step] == pytest.approx(torchs[step], rel=0.05), f"step {step}: {ours[step]} {torchs[step]}"
    assert ours[-1] == pytest.approx(torchs[-1], rel=0.05)
