"""What a plan says of layers whose forward is never called, by their kind and by an example."""

from __future__ import annotations

import pytest
import torch
from halfstep import CustomPrecisionPolicy, PrecisionPlan, PrecisionPolicy
from halfstep.policy import PlannedLayer
from halfstep.scopes import LayerScope, apply_plan
from torch import nn

NORMS = PrecisionPolicy("p", "bfloat16", [{"type": "*Norm", "precision": "float32"}])


class Branches(nn.Module):
    """One branch in training, one in eval mode, and a layer whose inner layer only lends its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.evaluated = nn.Linear(4, 4), nn.LayerNorm(4)
        self.table = Lends()
        self.list = nn.ParameterList([torch.zeros(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trained(x) if self.training else self.evaluated(x)
        return self.table(x) + self.list[0]


class Lends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.inner.weight, self.bias)


def test_the_projection_of_attention_inherits() -> None:
    rules = [{"type": "MultiheadAttention", "precision": "float32"}, {"name": "*out_proj", "precision": "float16"}]
    model = nn.Transformer(8, 2, 1, 1, 16)
    plan = PrecisionPolicy("p", "bfloat16", rules).plan(model)
    outputs = [name for name in plan if name.endswith("out_proj")]
    assert len(outputs) == 3
    for name in outputs:
        outer = name.removesuffix(".out_proj")
        kind = "NonDynamicallyQuantizableLinear"
        assert plan[name] == PlannedLayer(name, kind, "float32", f"never called: inherits from {outer}")
        assert plan[name].inherits
        assert not plan[outer].inherits
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    apply_plan(model, plan)
    assert not any("forward" in vars(model.get_submodule(name)) for name in outputs)
    assert all(isinstance(vars(model.get_submodule(name[:-9]))["forward"], LayerScope) for name in outputs)


def test_a_subclass_with_a_forward_of_its_own_may_call_it() -> None:
    class Calls(nn.MultiheadAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out_proj(x)

    plan = NORMS.plan(Calls(4, 2))
    assert plan["out_proj"].reason == "the default of p"


def test_parameter_lists_have_no_forward() -> None:
    plan = NORMS.plan(Branches())
    assert plan["list"].reason == "the default of p; never called", "it is in no layer"
    model = Branches()
    model.scale = nn.Parameter(torch.ones(()))
    plan = PrecisionPolicy("p", "float16", [{"name": "", "precision": "float32"}]).plan(model)
    assert plan["list"] == PlannedLayer("list", "ParameterList", "float32", "never called: inherits from the model")
    assert plan["table.inner"].reason == "the default of p", "who knows that without an example"


@pytest.mark.parametrize("training", [True, False])
def test_an_example_shows_what_is_called(device: torch.device, training: bool) -> None:
    model = Branches().to(device).train(training)
    x = torch.randn(2, 4, device=device)
    before = torch.get_rng_state()
    plan = NORMS.plan(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    unused = "evaluated" if training else "trained"
    used = "trained" if training else "evaluated"
    assert plan[unused].reason.endswith("; never called")
    assert plan[unused].precision == NORMS.plan(model)[unused].precision, "it is in no layer"
    assert not plan[used].reason.endswith("called")
    assert plan["table.inner"] == PlannedLayer("table.inner", "Linear", "bfloat16", "never called: inherits from table")
    assert NORMS.plan(model, (x,)) == NORMS.plan(model, kwargs={"x": x}) == plan


def test_what_inherits_follows_through_shared_names_and_levels() -> None:
    model = Lends()
    model.again = model.inner
    model.inner.weight_norm = nn.Identity()  # inside of what is never called
    rules = [{"name": "", "precision": "float32"}]
    plan = PrecisionPolicy("p", "float16", rules).plan(model, torch.randn(2, 4))
    assert [plan[name].precision for name in ("inner", "inner.weight_norm", "again")] == ["float32"] * 3
    assert plan["inner.weight_norm"].reason == "never called: inherits from inner"
    assert plan["again"].reason == "the same module as inner"


def test_policies_as_code_and_plans_that_cannot_be_applied() -> None:
    model = Branches()
    x = torch.randn(2, 4)
    plan = CustomPrecisionPolicy().plan(model, "bfloat16", x)
    assert plan["table.inner"].inherits
    assert PrecisionPolicy("q", "int8").plan(model, x)["table.inner"].inherits
    with pytest.raises(RuntimeError, match="shape|size"):
        NORMS.plan(model, torch.randn(2, 3))
    with pytest.raises(TypeError, match="example is dict, expected a tensor or a tuple"):
        NORMS.plan(model, {"x": x})


def test_encoders_in_eval_mode_call_their_layers_once_a_plan_is_applied() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        plan = NORMS.plan(model, torch.randn(2, 3, 8))
    assert [name for name in plan if "never called" in plan[name].reason] == ["self_attn.out_proj"]
    assert model.activation_relu_or_gelu == 1
