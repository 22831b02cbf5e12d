"""Policies through the C interface: they decide, print and refuse as torch's classes do, and need no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import halfstep
import pytest
import torch
from halfstep import PrecisionPlan, PrecisionPolicy, policy_library
from halfstep.policies import PRECISIONS
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
SHIM = str(Path(halfstep.__file__).resolve().parents[1])
POLICY, PLAN = (DATA / "encoder_policy.json").read_text(), (DATA / "encoder_plan.json").read_text()
halfstep.load_library()


def outcome(function: Callable[..., object], *arguments: object) -> object:
    """Return what a call gives, or the words of its ValueError."""
    try:
        made = function(*arguments)
    except UnicodeDecodeError as error:  # torch's, of a message that ends within a character of what it quotes
        return error.object.decode(errors="replace")
    except ValueError as error:
        return str(error)
    return made.to_json()


def both(text: str, source: str = "file.json") -> None:
    """Compare what the doors say of a text, as a policy and as a plan."""
    for name in ("Policy", "Plan"):
        theirs = outcome(getattr(torch.classes.halfstep, f"Precision{name}"), text, source)
        assert outcome(getattr(policy_library, name), text, source) == theirs


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"name": "n",\n "default": "float16",\n "rulse": []}',
        '{"name": "n"}',
        '{"name": "n", "default": "half"}',
        '{"name": "n", "default": 16}',
        '{"name": "n", "name": "m", "default": "float16"}',
        '{"name": "n", "default": "float16", "rules": {}}',
        '{"name": "n", "default": "float16", "rules": [{"precision": "float16"}]}',
        '{"name": "n", "default": "float16", "rules": [{"type": "", "precision": "float16"}]}',
        '{"name": "n", "default": "float16", "rules": [{"name": "a", "precision": "' + "x" * 500 + '"}]}',
        '{"name": "n", "default": "' + "\u00e9" * 100 + '"}',
        "[" * 9 + "]" * 9,
        " " * (2**20 + 1),
        '{"name": "n", "default": "float16", "rules": ['
        + ",".join(['{"name": "a", "precision": "int8"}'] * 4097)
        + "]}",
        '{"policy": "p", "layers": [{"name": "a", "type": "T", "precision": "float16"}]}',
        PLAN.replace('"tied"', '"head"'),
        POLICY,
        PLAN,
    ],
)
def test_both_doors_say_the_same_of_a_file(text: str) -> None:
    both(text)
    both(text, "a/long/name of a file, \u00e9.json" * 40)  # longer than a fixed buffer for messages would be


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60), st.data())
@example("\x00", None)
def test_both_doors_say_the_same_of_any_text(text: str, data) -> None:
    both(text)
    if data is not None:
        whole = data.draw(st.sampled_from([POLICY, PLAN]))
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
        both(whole[:start] + text[:3] + whole[end if end - start < 40 else start :])


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
_GLOB = st.one_of(_TEXT, st.sampled_from(["*", "a.*", "?", "[ab]*", "[!a]", "*b*"]))
_RULE = st.fixed_dictionaries(
    {"precision": st.sampled_from(PRECISIONS), "name": _GLOB}, optional={"type": _GLOB.filter(bool), "reason": _TEXT}
)


@settings(deadline=None)
@given(_TEXT, st.sampled_from(PRECISIONS), st.lists(_RULE, max_size=4), st.lists(_TEXT, max_size=4), _TEXT)
def test_both_doors_decide_the_same(name, default, rules, names, kind) -> None:
    policy = PrecisionPolicy(name, default, rules)
    ours = policy_library.Policy(policy.to_json())
    assert (ours.to_json(), ours.name()) == (policy.to_json(), name)
    kinds, first = [kind] * len(names), [""] * len(names)
    theirs = outcome(policy._policy.plan, names, kinds, first)
    assert outcome(ours.plan, names, kinds, first) == theirs
    for layer, index in zip(names, ours.match(names, kinds), strict=True):
        assert ours.decide(layer, kind) == policy.decide(layer, kind)
        assert ours.decide(layer, kind)[0] == (rules[index]["precision"] if index >= 0 else default)
        assert f"rule {index}" in ours.decide(layer, kind)[1] or index == -1


def test_plans_are_those_of_torch() -> None:
    ours, theirs = policy_library.Plan(PLAN), PrecisionPlan.from_json(PLAN)
    assert (ours.to_json(), ours.policy(), ours.explain()) == (theirs.to_json(), theirs.policy, theirs.explain())
    assert ours.layers() == [tuple(layer) for layer in theirs.layers()]
    other = (DATA / "encoder_answers.json").read_text()
    assert ours.diff(policy_library.Plan(other)) == theirs.diff(PrecisionPlan.from_json(other)) != ""
    assert ours.diff(ours) == ""


def test_shared_layers_and_answers_are_as_in_torch() -> None:
    columns = (["a", "b", "c"], ["T", "T", "U"], ["", "a", ""])
    for same in (columns[2], ["", "c", ""]):  # c comes later
        given = (*columns[:2], same)
        policy = policy_library.Policy(POLICY)
        assert outcome(policy.plan, *given) == outcome(PrecisionPolicy.from_json(POLICY)._policy.plan, *given)
        arguments = ("P", "bfloat16", *given, [True, False, False])
        theirs = outcome(torch.classes.halfstep.PrecisionPlan.of_answers, *arguments)
        assert outcome(policy_library.Plan.of_answers, *arguments) == theirs
    with pytest.raises(ValueError, match="half is 'float32', expected 'float16' or 'bfloat16'"):
        policy_library.Plan.of_answers("P", "float32", [], [], [], [])
    with pytest.raises(ValueError, match="got 1 answers for 3 layers"):
        policy_library.Plan.of_answers("P", "float16", *columns, [True])
    assert policy_library.Policy(POLICY).plan([], [], []).layers() == []


def test_named_policies() -> None:
    for name in ("mixed_float16", "mixed_bfloat16", "float32", "half"):
        assert outcome(policy_library.Policy.named, name) == outcome(torch.classes.halfstep.PrecisionPolicy.named, name)


def test_texts_of_any_size_come_and_go_whole() -> None:
    names = [f"{'n' * 200}.{i}" for i in range(5000)]
    plan = policy_library.Policy(POLICY).plan(names, ["Linear"] * 5000, [""] * 5000)
    assert [layer[0] for layer in plan.layers()] == names
    assert plan.explain().count("\n") == 5001
    # As compact as this it is within the limit, and written out it is not; it decides all the same.
    rules = ",".join(['{"name":"' + "a" * 200 + '","precision":"int8"}'] * 4096)
    policy = policy_library.Policy('{"name":"n","default":"float16","rules":[' + rules + "]}")
    assert len(policy.to_json()) > 2**20
    assert policy.decide("a" * 200, "T")[0] == "int8"


def test_many_threads_may_call() -> None:
    policy = policy_library.Policy(POLICY)
    wanted = policy.plan(["head"], ["Linear"], [""]).to_json()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: policy.plan(["head"], ["Linear"], [""]).to_json(), range(200))) == {wanted}


@pytest.mark.parametrize("home", ["halfstep", "halfstep.mixed_precision", "modules.engine.mixed_precision"])
def test_a_policy_as_code_is_written_without_torch(home: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {SHIM!r})\n"
        f"from {home} import CustomPrecisionPolicy\n"
        "class Mine(CustomPrecisionPolicy):\n"
        "    def get_loss_scale_factor(self, norm): return 2.0\n"
        "assert Mine().should_use_fp16('Dense', 'head') and Mine().chooses_loss_scale()\n"
        "from halfstep.policy_library import Policy\n"
        "assert Policy.named('float32').decide('head', 'Dense')[0] == 'float32'\n"
        "print([name for name in ('torch', 'tensorflow', 'keras') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_command_line_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(POLICY)
    code = (
        f"import sys; sys.path.insert(0, {SHIM!r}); sys.modules['torch'] = None\n"
        f"from halfstep.__main__ import print_policy\nprint_policy({str(path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("policy careful, the first rule that matches decides\n")
