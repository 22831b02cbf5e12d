"""Damaged and foreign files of optimized models: ValueError, without a crash and without memory that a file claims."""

from __future__ import annotations

import json
import random
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep import int8_load
from halfstep.int8_load import load_int8
from int8_file_cases import Small, call, checksums_of, optimized, plan_in, put_together, taken_apart, with_plan
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("saved") / "model"
    optimized("small")[0].save(file)
    return file


@pytest.fixture(scope="module")
def expected(saved: Path) -> tuple[torch.Tensor, torch.Tensor]:
    batch = torch.randn(3, 2, 6, 6)
    return batch, call(load_int8(saved, Small()), batch)


def refused(file: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load_int8(file, Small())
    assert str(file) in str(caught.value)


def test_every_prefix_is_refused(saved: Path, tmp_path: Path) -> None:
    content, model = saved.read_bytes(), Small()
    file = tmp_path / "m"
    file.write_bytes(content)
    for length in range(len(content) - 1, -1, -1):
        with file.open("r+b") as opened:
            opened.truncate(length)
        with pytest.raises(ValueError, match="not a safetensors file, or a damaged one" if length else "is empty"):
            load_int8(file, model)


@pytest.mark.parametrize("content", [b"", b"\0", b"garbage" * 1000, b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)])
def test_garbage_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(content)
    refused(tmp_path / "m", "not a safetensors file, or a damaged one" if content else "m is empty")


def test_a_longer_file_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(saved.read_bytes() + b"\0")
    refused(tmp_path / "m", "not a safetensors file, or a damaged one")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, tmp_path / "m", metadata=metadata)
        refused(tmp_path / "m", "has no plan of halfstep's")
    torch.save(Small().state_dict(), tmp_path / "m")
    refused(tmp_path / "m", "not a safetensors file")


def test_claims_take_no_memory(saved: Path, tmp_path: Path) -> None:
    """Of lengths, shapes and examples; neither Python's memory nor the process's grows."""
    content = saved.read_bytes()
    header, data = taken_apart(saved)
    plan = plan_in(header)
    files = []
    for number, length in enumerate((1 << 60, (1 << 64) - 1, 1 << 40, 1 << 33, 99_000_000)):
        files.append(tmp_path / f"length{number}")
        files[-1].write_bytes(length.to_bytes(8, "little") + content[8:])
    for number, shape in enumerate(([1 << 40, 1 << 10], [1 << 33], [1 << 62, 4])):
        claim = {**header, "norm.weight": {**header["norm.weight"], "shape": shape}}
        files.append(put_together(tmp_path / f"shape{number}", claim, data))
        claim = {**header, "norm.weight": {**header["norm.weight"], "shape": shape, "data_offsets": [0, 1 << 50]}}
        files.append(put_together(tmp_path / f"offset{number}", claim, data))
    for number, shape in enumerate(([1 << 39, 2, 6, 6], [1 << 30, 2, 6, 6], [1 << 20] * 3, [1] * 65, [1 << 70])):
        example = {"tuple": [{"tuple": [{"tensor": shape, "dtype": "float32"}]}, {"dict": {}}]}
        files.append(with_plan(tmp_path / f"example{number}", saved, {**plan, "example": example}))
    layer = {**plan["layers"][1], "weight": [1 << 36, 8]}
    files.append(with_plan(tmp_path / "layer", saved, {**plan, "layers": [plan["layers"][0], layer]}))
    model = Small()
    load_int8(saved, model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for file in files:
        with pytest.raises(ValueError, match=str(file)):
            load_int8(file, model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(content) + (1 << 20)  # what the interpreter and pytest take by themselves
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_nothing_is_read_before_the_sizes_are_known(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_arguments: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(int8_load, "_fill", read)
    monkeypatch.setattr(int8_load, "_layer", read)
    for change in (lambda h: h.pop("norm.weight"), lambda h: h["head.weight"].update(dtype="U8")):
        header, data = taken_apart(saved)
        change(header)
        if "norm.weight" not in header:  # the bytes stay: another tensor has them
            header["other"] = taken_apart(saved)[0]["norm.weight"]
        refused(put_together(tmp_path / "m", header, data), r"lacks tensors \['norm.weight'\]|head.weight is U8")


def renamed(header: dict[str, Any], old: str, new: str) -> None:
    header[new] = header.pop(old)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: renamed(h, "norm.weight", "norm.gain"), r"lacks tensors \['norm.weight'\].*has \['norm.gain'\]"),
        (lambda h: renamed(h, "head.scales", "head.scale"), r"lacks tensors \['head.scales'\]"),
        (lambda h: h["head.scales"].update(dtype="I32"), r"head.scales is I32 \[4\], expected float32 \[4\]"),
        (
            lambda h: h["head.scales"].update(dtype="F16", shape=[8]),
            r"head.scales is F16 \[8\], expected float32 \[4\]",
        ),
        (lambda h: h["head.scales"].update(shape=[2, 2]), r"head.scales is F32 \[2, 2\], expected float32 \[4\]"),
        (lambda h: h["head.weight"].update(shape=[8, 4]), r"head.weight is I8 \[8, 4\], expected int8 \[4, 8\]"),
        (lambda h: h["norm.bias"].update(dtype="F8_E4M3", shape=[32]), r"norm.bias is F8_E4M3 \[32\]"),
        (lambda h: h["__metadata__"].pop("halfstep_plan"), "has no plan"),
        (lambda h: h["__metadata__"].pop("halfstep_plan_sha256"), "its plan is damaged"),
        (lambda h: h["__metadata__"].update(halfstep_plan="{}"), "its plan is damaged"),
        (lambda h: h.update(__metadata__={"halfstep_plan": 3}), "not a safetensors file"),
        (lambda h: h.update(__metadata__=[]), "not a safetensors file"),
        (lambda h: h["__metadata__"].update(format="tf"), "its metadata is damaged"),
        (lambda h: h["__metadata__"].update(more=""), "its metadata is damaged"),
    ],
)
def test_headers_that_do_not_fit(change: Callable, said: str, saved: Path, tmp_path: Path) -> None:
    header, data = taken_apart(saved)
    change(header)
    refused(put_together(tmp_path / "m", header, data), said)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_are_no_scales(value: float, saved: Path, tmp_path: Path) -> None:
    header, data = taken_apart(saved)
    begin, _ = header["head.scales"]["data_offsets"]
    number = bytes(torch.tensor([value]).view(torch.uint8).tolist())
    damaged = data[: begin + 4] + number + data[begin + 8 :]
    plan = {**plan_in(header), "checksums": checksums_of(header, damaged)}
    refused(with_plan(tmp_path / "m", saved, plan, damaged), "layer 'head': .*not positive and finite")


def layer(**changes: Any) -> Callable[[dict], None]:
    return lambda plan: plan["layers"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.update(version=4), "version is 4, newer than 3"),
        (lambda p: p.update(version=1), "version is 1, which says too little, expected 3: save the model again"),
        (lambda p: p.update(version="1"), "version is '1'"),
        (lambda p: p.update(version=True), "version is True"),
        (lambda p: p.pop("version"), "version is None"),
        (lambda p: p.update(format="gguf"), "not of the format"),
        (lambda p: p.pop("layers"), r"lacks \['layers'\]"),
        (lambda p: p.update(more=1), r"has \['more'\], which are not known"),
        (lambda p: p.update(layers={}), "layers is dict, expected list"),
        (lambda p: p.update(graph=1), "graph is int, expected str"),
        (lambda p: p.update(graph="0" * 64), "of other code than the model's: the traced operations"),
        (lambda p: p.update(outside="int8"), "outside is 'int8', expected one of"),
        (lambda p: p.update(carrier="__class__"), "carrier is '__class__'"),
        (lambda p: p.update(outside="float64"), "of a model in float64, but this model is float32"),
        (lambda p: p.update(layers=[], regions=[]), "without int8 layers"),
        (lambda p: p["layers"].append(p["layers"][0]), "layers has a name twice"),
        (lambda p: p.update(regions=[]), "regions has other layers"),
        (lambda p: p["regions"].reverse(), "regions: .* in the file, .* by the model's code"),
        (lambda p: p["regions"][0].update(fused=[]), "regions: .* in the file, .* by the model's code"),
        (lambda p: p["regions"][0].pop("fused"), r"regions lacks \['fused'\]"),
        (lambda p: p.update(folded=[]), "does not|lacks tensors|activation"),
        (lambda p: p.update(folded=[["conv"]]), "not a pair"),
        (lambda p: p.update(folded=[["conv", "head"]]), "batch norms that are folded"),
        (lambda p: p.update(attention=["conv"]), r"attention that is taken apart: \['conv'\] in the file, \[\] by"),
        (lambda p: p.update(graph=None), "not traced"),
        (lambda p: p.update(graph=None, folded=[]), "conv|bn"),
        (lambda p: p.update(example=None), "has no example"),
        (lambda p: p.update(example={"tuple": []}), "not a pair"),
        (lambda p: p.update(example={"tensor": [-1], "dtype": "float32"}), "shape is"),
        (lambda p: p.update(example={"tensor": [1], "dtype": "load"}), "dtype is 'load'"),
        (lambda p: p.update(example={"object": [1]}), r"entry of \['object'\]"),
        (lambda p: p.update(example={"tuple": [{"tuple": []}, {"dict": {}}]}), "does not take the arguments"),
        (
            lambda p: p["example"]["tuple"][0]["tuple"][0].update(tensor=[6, 2, 6]),
            "does not run on zeros|does not take",
        ),
        (lambda p: p.update(checksums=[]), "checksums is list, expected dict"),
        (lambda p: p["checksums"].update({"norm.weight": "0"}), "norm.weight is str, expected int"),
        (lambda p: p["checksums"].update({"norm.weight": -1}), "norm.weight is damaged"),
        (lambda p: p["checksums"].pop("norm.weight"), r"has \['norm.weight'\], which were not"),
        (lambda p: p["checksums"].update(more=0), r"lacks tensors \['more'\] that were saved"),
        (lambda p: p.update(recurrent=[{"name": "lstm"}]), "recurrent lacks"),
        (lambda p: p.update(orders={"norm.weight": [1]}), "expected an order of dimensions"),
        (lambda p: p.update(orders={"norm.weight": [1, 0]}), "no such tensor"),
        (lambda p: p.update(orders={"nothing": [0]}), "no such tensor"),
        (lambda p: p["device"].pop("type"), r"device lacks \['type'\]"),
        (lambda p: p["device"].update(milliseconds={"int8": "fast"}), "int8 is str, expected float"),
        (layer(kind="lstm"), "kind is 'lstm', expected one of"),
        (layer(layer="Int8Linear"), "layer is 'Int8Linear', expected 'Int8Conv2d'"),
        (layer(name="missing"), "regions has other layers"),
        (layer(weight=[8, 2]), "weight is"),
        (layer(weight=[8, 2, 3, 0]), "weight is"),
        (layer(weight=[8, 2, 3, "3"]), "weight is str"),
        (layer(stride=[0, 1]), "stride is"),
        (layer(stride=[1]), "stride is"),
        (layer(stride=[2, 2]), r"'conv': stride: \[2, 2\] in the file, \[1, 1\] by the model's code"),
        (layer(padding=[-1, 1]), "padding is"),
        (layer(dilation=[1, 1.5]), "dilation is float"),
        (layer(groups=3), "groups is 3, expected a divisor"),
        (layer(groups=0), "groups is 0"),
        (layer(groups=2), "groups: 2 in the file, 1 by the model's code"),
        (layer(bias=False), r"has \['conv.bias'\], which the model has not"),
        (layer(input_factors=True), r"lacks tensors \['conv.input_factors'\]"),
        (layer(input_scale=0.0), "input_scale is 0.0"),
        (layer(input_scale=-1.0), "input_scale is -1.0"),
        (layer(input_scale=float("nan")), "input_scale is nan"),
        (layer(input_scale=float("inf")), "input_scale is inf"),
        (layer(input_scale=1), "input_scale is int, expected float"),
        (layer(input_scale=None, input_zero_point=1), "input_zero_point is 1, expected 0 to 0"),
        (layer(input_zero_point=128), "input_zero_point is 128, expected -128 to 127"),
        (layer(input_zero_point=-129), "input_zero_point is -129"),
        (layer(activation="tanh"), "activation is 'tanh', expected one of none, relu"),
        (layer(activation="none"), "activation: none in the file, relu by the model's code"),
        (layer(residual=True), "residual: True in the file, False by the model's code"),
        (layer(out_dtype="int8"), "out_dtype is 'int8'"),
        (layer(out_scale=0.5), "out_scale: 0.5 in the file, None by the model's code"),
        (layer(surprise=1), r"has \['surprise'\]"),
        (lambda p: p["layers"][0].pop("groups"), r"lacks \['groups'\]"),
    ],
)
def test_plans_that_do_not_fit(change: Callable, said: str, saved: Path, tmp_path: Path) -> None:
    plan = plan_in(taken_apart(saved)[0])
    change(plan)
    refused(with_plan(tmp_path / "m", saved, plan), said)


@pytest.mark.parametrize(
    "text", ["", "plan", "{", "[]", "3", "null", "[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '{"format": NaN}']
)
def test_plans_that_are_no_plans(text: str, saved: Path, tmp_path: Path) -> None:
    refused(with_plan(tmp_path / "m", saved, text), "plan|digits")


def test_deep_examples_are_refused(saved: Path, tmp_path: Path) -> None:
    text = json.dumps(plan_in(taken_apart(saved)[0]) | {"example": "EXAMPLE"})
    deep = '{"list":[' * 400 + "]}" * 400
    refused(with_plan(tmp_path / "m", saved, text.replace('"EXAMPLE"', deep)), "not a pair|nested too deeply")


def test_flipped_bits_are_refused(saved: Path, tmp_path: Path) -> None:
    """One bit in each byte of each tensor, with its name; and bits of the header."""
    chance, content, model = random.Random(0), saved.read_bytes(), Small()
    header, data = taken_apart(saved)
    start = len(content) - len(data)
    names = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    file = tmp_path / "m"
    file.write_bytes(content)
    places = [*range(start, len(content)), *range(8), *chance.sample(range(8, start), 500)]
    with file.open("r+b", buffering=0) as opened:
        for place in places:
            opened.seek(place)
            opened.write(bytes([content[place] ^ 1 << chance.randrange(8)]))
            with pytest.raises(ValueError, match=str(file)) as caught:
                load_int8(file, model)
            if place >= start:
                (name,) = (name for name, (begin, end) in names.items() if begin <= place - start < end)
                assert f"{name} is damaged: its CRC-32 is" in str(caught.value)
            opened.seek(place)
            opened.write(content[place : place + 1])
    load_int8(file, model)


def test_checksums_are_compared_before_anything_is_made(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_arguments: Any) -> None:
        raise AssertionError("something was made of the model")

    monkeypatch.setattr(int8_load, "_structure", made)
    header, data = taken_apart(saved)
    plan = plan_in(header)
    assert plan["checksums"] == checksums_of(header, data)
    refused(put_together(tmp_path / "m", header, data[:-1] + bytes([data[-1] ^ 1])), "is damaged: its CRC-32")
    plan["checksums"]["norm.weight"] ^= 1
    refused(with_plan(tmp_path / "m", saved, plan), "norm.weight is damaged: its CRC-32")
    del plan["checksums"]["norm.weight"]
    refused(with_plan(tmp_path / "m", saved, plan), r"has \['norm.weight'\], which were not")


@pytest.mark.parametrize("seed", range(4))
def test_mutations_are_refused(seed: int, saved: Path, tmp_path: Path) -> None:
    chance, content, model = random.Random(seed), saved.read_bytes(), Small()
    start = 8 + int.from_bytes(content[:8], "little")
    for number in range(75):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 4, 40))):
            place = chance.randrange(start) if number % 3 else chance.randrange(start, len(content))
            damaged[place] = chance.randrange(256)
        if damaged == content:
            continue
        (tmp_path / "m").write_bytes(damaged)
        with pytest.raises(ValueError, match=str(tmp_path / "m")):
            load_int8(tmp_path / "m", model)


@pytest.mark.filterwarnings("ignore:.*was optimized on")
@pytest.mark.parametrize("seed", range(4))
def test_mutated_plans_with_a_right_digest(seed: int, saved: Path, expected: tuple, tmp_path: Path) -> None:
    """An entry of the plan is replaced: ValueError, or a model that runs."""
    chance, model, (batch, answer) = random.Random(seed), Small(), expected
    values = [None, True, 0, -1, 2, 1 << 80, 0.5, -0.5, float("nan"), "", "relu", "conv", [], [0], {}, {"a": 1}]

    def entries(value: Any) -> list[tuple[Any, Any]]:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [(value, key) for key, _ in pairs] + [deep for _, each in pairs for deep in entries(each)]

    for _ in range(60):
        plan = plan_in(taken_apart(saved)[0])
        holder, key = chance.choice(entries(plan))
        holder[key] = chance.choice(values)
        with_plan(tmp_path / "m", saved, plan)
        try:
            result = load_int8(tmp_path / "m", model, retime=False)
        except ValueError:
            continue
        assert call(result, batch).shape == answer.shape
