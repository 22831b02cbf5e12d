"""Models with a plan through torch.export and AOTInductor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep import MixedPrecisionConfig, MixedPrecisionManager, PrecisionPolicy, apply_plan
from torch import nn

WIDTH = 16
HEAD = {"name": "4", "precision": "float32"}
ISLAND = {"name": "2", "precision": "float16"}
RULES = [[HEAD], [ISLAND], [HEAD, ISLAND]]
IDS = ["float32", "float16", "both"]


class WithAutocast(nn.Module):
    """A model that brings its autocast with it, so that the program needs none around."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.device_type = device.type

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device_type, dtype=torch.bfloat16):
            return self.model(x)


def make(rules: list[dict[str, str]], device: torch.device, *, norms: bool = False) -> nn.Module:
    """Return a planned model; with norms of halfstep's if wanted."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 4)).to(device).eval()
    if norms:
        manager = MixedPrecisionManager(config=MixedPrecisionConfig(precision_policy="mixed_bfloat16"))
        manager.setup_pytorch_training(model, torch.optim.SGD(model.parameters(), 0.1))
    apply_plan(model, PrecisionPolicy("p", "bfloat16", rules).plan(model), torch.bfloat16)
    return model


def dtypes_of_products(program: torch.export.ExportedProgram) -> list[torch.dtype]:
    """Return in what type the input of each linear layer arrives, regions of autocast included."""
    found = []
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            found += [node.args[0].meta["val"].dtype for node in module.graph.nodes if "linear" in str(node.target)]
    return found


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("rules", RULES, ids=IDS)
def test_exported_with_its_autocast_inside(device: torch.device, tmp_path: Path, rules, norms: bool) -> None:
    model = WithAutocast(make(rules, device, norms=norms), device)
    x = torch.randn(3, WIDTH, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    for size in (3, 5):
        x = torch.randn(size, WIDTH, device=device)
        expected = model(x)
        for each in (program, loaded):
            out = each.module()(x)
            assert out.dtype is expected.dtype
            if norms:  # the program has torch's formula, which rounds at other places than the kernel
                torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)
            else:
                assert torch.equal(out, expected)


@pytest.mark.parametrize("rules", RULES, ids=IDS)
def test_exported_under_autocast_and_run_under_it(device: torch.device, rules) -> None:
    """torch.export records operations, not the casts that autocast makes: such a program belongs under the same one."""
    model = make(rules, device)
    x = torch.randn(3, WIDTH, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        program = torch.export.export(model, (x,))
        expected = model(x)
        assert torch.equal(program.module()(x), expected)
    assert expected.dtype is (torch.float32 if HEAD in rules else torch.bfloat16)
    assert not torch.is_autocast_enabled(device.type)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_program_computes_in_the_planned_types(precision: str) -> None:
    device = torch.device("cpu")
    model = WithAutocast(make([{"name": "2", "precision": precision}], device), device)
    program = torch.export.export(model, (torch.randn(3, WIDTH),))
    planned = getattr(torch, precision)  # float32 goes on from there: torch's norms keep it
    rest = torch.float32 if planned is torch.float32 else torch.float16
    assert dtypes_of_products(program) == [torch.float32, planned, rest]


@pytest.mark.slow  # half a minute each and more, for the C++ compiler
@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
def test_aot_inductor(device: torch.device, tmp_path: Path, norms: bool) -> None:
    model = WithAutocast(make([HEAD, ISLAND], device, norms=norms), device)
    x = torch.randn(3, WIDTH, device=device)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled: Any = torch._inductor.aoti_load_package(path)
        expected, out = model(x), compiled(x)
    assert out.dtype is expected.dtype is torch.float32
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_aot_inductor_of_a_program_exported_under_autocast(tmp_path: Path) -> None:
    model, x = make([HEAD], torch.device("cpu")), torch.randn(3, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        expected = model(x)
    out = torch._inductor.aoti_load_package(path)(x)  # compiled under it, the program needs it no more
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
