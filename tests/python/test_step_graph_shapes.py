"""What makes a call of a captured step another capture: arguments, modules and modes."""

from __future__ import annotations

import pytest
import torch
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
