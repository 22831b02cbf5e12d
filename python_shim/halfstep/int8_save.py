"""Writes files of optimized models: their weights, and the plan by which int8_load makes the model again."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import GraphModule

from halfstep._version import __version__
from halfstep.half_layers import casts_of
from halfstep.half_model import float_dtype, name_of
from halfstep.int8_device import device_name
from halfstep.int8_digest import digest_of, settings_of
from halfstep.int8_files import (
    DIGEST,
    DTYPES,
    FORMAT,
    PARTS,
    PLAN,
    checksum,
    digest,
    float_tensors,
    int8_layers,
    join,
    package,
    packed_layers,
    recurrent_layers,
)
from halfstep.int8_form import Arguments, Form
from halfstep.int8_layers import state_of
from halfstep.int8_plan import DevicePlan, LayerPlan, Plan, RecurrentPlan, RegionPlan, decode, encode, residuals
from halfstep.int8_report import Report
from halfstep.whole_files import replacing


@dataclass(frozen=True)
class FormPlan:
    """How the form was made in which layers became int8: digests of trace and settings, and what was changed."""

    graph: str | None = None
    settings: str | None = None
    attention: tuple[str, ...] = ()
    folded: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SavedResult:
    """The last result of an optimizer, and what a file needs to know of it beside the model."""

    model: nn.Module
    outside: torch.dtype
    device: torch.device
    report: Report
    example: Arguments
    form: FormPlan = FormPlan()

    @classmethod
    def of(
        cls, model: nn.Module, reference: nn.Module, report: Report, example: Arguments, form: Form | None
    ) -> SavedResult:
        """Describe a result; `form` is the one in which its layers became int8, None for half targets."""
        own, made = float_dtype(reference), FormPlan()
        if form is not None and int8_layers(model):  # recurrent layers alone are replaced in the reference itself
            graph = digest_of(form.model) if isinstance(form.model, GraphModule) else None
            made = FormPlan(graph, settings_of(form.model), tuple(form.attention), tuple(form.norms))
        saved = cls(model, own, torch.device(report.device), report, example, made)
        if form is None and not isinstance(saved.inner, torch.jit.ScriptModule):
            made = FormPlan(settings=settings_of(saved.inner), attention=tuple(report.attention))
        return replace(saved, form=made)

    @property
    def inner(self) -> nn.Module:
        """The model inside of the one that casts."""
        return self.model.module if self.carrier != self.outside else self.model

    @property
    def carrier(self) -> torch.dtype:
        """The dtype of what is not int8."""
        return getattr(torch, self.report.carrier)

    def plan(self, orders: dict[str, list[int]], checksums: dict[str, int]) -> Plan:
        """Return the plan; ValueError if the arguments of a traced model cannot be written down."""
        try:
            example = encode(self.example)
            decode(example, lambda shape, dtype: None)
        except ValueError:
            if self.form.graph is not None:
                raise
            example = None
        added, layers, recurrent = residuals(self.inner), int8_layers(self.inner), recurrent_layers(self.inner)
        regions = [
            RegionPlan(each.layers, each.fused)
            for each in self.report.regions
            if each.state == "int8" and recurrent.keys().isdisjoint(each.layers)
        ]
        return Plan(
            halfstep=__version__,
            torch=torch.__version__,
            model=type(self.inner).__name__,
            outside=name_of(self.outside),
            carrier=name_of(self.carrier),
            graph=self.form.graph,
            settings=self.form.settings,
            attention=list(self.form.attention),
            folded=[list(pair) for pair in self.form.folded],
            layers=[LayerPlan.of(name, layer, name in added) for name, layer in layers.items()],
            recurrent=[RecurrentPlan.of(name, layer) for name, layer in recurrent.items()],
            regions=regions,
            example=example,
            orders=orders,
            checksums=checksums,
            device=DevicePlan(
                self.device.type,
                device_name(self.device),
                torch.ops.halfstep.int8_kernel(self.device) if regions else "",
                dict(self.report.milliseconds),
            ),
            casts={name: name_of(dtype) for name, dtype in casts_of(self.inner).items()},
        )


def save_result(path: str | os.PathLike[str], saved: SavedResult) -> None:
    """Write the file. What was there is replaced when all is written, and stays if anything is raised.

    ValueError for what a file cannot hold, OSError for where none can be written.
    """
    if isinstance(saved.inner, torch.jit.ScriptModule):
        raise ValueError(
            "the model is TorchScript, whose code a file of weights and a plan does not hold: use save_torchscript()"
        )
    safetensors = package("safetensors.torch")
    packed = packed_layers(saved.inner)
    tensors = float_tensors(saved.inner, packed.values())
    orders = {name: order for name, tensor in tensors.items() if (order := _order(tensor))}
    for name, layer in packed.items():
        state = state_of(layer.packed)
        tensors.update({join(name, part): state[part] for part in PARTS if part in state})
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}: a file cannot hold it")
    with replacing(path) as part:
        # Each in memory of its own: a file holds no two tensors in the same bytes.
        plain = {name: _plain(tensor) for name, tensor in tensors.items()}
        text = saved.plan(orders, {name: checksum(tensor) for name, tensor in plain.items()}).to_text()
        try:
            safetensors.save_file(plain, str(part), metadata={FORMAT: "pt", PLAN: text, DIGEST: digest(text)})
        except package("safetensors").SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    result = tensor.detach().to("cpu").contiguous()
    shared = result.untyped_storage().nbytes() != result.numel() * result.element_size()
    return result.clone() if shared else result


def _order(tensor: torch.Tensor) -> list[int] | None:
    """Return the dimensions from the outermost in memory to the innermost; None for a contiguous tensor."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
