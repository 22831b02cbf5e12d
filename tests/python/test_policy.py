"""Policies and plans in Python: what they decide for real models, and what they say of wrong input."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import halfstep
import pytest
import torch
from halfstep import CustomPrecisionPolicy, PrecisionPlan, PrecisionPolicy
from halfstep.policy import PRECISIONS, PlannedLayer
from halfstep.scopes import apply_plan, remove_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
RULES = [
    {"name": "head.*", "precision": "float32", "reason": "logits"},
    {"type": "*Norm*", "precision": "float32"},
    {"name": "blocks.[02].*", "type": "Linear", "precision": "bfloat16"},
]


class Net(nn.Module):
    """Blocks with norms, a head that shares the embedding's module, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)])
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.ModuleDict({"out": nn.Linear(4, 2), "again": self.blocks[0][0]})


def careful() -> PrecisionPolicy:
    return PrecisionPolicy("careful", "float16", RULES)


def test_a_plan_covers_every_layer_with_a_reason() -> None:
    plan = careful().plan(Net())
    assert {name: plan[name].precision for name in plan} == {
        "": "float16",
        "blocks.0.0": "bfloat16",
        "blocks.0.1": "float32",
        "blocks.1.0": "float16",
        "blocks.1.1": "float32",
        "blocks.2.0": "bfloat16",
        "blocks.2.1": "float32",
        "attention": "float16",
        "attention.out_proj": "float16",
        "head.out": "float32",
        "head.again": "bfloat16",
    }
    assert plan["head.again"].reason == "the same module as blocks.0.0", "the first name decides, though head.* matches"
    assert plan["head.out"] == PlannedLayer("head.out", "Linear", "float32", "logits (rule 0 name head.*)")
    assert plan["blocks.1.0"].reason == "the default of careful"
    assert all(layer.reason for layer in plan.layers())
    lines = plan.explain().splitlines()
    assert len(lines) == 1 + len(plan) == 12
    assert lines[0].split() == ["layer", "type", "precision", "reason"]
    with pytest.raises(KeyError):
        plan["blocks"]


def test_plans_and_policies_are_values() -> None:
    policy, plan = careful(), careful().plan(Net())
    for value in (policy, plan):
        for twin in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), type(value).from_json(value.to_json())):
            assert twin == value
            assert hash(twin) == hash(value)
    assert policy != PrecisionPolicy("careful", "float16", RULES[1:])
    other = PrecisionPolicy("careful", "float32", RULES).plan(Net())
    assert plan != other
    assert (
        plan.diff(other).splitlines()[0] == ": float16 -> float32 (the default of careful; never called)"
    )  # it has no forward
    assert len(plan.diff(other).splitlines()) == 4
    assert plan.diff(plan) == ""


def test_named_policies() -> None:
    for name, precision in (("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16"), ("float32", "float32")):
        assert PrecisionPolicy.named(name).decide("any", "Linear") == (precision, f"the default of {name}")
    with pytest.raises(ValueError, match="name is 'half', expected one of 'mixed_float16'"):
        PrecisionPolicy.named("half")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(careful().to_json())
    assert PrecisionPolicy.load(path) == careful()
    path.write_text('{"name": "n",\n "default": "float16",\n "rulse": []}')
    with pytest.raises(ValueError, match=r"policy.json, line 3: unknown key 'rulse', expected name, default, rules"):
        PrecisionPolicy.load(path)
    path.write_text(" " * (2**20 + 1))
    with pytest.raises(ValueError, match="policy.json: has 1048577 bytes, expected at most 1048576"):
        PrecisionPolicy.load(path)
    with pytest.raises(ValueError, match=r"rules\[0\].precision: got 'half', expected one of float32"):
        PrecisionPolicy("n", "float32", [{"type": "Linear", "precision": "half"}])


def test_the_schema_says_what_the_reader_does() -> None:
    schema = json.loads((ROOT / "docs" / "policy.schema.json").read_text())
    rule = schema["properties"]["rules"]["items"]["properties"]
    assert schema["$defs"]["precision"]["enum"] == list(PRECISIONS)
    with pytest.raises(ValueError, match="expected name, default, rules$"):
        PrecisionPolicy.from_json('{"other": 1}')
    assert set(schema["properties"]) - {"$schema"} == {"name", "default", "rules"}
    with pytest.raises(ValueError, match=f"expected {', '.join(rule)}$"):
        PrecisionPolicy.from_json('{"name": "n", "default": "int8", "rules": [{"other": 1}]}')
    text = PrecisionPolicy("n", "int8", [{"name": "a", "type": "b", "precision": "int8", "reason": "c"}]).to_json()
    assert json.loads(text)["rules"][0].keys() == rule.keys()


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
_RULE = st.fixed_dictionaries(
    {"precision": st.sampled_from(PRECISIONS), "name": _TEXT}, optional={"type": _TEXT.filter(bool), "reason": _TEXT}
)


@settings(deadline=None)
@given(name=_TEXT, default=st.sampled_from(PRECISIONS), rules=st.lists(_RULE, max_size=4), layer=_TEXT, kind=_TEXT)
def test_any_policy_goes_through_json_and_decides_the_same(name, default, rules, layer, kind) -> None:
    policy = PrecisionPolicy(name, default, rules)
    twin = PrecisionPolicy.from_json(policy.to_json())
    assert twin == policy
    assert twin.decide(layer, kind) == policy.decide(layer, kind)


def test_a_policy_as_code_is_asked_once_per_layer() -> None:
    class Conservative(CustomPrecisionPolicy):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[tuple[str, str]] = []

        def should_use_fp16(self, layer_type: str, layer_name: str) -> bool:
            self.asked.append((layer_type, layer_name))
            return "linear" in layer_type.lower() and "head" not in layer_name

    policy, model = Conservative(), Net()
    plan = policy.plan(model, "bfloat16")
    assert ("Linear", "head.again") not in policy.asked, "it is blocks.0.0"
    assert len(policy.asked) == len(plan) - 1 == 10
    assert plan["blocks.0.0"].precision == plan["head.again"].precision == "bfloat16"
    assert plan["head.out"].precision == plan["blocks.0.1"].precision == "float32"
    assert plan["head.out"].reason == "Conservative.should_use_fp16 is False"
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    assert CustomPrecisionPolicy().plan(model)["head.out"].precision == "float16"
    assert CustomPrecisionPolicy().get_loss_scale_factor(1.0) is None
    with pytest.raises(ValueError, match="half is 'float32'"):
        policy.plan(model, "float32")


def test_an_answer_that_is_none_is_named() -> None:
    class Wrong(CustomPrecisionPolicy):
        def should_use_fp16(self, layer_type: str, layer_name: str):
            return None

    with pytest.raises(TypeError, match=r"should_use_fp16\('Linear', ''\) returned None, expected True or False"):
        Wrong().plan(nn.Linear(1, 1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))


class Encoder(nn.Module):
    """The model of tests/torch_ops/policy_fixture.h."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(4, 8))
        self.embedding = nn.Embedding(16, 8)
        self.convolution = nn.Conv1d(8, 8, 1)
        self.batch_norm = nn.BatchNorm1d(8)
        self.recurrent = nn.LSTM(8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.tied = self.blocks[1].attention.value
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Conservative(CustomPrecisionPolicy):
    def should_use_fp16(self, layer_type: str, layer_name: str) -> bool:
        return "Norm" not in layer_type and not layer_name.startswith("head")


def test_one_model_in_two_languages_has_one_plan() -> None:
    """tests/torch_ops/policy_test.cpp compares the plans of the same model in C++ with the same files."""
    data, model = ROOT / "tests" / "data", Encoder()
    plan = PrecisionPolicy.load(data / "encoder_policy.json").plan(model)
    assert plan == PrecisionPlan.from_json((data / "encoder_plan.json").read_text())
    answers = Conservative().plan(model, "bfloat16")
    assert answers == PrecisionPlan.from_json((data / "encoder_answers.json").read_text())


def test_a_container_whose_parameters_are_none_is_no_layer() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model.register_parameter("bias", None)
    assert list(PrecisionPolicy.named("float32").plan(model)) == ["0"]


def test_the_class_works_in_torchscript_and_across_processes() -> None:
    halfstep.load_library()

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan = torch.classes.halfstep.PrecisionPlan(careful().plan(Net()).to_json(), "plan")

        def forward(self) -> str:
            return self.plan.explain()

    assert torch.jit.script(Holder())() == careful().plan(Net()).explain()


def test_wrappers_do_not_show_in_names() -> None:
    """Rules and plans are for the model as it was written."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plan = careful().plan(model)
    model[1] = torch.compile(model[1])
    wrapped = torch.compile(model)
    assert careful().plan(wrapped) == plan
    assert list(plan) == ["0", "1"]
    apply_plan(wrapped, PrecisionPolicy("n", "bfloat16", [{"name": "1", "precision": "float32"}]).plan(wrapped))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0](torch.ones(1, 4)).dtype is torch.bfloat16
        assert model[1]._orig_mod(torch.ones(1, 4)).dtype is torch.float32
    remove_plan(wrapped)
    assert "forward" not in model[1]._orig_mod.__dict__
    with pytest.raises(ValueError, match="has a DataParallel"):
        apply_plan(nn.DataParallel(model), plan)


def test_what_is_no_policy_plan_or_model_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    plan = careful().plan(model)
    with pytest.raises(TypeError, match="model is NoneType, expected torch.nn.Module"):
        careful().plan(None)
    with pytest.raises(TypeError, match="other is NoneType, expected PrecisionPlan"):
        plan.diff(None)
    with pytest.raises(TypeError, match="plan is NoneType"):
        apply_plan(model, None)
    for wrong in ("bfloat16", torch.float64):
        with pytest.raises(ValueError, match="autocast_dtype is"):
            apply_plan(model, plan, wrong)
    with pytest.raises(TypeError, match=r"rules\[0\] is 'float32', expected a mapping"):
        PrecisionPolicy("n", "float16", ["float32"])
    with pytest.raises(TypeError, match="default is torch.float32, expected a str"):
        PrecisionPolicy("n", torch.float32)
    with pytest.raises(ValueError, match="has more bytes, expected at most 1048576"):
        PrecisionPolicy.load("/dev/zero")


def test_answers_of_numpy_and_of_instances_count() -> None:
    numpy = pytest.importorskip("numpy")

    class Arithmetic(CustomPrecisionPolicy):
        def should_use_fp16(self, layer_type: str, layer_name: str):
            return numpy.int64(len(layer_name)) < 2

    policy = Arithmetic()
    assert policy.plan(nn.Sequential(nn.Linear(1, 1)))["0"].precision == "float16"
    assert not policy.chooses_loss_scale()
    policy.get_loss_scale_factor = lambda norm: 2.0
    assert policy.chooses_loss_scale()
