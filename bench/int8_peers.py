"""Other people's int8 for bench/int8_models.py, where it is installed: ONNX Runtime and torchao."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from halfstep.int8_model import weight_bytes
from torch import nn

Inputs = tuple[torch.Tensor, ...]
Call = Callable[..., torch.Tensor]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the peers' warnings and prints out of the table."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


class OnnxModel(nn.Module):
    """An ONNX file, called as the model is; the CPU alone."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [each.name for each in self._session.get_inputs()]
        self.bytes = path.stat().st_size

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the first output."""
        given = {name: tensor.numpy() for name, tensor in zip(self._names, inputs, strict=True)}
        return torch.from_numpy(self._session.run(None, given)[0])


def export(model: nn.Module, example: Inputs, path: Path) -> None:
    """Write the model as ONNX, whose first two dimensions of integer inputs, and the batch of others, may change."""
    names = [f"input{i}" for i in range(len(example))]
    axes = {
        name: {0: "batch"} if tensor.is_floating_point() else {0: "batch", 1: "length"}
        for name, tensor in zip(names, example, strict=True)
    }
    with quiet():
        torch.onnx.export(
            copy.deepcopy(model),
            example,
            str(path),
            input_names=names,
            output_names=["output"],
            dynamic_axes={**axes, "output": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


def onnx_models(model: nn.Module, batches: Sequence[Inputs], folder: Path) -> dict[str, nn.Module]:
    """Return ONNX Runtime's model in float32, int8 with dynamic inputs, and int8 with static ones (QDQ)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict | None:
            batch = next(self._left, None)
            return batch and {f"input{i}": tensor.numpy() for i, tensor in enumerate(batch)}

    paths = {kind: folder / f"{kind}.onnx" for kind in ("float32", "prepared", "dynamic", "static")}
    export(model, batches[0], paths["float32"])
    with quiet():
        quant_pre_process(str(paths["float32"]), str(paths["prepared"]))
        # Without VNNI its kernels add two products in 16 bits, which overflow unless weights have 7 bits.
        narrow = "vnni" not in Path("/proc/cpuinfo").read_text()
        quantize_dynamic(
            str(paths["prepared"]),
            str(paths["dynamic"]),
            per_channel=True,
            reduce_range=narrow,
            weight_type=QuantType.QInt8,
        )
        # Products alone: with all operators static int8 gave MiniLM's vectors a cosine of 0.37 to float32's.
        quantize_static(
            str(paths["prepared"]),
            str(paths["static"]),
            Reader(),
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            reduce_range=narrow,
            weight_type=QuantType.QInt8,
        )
    return {
        "onnxruntime float32": OnnxModel(paths["float32"]),
        "onnxruntime int8 dynamic": OnnxModel(paths["dynamic"]),
        "onnxruntime int8 static": OnnxModel(paths["static"]),
    }


class InType(nn.Module):
    """A model called with float32 that computes in another type."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the model's output in float32."""
        given = [each.to(self.dtype) if each.is_floating_point() else each for each in inputs]
        return self.model(*given).float()


def torchao_model(model: nn.Module, dtype: torch.dtype, example: Inputs) -> nn.Module:
    """Return torchao's model: linear layers in int8 with dynamic inputs, the rest in `dtype`."""
    with quiet():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantized = copy.deepcopy(model).to(dtype)
        quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
        result = InType(quantized, dtype)
        with torch.inference_mode():
            result(*example)
    return result


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of a model's weights, those of torchao's tensors by the tensors they are made of."""

    def parts(tensor: torch.Tensor) -> int:
        if not hasattr(tensor, "__tensor_flatten__"):
            return tensor.numel() * tensor.element_size()
        return sum(parts(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

    if isinstance(model, OnnxModel):
        return model.bytes
    # What weight_bytes() takes for a tensor of the outer type is corrected.
    outer = [t for t in (*model.parameters(), *model.buffers()) if hasattr(t, "__tensor_flatten__")]
    return weight_bytes(model) + sum(parts(t) - t.numel() * t.element_size() for t in outer)


def onnx_linear(weight: torch.Tensor, bias: torch.Tensor, example: torch.Tensor) -> Call:
    """Return ONNX Runtime's static int8 of one linear layer, float32 in and out."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight.float().cpu()), nn.Parameter(bias.float().cpu())
    with tempfile.TemporaryDirectory() as folder:
        return onnx_models(layer.eval(), [(example.float().cpu(),)], Path(folder))["onnxruntime int8 static"]
