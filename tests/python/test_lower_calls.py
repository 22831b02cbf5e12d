"""lower() where layers of the plan are not called: torch's fused attention, and modules that are lowered already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from halfstep import PrecisionPlan, PrecisionPolicy, lower
from lower_cases import WIDTH, Mlp
from test_lower import assert_same_bits, ops, policy, refused, script, under_autocast
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

FUSED = "aten::_transformer_encoder_layer_fwd"


@contextmanager
def slow_paths() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def encoder_layer(**options: object) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, **options).eval()


ENCODERS = {
    "layer": encoder_layer,
    "norm first": lambda: encoder_layer(norm_first=True, activation="gelu"),
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(), 2, nn.LayerNorm(WIDTH)).eval(),
}
FLOAT32 = {
    "all layers": ["*linear?", "*self_attn*", "*norm*"],
    "attention": ["*self_attn*"],
    "norms": ["*norm*"],
    "one": ["*linear1"],
}


def encoder_plan(model: nn.Module, float32: str) -> PrecisionPlan:
    rules = [{"name": name, "precision": "float32"} for name in FLOAT32[float32]]
    return PrecisionPolicy("test", "bfloat16", rules).plan(model)


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("float32", FLOAT32)
@pytest.mark.parametrize("kind", ENCODERS)
def test_layers_within_torchs_encoders(device: torch.device, kind: str, float32: str, how: str) -> None:
    model = ENCODERS[kind]().to(device)
    x = torch.randn(2, 5, WIDTH, device=device)
    plan = encoder_plan(model, float32)
    with torch.no_grad(), slow_paths():
        expected = under_autocast(model, plan, torch.bfloat16, (x,))
        lowered = lower(script(model, (x,), how), plan)
        assert FUSED not in ops(lowered), "nor the branch of a script in which it stood"
        got = lowered(x)
        assert got.dtype is expected[0].dtype
        # Attention alone may take its own fused path, in sums of another order.
        torch.testing.assert_close(got, expected[0], rtol=0.02, atol=0.02)
        if how == "trace" and float32 in ("norms", "one"):
            assert_same_bits([got], expected)
        if float32 == "all layers":
            torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)


def test_an_encoder_with_padding() -> None:
    model = ENCODERS["encoder"]()
    x = torch.randn(2, 5, WIDTH)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plan = encoder_plan(model, "norms")
    with torch.no_grad(), slow_paths():
        got = lower(torch.jit.script(model), plan)(x, src_key_padding_mask=padding)
        model.use_nested_tensor = False
        expected = lower(torch.jit.script(model), plan)(x, src_key_padding_mask=padding)
        reference = model(x, src_key_padding_mask=padding)
    assert_same_bits([got], [expected])
    torch.testing.assert_close(got[~padding].float(), reference[~padding], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("float32", FLOAT32)
@pytest.mark.parametrize("kind", ENCODERS)
def test_fused_traces_are_refused(kind: str, float32: str) -> None:
    model, x = ENCODERS[kind](), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,), check_trace=False)
        assert FUSED in ops(traced)
        where = "submodule 'layers.0'" if kind == "encoder" else "the module"
        refused(
            rf"{where} runs as one op, aten::_transformer_encoder_layer_fwd, but layers inside are planned otherwise; "
            r".*torch\.backends\.mha\.set_fastpath_enabled\(False\)",
            traced,
            encoder_plan(model, float32 if kind != "encoder" or float32 != "norms" else "all layers"),
        )


@pytest.mark.parametrize("how", ["script", "trace"])
def test_plans_that_are_one_type_keep_the_fused_op(how: str) -> None:
    model, x = encoder_layer(), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        module = script(model, (x,), how)
        assert FUSED in ops(lower(module, policy("half")[0].plan(model)))
        whole = lower(module, policy("only float32")[0].plan(model))
        assert_same_bits([whole(x)], [model(x)])


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x)[0])


@pytest.mark.parametrize("of", ["model", "module"])
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("name", ["attention", "attention*", "*out_proj", "head"])
def test_attention_and_its_out_proj(device: torch.device, name: str, how: str, of: str) -> None:
    """The out_proj is never called, fused or not, and inherits; plans of scripted modules do not say so."""
    model = SelfAttention().eval().to(device)
    x = torch.randn(2, 5, WIDTH, device=device)
    rules = PrecisionPolicy("test", "bfloat16", [{"name": name, "precision": "float32"}])
    with torch.no_grad(), slow_paths():
        expected = under_autocast(model, rules.plan(model), torch.bfloat16, (x,))
        module = script(model, (x,), how)
        lowered = lower(module, rules.plan(model if of == "model" else module))
        torch.testing.assert_close(lowered(x), expected[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_lowered_twice(how: str) -> None:
    model, x = Mlp().eval(), torch.randn(4, WIDTH)
    rules = [{"name": "head", "precision": "float32"}]
    plan = PrecisionPolicy("test", "bfloat16", rules).plan(model)
    lowered = lower(script(model, (x,), how), plan)
    refused(
        "layer 'head' is planned as Float, but forward only reads its tensors, in code that is BFloat16", lowered, plan
    )
    half = policy("half")[0].plan(model)
    once = lower(script(model, (x,), how), half)
    assert torch.equal(lower(once, half)(x), once(x)), "what is half already stays"


class ReadAlone(nn.Module):
    """One layer of which only the weight is used, one that nobody uses."""

    def __init__(self, *, unused: bool) -> None:
        super().__init__()
        self.used = nn.Linear(WIDTH, WIDTH)
        self.read = nn.Linear(WIDTH, WIDTH)
        if unused:
            self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x) @ self.read.weight


def test_layers_that_forward_never_calls() -> None:
    x = torch.randn(4, WIDTH)
    for name in ("read", "unused"):
        model = ReadAlone(unused=True).eval()
        rules = PrecisionPolicy("test", "bfloat16", [{"name": name, "precision": "float32"}])
        if name == "read":
            refused(
                "layer 'read' is planned as Float, .*never calls it.*plan the layer as the code that reads it",
                torch.jit.script(model),
                rules.plan(model),
            )
        else:
            lower(torch.jit.script(model), rules.plan(model))
        knows = rules.plan(model, (x,))
        assert "never called" in knows[name].reason
        half = PrecisionPolicy("half", "bfloat16").plan(model)
        with torch.no_grad():
            assert_same_bits([lower(torch.jit.script(model), knows)(x)], [lower(torch.jit.script(model), half)(x)])


def test_a_plan_of_which_nothing_is_called() -> None:
    model = nn.Sequential(nn.Softmax(-1), nn.GELU()).eval()
    plan = PrecisionPolicy("test", "bfloat16", [{"name": "0", "precision": "float32"}]).plan(model)
    lowered = lower(torch.jit.script(model), plan, device="cpu")
    refused("layer '0' is planned as Float, but forward calls no layer of the plan", lowered, plan, device="cpu")
