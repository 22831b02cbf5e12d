"""What makes a call of a captured step another capture: arguments, modules and modes."""

from __future__ import annotations

import collections

import pytest
import torch
from halfstep import step_graph
from halfstep.arguments import UnsupportedArgument, flatten, rebuild
from test_step_graph import Run
from torch import nn


def test_another_module_or_mode_is_another_step() -> None:
    run = Run("cpu", policy="mixed_bfloat16")
    run.go(1)
    run.model[3].eval()
    run.go(1)
    assert run.step.explain().count("float32[16, 32], int64[16]") == 2, "dropout alone is off: another capture"
    run.model[4] = nn.Linear(64, 10)
    run.go(1)
    run.model.extra = nn.Identity()
    run.go(1)
    said = run.step.explain()
    assert "started anew: 4 was replaced" in said
    assert "started anew: a module, parameter or buffer was added" in said


def test_arguments_differ_by_what_a_capture_cannot_take() -> None:
    run = Run("cpu", policy="mixed_bfloat16", wrap=lambda run: lambda x: (x * 1.0).sum())
    x = torch.ones(3)
    for argument in (x, x.clone().requires_grad_(), x.to_sparse()):
        assert run.step(argument).item() == 3
    said = run.step.explain()
    assert said.count("float32[3]") == 2
    assert "it has a tensor of layout torch.sparse_coo" in said


@pytest.mark.cuda
def test_shapes_that_warm_up_side_by_side_keep_to_max_graphs() -> None:
    run = Run()
    step = run.manager.capture(run.train, max_graphs=1)
    for i in range(5):
        step(run.inputs[i], run.targets[i])
        step(run.inputs[i, :8], run.targets[i, :8])
    assert step.captures == 1
    assert "there are max_graphs = 1 captures already" in step.explain()


@pytest.mark.parametrize("kind", [int, float, str])
def test_a_constant_that_changes_in_each_call_is_named_and_takes_no_more_memory(kind: type) -> None:
    run = Run("cpu", policy="mixed_bfloat16", wrap=lambda run: lambda x, y, number: run.train(x, y))
    for i in range(50):
        run.step(run.inputs[i], run.targets[i], kind(i))
    run.step(run.inputs[0, :8], run.targets[0, :8], kind(0))
    assert len(run.step._entries) == 8 + 1 + 1
    said = run.step.explain()
    assert said.count("a constant argument changes from call to call (8 values so far): pass a tensor instead") == 1
    assert "float32[8, 32], int64[8]: runs as it is: the model is on the CPU" in said


def test_shapes_without_end_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "_MOST_ENTRIES", 10)
    run = Run("cpu", policy="mixed_bfloat16", wrap=lambda run: lambda x: x.sum())
    for i in range(50):
        run.step(torch.ones(i + 1))
    assert len(run.step._entries) == 11
    assert "other shapes: runs as it is: there were 10 others before" in run.step.explain()


class Output(collections.OrderedDict):
    """Has its items as attributes too, as the outputs of transformers' models do."""

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, value)
        self.__dict__[key] = value


MAPPINGS = [
    dict,
    collections.OrderedDict,
    collections.UserDict,
    lambda items: collections.defaultdict(int, items),
    Output,
]


@pytest.mark.parametrize("make", MAPPINGS)
def test_mappings_of_all_kinds_are_arguments_and_results(make) -> None:
    tensors: list[torch.Tensor] = []
    given = make({"x": torch.zeros(2), "more": [torch.ones(3), 5]})
    key = flatten(given, tensors)
    assert key == flatten(make({"x": torch.ones(2), "more": [torch.zeros(3), 5]}), [])
    assert key != flatten(make({"x": torch.ones(2), "more": [torch.zeros(3), 6]}), [])
    assert [tensor.tolist() for tensor in tensors] == [[0, 0], [1, 1, 1]]
    other = rebuild(given, iter([torch.full((2,), 7.0), torch.full((3,), 8.0)]))
    assert type(other) is type(given)
    assert other["x"].tolist() == [7, 7]
    assert other["more"][0].tolist() == [8, 8, 8]
    assert other["more"][1] == 5
    assert given["x"].tolist() == [0, 0]
    if isinstance(given, Output):
        assert other.x is other["x"]

    run = Run("cpu", policy="mixed_bfloat16", wrap=lambda run: lambda batch: make({"loss": run.train(**batch)}))
    result = run.step(make({"x": run.inputs[0], "y": run.targets[0]}))
    assert type(result) is type(given)
    assert not result["loss"].requires_grad
    assert "float32[16, 32], int64[16]: runs as it is: the model is on the CPU" in run.step.explain()


def test_a_mapping_with_a_tensor_beside_its_items_is_refused() -> None:
    batch = collections.UserDict(x=torch.zeros(2))
    batch.mask = torch.ones(2)
    with pytest.raises(UnsupportedArgument, match="it has a UserDict .*without tensors beside their items"):
        flatten(batch, [])
