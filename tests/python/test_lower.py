"""lower(): the bits of the eager model with its plan under autocast, and files that need no halfstep."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from halfstep import PrecisionPlan, PrecisionPolicy, apply_plan, lower
from lower_cases import CASES, PLANS, WIDTH, Cnn, Mlp
from lower_refused import ByInterface, CallsPython, Forks, OwnAutocast
from torch import nn
from without_python import run_without_python

pytestmark = [
    pytest.mark.usefixtures("no_jit_fuser"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.bfloat16}


def policy(name: str) -> tuple[PrecisionPolicy, torch.dtype]:
    default, rules = PLANS[name]
    return PrecisionPolicy(name, default, rules), DTYPES[default]


def script(model: nn.Module, inputs: tuple, how: str) -> torch.jit.ScriptModule:
    return torch.jit.script(model) if how == "script" else torch.jit.trace(model, inputs, check_trace=False)


def tensors(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [one for part in result for one in tensors(part)]


def under_autocast(model: nn.Module, plan: PrecisionPlan, dtype: torch.dtype, inputs: tuple) -> list[torch.Tensor]:
    """Return what the eager model gives with the plan applied, the weights the same."""
    model = copy.deepcopy(model)
    apply_plan(model, plan)
    device = next(model.parameters()).device.type
    with torch.no_grad(), torch.autocast(device, dtype=dtype):
        return tensors(model(*inputs))


def assert_same_bits(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [one.dtype for one in got] == [one.dtype for one in expected]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other), (one.float() - other.float()).abs().max()


def made(case: str, device: torch.device) -> tuple[nn.Module, tuple]:
    model = CASES[case].make().eval().to(device)
    return model, tuple(one.to(device) for one in CASES[case].inputs())


SCRIPTED_AND_TRACED = [
    pytest.param(case, how, id=f"{case}-{how}")
    for case in CASES
    for how in (("script", "trace") if CASES[case].traces else ("script",))
]


@pytest.mark.parametrize("plan_name", [name for name in PLANS if name != "only float32"])
@pytest.mark.parametrize(("case", "how"), SCRIPTED_AND_TRACED)
def test_the_bits_of_the_eager_plan_under_autocast(device: torch.device, case: str, how: str, plan_name: str) -> None:
    model, inputs = made(case, device)
    maker, dtype = policy(plan_name)
    plan = maker.plan(model)
    expected = under_autocast(model, plan, dtype, inputs)
    lowered = lower(script(model, inputs, how), plan, dtype)
    with torch.no_grad():
        assert_same_bits(tensors(lowered(*inputs)), expected)
    assert_same_bits(tensors(lowered(*inputs)), expected)
    assert not any(one.requires_grad for one in tensors(lowered(*inputs)))


@pytest.mark.parametrize(("case", "how"), SCRIPTED_AND_TRACED)
def test_a_plan_of_float32_changes_no_bit(device: torch.device, case: str, how: str) -> None:
    model, inputs = made(case, device)
    plan = policy("only float32")[0].plan(model)
    with torch.no_grad():
        expected = tensors(model(*inputs))
        assert_same_bits(tensors(lower(script(model, inputs, how), plan)(*inputs)), expected)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_the_original_stays_as_it_is(how: str) -> None:
    model, inputs = made("cnn", torch.device("cpu"))
    scripted = script(model, inputs, how)
    before = {name: value.clone() for name, value in scripted.state_dict().items()}
    expected, code = scripted(*inputs), scripted.code
    lowered = lower(scripted, policy("half")[0].plan(model))
    for value in lowered.state_dict().values():
        value.zero_()
    assert {name: value.dtype for name, value in scripted.state_dict().items()} == {
        name: value.dtype for name, value in before.items()
    }
    assert all(torch.equal(value, before[name]) for name, value in scripted.state_dict().items())
    assert torch.equal(scripted(*inputs), expected)
    assert scripted.code == code
    assert all(parameter.requires_grad for parameter in scripted.parameters())


def test_what_is_stored_in_half_precision() -> None:
    model, inputs = made("cnn", torch.device("cpu"))
    rules = [{"name": "head", "precision": "float32"}]
    lowered = lower(torch.jit.script(model), PrecisionPolicy("test", "bfloat16", rules).plan(model))
    half = {name for name, value in lowered.state_dict().items() if value.dtype is torch.bfloat16}
    assert half == {"first.conv.weight", "second.conv.weight"}, "norms read float32 weights under autocast"
    assert set(lowered.state_dict()) == set(model.state_dict())


def test_biases_of_convolutions_are_stored_in_half_precision() -> None:
    model = CASES["convolutions"].make().eval()
    lowered = lower(torch.jit.script(model), PrecisionPolicy.named("mixed_bfloat16").plan(model))
    assert {value.dtype for value in lowered.parameters()} == {torch.bfloat16}
    assert casts(lowered) == 1, "of the input"


def test_shared_and_tied_parameters() -> None:
    model, inputs = made("products", torch.device("cpu"))
    plan = policy("half")[0].plan(model)
    lowered = lower(torch.jit.script(model), plan)
    state = lowered.state_dict()
    assert state["weight"].dtype is torch.bfloat16, "both uses are products of views"
    assert state["both"].dtype is torch.float32, "one use is a sum in float32"
    assert state["head.weight"].dtype is torch.float32, "the embedding gives float32 to what follows"
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr(), "one tensor still"
    assert state["offset"].dtype is torch.float32


def ops(module: torch.jit.ScriptModule) -> list[str]:
    return re.findall(r"= (aten::\w+)", str(module.inlined_graph))


CASTS = {"aten::to", "aten::_autocast_to_reduced_precision", "aten::_autocast_to_full_precision"}


def casts(module: torch.jit.ScriptModule) -> int:
    return sum(op in CASTS for op in ops(module))


def test_only_the_casts_that_are_needed() -> None:
    model, _ = made("cnn", torch.device("cpu"))
    scripted = torch.jit.script(model)
    lowered = lower(scripted, policy("half")[0].plan(model))
    assert casts(lowered) == 1, "the input's; the rest is half already"
    kept = {
        "aten::conv2d",
        "aten::batch_norm",
        "aten::relu",
        "aten::max_pool2d",
        "aten::add",
        "aten::adaptive_avg_pool2d",
    }
    by_hand = torch.jit.freeze(scripted, optimize_numerics=False)
    assert [op for op in ops(lowered) if op in kept] == [op for op in ops(by_hand) if op in kept]
    assert "aten::_autocast_to_reduced_precision" not in ops(lowered), "nothing is looked at while it runs"


def test_half_reductions_are_the_model_cast_by_hand(device: torch.device) -> None:
    model = nn.Sequential(nn.Embedding(11, WIDTH), Mlp(), nn.LayerNorm(5)).eval().to(device)
    ids = torch.randint(11, (3, 4), device=device)
    plan = policy("half")[0].plan(model)
    lowered = lower(torch.jit.script(model), plan, half_reductions=True)
    by_hand = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        assert_same_bits([lowered(ids)], [by_hand(ids)])
    assert all(value.dtype is torch.bfloat16 for value in lowered.state_dict().values())
    assert casts(lowered) == 0


def test_siblings_of_one_class_in_two_precisions() -> None:
    model, inputs = made("cnn", torch.device("cpu"))
    lowered = lower(torch.jit.script(model), policy("siblings")[0].plan(model))
    state = lowered.state_dict()
    assert state["first.conv.weight"].dtype is torch.float32
    assert state["second.conv.weight"].dtype is torch.bfloat16


@pytest.mark.parametrize(("case", "how"), SCRIPTED_AND_TRACED)
def test_one_plan_for_the_model_and_what_was_made_of_it(case: str, how: str) -> None:
    model, inputs = made(case, torch.device("cpu"))
    maker = PrecisionPolicy("test", "bfloat16", [{"type": "Linear", "precision": "float16"}])
    expected = maker.plan(model).layers()
    found = maker.plan(script(model, inputs, how)).layers()
    assert [layer[:3] for layer in found] == [layer[:3] for layer in expected]


@pytest.mark.parametrize("plan_name", ["norms", "islands"])
@pytest.mark.parametrize(("case", "how"), SCRIPTED_AND_TRACED)
def test_the_same_bits_in_a_process_without_python(
    device: torch.device, case: str, how: str, plan_name: str, build_folder: Path, tmp_path: Path
) -> None:
    model, inputs = made(case, device)
    maker, dtype = policy(plan_name)
    plan = maker.plan(model)
    lowered = lower(script(model, inputs, how), plan, dtype)
    program = build_folder / "tests" / "halfstep_run_script"
    got = tensors(run_without_python(program, lowered, list(inputs), tmp_path))
    assert_same_bits(got, under_autocast(model, plan, dtype, inputs))


def test_the_file_needs_no_halfstep(tmp_path: Path) -> None:
    model, inputs = made("attention", torch.device("cpu"))
    plan = policy("norms")[0].plan(model)
    lower(torch.jit.script(model), plan).save(str(tmp_path / "lowered.pt"))
    torch.save(inputs[0], tmp_path / "x.pt")
    code = (
        "import sys, torch; model = torch.jit.load('lowered.pt'); "
        "torch.save(model(torch.load('x.pt')), 'y.pt'); assert 'halfstep' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env={}
    )
    assert result.returncode == 0, result.stderr
    assert_same_bits([torch.load(tmp_path / "y.pt")], under_autocast(model, plan, torch.bfloat16, inputs))


def test_lowered_after_loading() -> None:
    model, inputs = made("mlp", torch.device("cpu"))
    plan = policy("norms")[0].plan(model)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert_same_bits([lower(loaded, plan)(*inputs)], under_autocast(model, plan, torch.bfloat16, inputs))


def test_frozen_and_optimized() -> None:
    model, inputs = made("cnn", torch.device("cpu"))
    lowered = lower(torch.jit.script(model), policy("half")[0].plan(model))
    expected = lowered(*inputs)
    assert torch.equal(torch.jit.freeze(lowered, optimize_numerics=False)(*inputs), expected)
    best = torch.jit.optimize_for_inference(lowered)(*inputs)
    torch.testing.assert_close(best, expected, rtol=0.02, atol=0.02)


@pytest.mark.cuda
def test_moved_to_another_device(tmp_path: Path) -> None:
    model, inputs = made("cnn", torch.device("cpu"))
    lowered = lower(torch.jit.script(model), policy("half")[0].plan(model), device="cuda")
    lowered.save(str(tmp_path / "lowered.pt"))
    x = inputs[0].cuda()
    expected = under_autocast(model.cuda(), policy("half")[0].plan(model), torch.bfloat16, (x,))
    assert_same_bits([torch.jit.load(str(tmp_path / "lowered.pt"), map_location="cuda")(x)], expected)
    assert_same_bits([lowered.to("cuda")(x)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_floating_type(dtype: torch.dtype) -> None:
    model, (x,) = made("shared", torch.device("cpu"))
    plan = policy("islands")[0].plan(model)
    if dtype is torch.float64:
        with pytest.raises(RuntimeError, match="same dtype|Double"):
            lower(torch.jit.script(model), plan, torch.bfloat16)(x.double())
        return
    expected = under_autocast(model, plan, torch.bfloat16, (x.to(dtype),))
    assert_same_bits([lower(torch.jit.script(model), plan, torch.bfloat16)(x.to(dtype))], expected)


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_compute_in_half_precision(device: torch.device, kind: str, how: str) -> None:
    model, x = Recurrent(kind).eval().to(device), torch.randn(2, 5, WIDTH, device=device)
    plan = policy("half")[0].plan(model)
    lowered = lower(script(model, (x,), how), plan)
    assert all(value.dtype is torch.bfloat16 for value in lowered.state_dict().values())
    by_hand = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        assert torch.equal(lowered(x), by_hand(x.bfloat16()))
        torch.testing.assert_close(lowered(x).float(), model(x), rtol=0.05, atol=0.05)
        only_head = PrecisionPolicy("test", "bfloat16", [{"type": kind, "precision": "float32"}]).plan(model)
        assert_same_bits(
            [lower(script(model, (x,), how), only_head)(x)], under_autocast(model, only_head, torch.bfloat16, (x,))
        )


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchs_own_transformer_layer(device: torch.device, how: str) -> None:
    model = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True).eval().to(device)
    x = torch.randn(2, 5, WIDTH, device=device)
    plan = policy("half")[0].plan(model)
    with torch.no_grad():
        lowered = lower(script(model, (x,), how), plan)
        torch.testing.assert_close(lowered(x).float(), model(x), rtol=0.05, atol=0.05)


class Scaled(nn.Module):
    """A layer, since it has a parameter, with layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.inner = Mlp()
        self.last = nn.Linear(5, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.last(self.inner(x * self.scale)) @ self.scale, 0)


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("outer", ["Scaled", "*"])
def test_half_layers_inside_of_a_float32_one(device: torch.device, how: str, outer: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Scaled()).eval().to(device)
    inputs = (torch.randn(3, WIDTH, device=device),)
    rules = [{"name": "1.inner*", "precision": "bfloat16"}, {"name": "0", "precision": "bfloat16"}]
    plan = PrecisionPolicy("n", "bfloat16", [*rules, {"type": outer, "precision": "float32"}]).plan(model)
    lowered = lower(script(model, inputs, how), plan)
    with torch.no_grad():
        assert_same_bits(tensors(lowered(*inputs)), under_autocast(model, plan, torch.bfloat16, inputs))
    assert dict(lowered.named_parameters())["1.inner.body.0.weight"].dtype is torch.bfloat16


def refused(match: str, module: torch.jit.ScriptModule, plan: PrecisionPlan, **options: object) -> None:
    with pytest.raises(ValueError, match=match):
        lower(module, plan, **options)


def test_plans_and_modules_that_do_not_fit() -> None:
    model, _ = made("mlp", torch.device("cpu"))
    scripted, plan = torch.jit.script(model), policy("half")[0].plan(model)
    refused(
        "the plan has a Conv2d 'first.conv', but in the module there is none", scripted, policy("half")[0].plan(Cnn())
    )
    other = PrecisionPlan("x", [layer._replace(type="Conv2d") for layer in plan.layers()])
    refused("the plan has a Conv2d 'body.0', but in the module it is a Linear", scripted, other)
    for precision in ("int8", "tfloat32"):
        bad = PrecisionPlan("x", [layer._replace(precision=precision) for layer in plan.layers()])
        refused(f"layer 'body.0' is planned as {precision}, expected float32, float16 or bfloat16", scripted, bad)
    refused("autocast_dtype is Float, expected Half or BFloat16", scripted, plan, autocast_dtype=torch.float32)
    refused("float16 and bfloat16 layers; autocast_dtype must say", scripted, policy("islands")[0].plan(model))
    refused("device is meta, expected cpu or cuda", scripted, plan, device="meta")
    scripted.body.train()
    refused("submodule 'body' is in training mode; call eval", scripted, plan)
    frozen = torch.jit.freeze(torch.jit.script(model))
    refused("the plan has a Linear 'body.0', but in the module there is none", frozen, plan)
    refused(
        "the module has no parameters or buffers; device must say",
        torch.jit.script(nn.ReLU().eval()),
        PrecisionPlan("x", []),
    )
    with pytest.raises(TypeError, match="module is Mlp, expected a module from torch.jit"):
        lower(model, plan)
    with pytest.raises(TypeError, match="plan is str, expected PrecisionPlan"):
        lower(scripted, "float16")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (ByInterface, "calls the method 'forward' of an interface"),
        (Forks, "uses prim::fork"),
        (CallsPython, "python"),
        (OwnAutocast, "enters an autocast region of its own"),
    ],
)
def test_what_cannot_be_inlined_is_named(make: type, match: str) -> None:
    model = make().eval()
    refused(match, torch.jit.script(model), PrecisionPolicy("x", "bfloat16").plan(model))
