"""One policy through every door: six models, the dtypes that their layers hand on, and the error against float32.

    python bench/policies.py [--device cuda|cpu] [--dtype float16|bfloat16] [--models resnet50,vit,...]
                             [--doors eager,compiled,...] [--runner PROGRAM]

The policy keeps normalisation layers and the head in float32 and leaves the rest to the half type. Doors: "eager" and
"compiled" (fullgraph) are the model with the plan applied, under autocast; "exported" is torch.export of it; "aoti"
that through AOTInductor, compiled under autocast and run without; "lowered" is halfstep.lower() of the traced model,
without autocast; "no python" the same, saved and run by PROGRAM, the build's halfstep_run_script. Hooks note what each
layer hands on, in the first two doors. The error is the largest difference to the float32 model's output as a share of
its largest magnitude. ResNet-50 and ViT need torchvision.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import halfstep
import torch
from halfstep import PrecisionPlan, PrecisionPolicy, apply_plan
from policy_models import MODELS
from timing import machine
from torch import nn

DOORS = ("eager", "compiled", "exported", "aoti", "lowered", "no python")
# Autocast runs these in half; what else a half layer hands on depends on what it was given.
PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)


def policy(half: str) -> PrecisionPolicy:
    """Return the policy of the table."""
    rules = [
        {"type": "*Norm*", "precision": "float32", "reason": "statistics"},
        {"name": "*head*", "precision": "float32", "reason": "logits"},
    ]
    return PrecisionPolicy("careful", half, rules)


class Observed:
    """The dtypes that the layers of a model hand on, by hooks."""

    def __init__(self, model: nn.Module, plan: PrecisionPlan) -> None:
        self.dtypes: dict[str, torch.dtype] = {}
        self.model, self.plan = model, plan
        modules = dict(model.named_modules())
        self.hooks = [modules[name].register_forward_hook(self.noter(name)) for name in plan if name in modules]

    def noter(self, name: str) -> Callable[..., None]:
        """Return the hook of one layer."""

        def note(module: nn.Module, args: object, out: object) -> None:
            first = out[0] if isinstance(out, tuple) else out
            self.dtypes[name] = first.dtype

        return note

    def close(self) -> str:
        """Return how many layers handed on what their precision says, of those where it alone decides."""
        for hook in self.hooks:
            hook.remove()
        modules = dict(self.model.named_modules())
        wrong, right = [], {"float32": 0, "half": 0}
        for name, dtype in self.dtypes.items():
            planned = self.plan[name].precision
            if planned != "float32" and not isinstance(modules[name], PRODUCTS):
                continue
            if str(dtype) == f"torch.{planned}":
                right["float32" if planned == "float32" else "half"] += 1
            else:
                wrong.append(f"{name}: {dtype}, planned {planned}")
        if wrong:
            raise AssertionError("; ".join(wrong))
        return f"{right['half']} half, {right['float32']} float32"


def through(door: str, model: nn.Module, x: torch.Tensor, half: torch.dtype, runner: str | None):
    """Return the output of one door, and what its hooks saw."""
    plan = policy(str(half).removeprefix("torch.")).plan(model)
    autocast = torch.autocast(x.device.type, dtype=half)
    if door in ("lowered", "no python"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lowered = halfstep.lower(torch.jit.trace(model, x, check_trace=False).eval(), plan)
        if door == "lowered":
            return lowered(x), ""
        with tempfile.TemporaryDirectory() as folder:
            lowered.save(f"{folder}/model.pt")
            torch.save([x], f"{folder}/inputs.pt")
            files = [f"{folder}/{name}.pt" for name in ("model", "inputs", "outputs")]
            subprocess.run([runner, *files], check=True)
            return torch.load(files[2], map_location=x.device), ""
    apply_plan(model, plan, half)
    if door in ("exported", "aoti"):
        with autocast:
            program = torch.export.export(model, (x,))
            if door == "exported":
                return program.module()(x), ""
            with tempfile.TemporaryDirectory() as folder:
                path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
                compiled = torch._inductor.aoti_load_package(path)
        return compiled(x), ""
    torch._dynamo.config.allow_rnn = True
    seen = Observed(model, plan)
    with autocast:
        out = (torch.compile(model, fullgraph=True) if door == "compiled" else model)(x)
    return out, seen.close()


def main() -> None:
    """Print the table."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="float16" if cuda else "bfloat16")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--doors", default=",".join(DOORS))
    parser.add_argument("--runner", default=str(Path(__file__).parents[1] / "build/latest/tests/halfstep_run_script"))
    options = parser.parse_args()
    device, half = torch.device(options.device), getattr(torch, options.dtype)
    doors = options.doors.split(",")
    print(
        f"{machine(device)}, {options.dtype}; plan and dtypes: layers, seen by hooks; others: error against float32\n"
    )
    print("| model | plan | " + " | ".join(doors) + " |")
    print("|---|---|" + "---|" * len(doors))
    for name in options.models.split(","):
        torch.manual_seed(0)
        model, x = MODELS[name]()
        model, x = model.to(device).eval(), x.to(device)
        plan = policy(options.dtype).plan(model)
        halves = sum(layer.precision != "float32" for layer in plan.layers())
        cells, eager = [f"{halves} {options.dtype}, {len(plan) - halves} float32"], None
        with torch.no_grad():
            exact = model(x).double()
            for door in doors:
                try:
                    out, seen = through(door, copy.deepcopy(model), x, half, options.runner)
                except Exception as error:
                    print(f"{name}, {door}: {type(error).__name__}: {error}", file=sys.stderr)
                    cells.append("failed")
                    continue
                error = ((out.double() - exact).abs().max() / exact.abs().max()).item()
                eager = out if door == "eager" else eager
                same = eager is not None and door != "eager" and torch.equal(out, eager)
                cells.append(", ".join(filter(None, [f"{error:.1e}", seen, "eager's bits" if same else ""])))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
