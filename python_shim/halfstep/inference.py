"""Models for inference: int8 where it is faster and accurate enough, half precision or float32 where it is not."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from halfstep.calibration_data import collect, split
from halfstep.config import check_bool, check_choice, check_count, check_number
from halfstep.half_layers import refuse_casts
from halfstep.half_optimize import HALVES, optimize_half
from halfstep.int8_calibration import METHODS
from halfstep.int8_calibration_file import CalibrationFile
from halfstep.int8_device import checked_device
from halfstep.int8_form import example_of
from halfstep.int8_lent import same_random_numbers
from halfstep.int8_load import load_int8
from halfstep.int8_model import check_globs, kept_results, refuse_int8, refuse_parted_names, refuse_uninitialized
from halfstep.int8_optimize import Int8Run, Options
from halfstep.int8_report import Report
from halfstep.int8_save import SavedResult, save_result
from halfstep.int8_script import load_script, save_script
from halfstep.int8_wrappers import any_compiled, inner_of, without_wrappers


class InferencePrecisionOptimizer:
    """Makes a copy of a trained model that runs in int8, float16 or bfloat16, and keeps a promise about its accuracy.

    target_precision: "int8", "float16" or "bfloat16". A half model comes back wherever the accuracy guard is content;
        it is timed, and a warning says if it is slower. Of int8 alone are calibrator, activations, smooth_quant,
        bias_correction, fold_batch_norm, compiled, recurrent_weights and progress, and bits and calibration_file,
        which are errors with a half type.
    calibration_samples: how many samples of the calibration data are used at most; a third of them is kept to judge by.
    accuracy_threshold: the largest accepted drop, 0.02 for 2 %, or with eval_fn a number in the units of its score. It
        holds for the drop's 95 % bound, not for the drop alone; layers that cost too much stay float, and where nothing
        helps the float model comes back with a warning.
    eval_fn: eval_fn(model) -> a number, the larger the better, or one number for each sample, of five samples at least
        unless they are 0 or 1. The model is a copy, so it may be left in train mode or with other statistics; each call
        has the same random numbers. Without it: top-1 accuracy where batches end in integer labels [batch] and outputs
        are [batch, classes]; else, as a proxy, the share of noise in the power of the outputs.
    include, exclude: a name or glob of layers, such as "encoder.*", or several; what they name includes everything
        inside. Without include every layer is; an empty one is an error. Of a half model what is left out stays in the
        model's own type, and is cast to and from.
    calibrator: how the range of a layer's input is estimated: "min_max", "moving_average", "percentile", "entropy",
        "mse", or "auto", which takes the first, in the order of cost, with which the guard is content.
    activations: "static" (one scale for a layer's input, from calibration) or "dynamic" (one for each row of a linear
        layer and each image of a convolution, taken as it comes).
    smooth_quant: move large input channels into the weights (SmoothQuant): True, False, or "auto", where it makes a
        layer's own error smaller.
    bias_correction: shift biases by the mean error of their layer, where the guard likes that better.
    fold_batch_norm: fold batch norms into the convolutions before them, where the traced graph proves that it may.
    speed_guard: give back what is slower in int8 than in the fastest float type, at last the whole model. False keeps
        every layer that is accurate enough, for its size, and times nothing.
    compiled: compare the whole model's time after torch.compile with that of the compiled float model, which takes as
        long as compiling both does. None: if the model that is given is a compiled one. What comes back is not.
    strict: raise ValueError if a layer that has weights stays float, or a parameter by which a forward multiplies; of
        a half type, if the float model would come back, or include and exclude leave layers out.
    bits: levels of weights and inputs, 8 or fewer; they are stored as int8 all the same.
    recurrent_weights: store the weights of LSTM, GRU and RNN layers in int8 too, if the guard allows it. It makes the
        model smaller, not faster, so the speed guard is not asked.
    progress: a bar over the calibration: None shows it on a terminal if tqdm is installed.
    calibration_file: where the state of a calibration is kept, so that one that was stopped goes on. There is one from
        the first calibrated batch on; batches are read again. A file that is of another model or damaged, and a place
        where none can be written, raise ValueError before anything is run.
    """

    def __init__(
        self,
        target_precision: str = "int8",
        calibration_samples: int = 1000,
        accuracy_threshold: float = 0.02,
        *,
        eval_fn: Callable[[nn.Module], Any] | None = None,
        include: Iterable[str] | str | None = None,
        exclude: Iterable[str] | str | None = None,
        calibrator: str = "auto",
        activations: str = "static",
        smooth_quant: bool | str = "auto",
        bias_correction: bool = True,
        fold_batch_norm: bool = True,
        speed_guard: bool = True,
        compiled: bool | None = None,
        strict: bool = False,
        bits: int = 8,
        recurrent_weights: bool = False,
        progress: bool | None = None,
        calibration_file: str | os.PathLike[str] | None = None,
    ) -> None:
        check_choice("int8", *HALVES)("target_precision", target_precision)
        check_count("calibration_samples", calibration_samples)
        if eval_fn is not None and not callable(eval_fn):
            raise TypeError(f"eval_fn is {type(eval_fn).__name__}, expected a function of the model")
        if eval_fn is None:
            expected = "a number from 0 to 1, such as 0.02 for 2 % (with an eval_fn any from 0, in its score's units)"
            check_number(expected, lambda value: 0.0 <= value <= 1.0)("accuracy_threshold", accuracy_threshold)
        else:
            expected = "a finite number from 0, in the units of eval_fn's score"
            check_number(expected, lambda value: 0.0 <= value < math.inf)("accuracy_threshold", accuracy_threshold)
        check_choice("auto", *METHODS)("calibrator", calibrator)
        check_choice("static", "dynamic")("activations", activations)
        if not isinstance(smooth_quant, bool) and smooth_quant != "auto":
            raise ValueError(f"smooth_quant is {smooth_quant!r}, expected True, False or 'auto'")
        for name, value in (
            ("bias_correction", bias_correction),
            ("fold_batch_norm", fold_batch_norm),
            ("speed_guard", speed_guard),
            ("strict", strict),
            ("recurrent_weights", recurrent_weights),
        ):
            check_bool(name, value)
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"bits is {bits!r}, expected an integer from 2 to 8")
        if not 2 <= bits <= 8:
            raise ValueError(f"bits is {bits!r}, expected an integer from 2 to 8")
        for name, value in (("progress", progress), ("compiled", compiled)):
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}, expected True, False or None")
        if calibration_file is not None and not isinstance(calibration_file, (str, os.PathLike)):
            raise TypeError(f"calibration_file is {type(calibration_file).__name__}, expected a path")
        if target_precision != "int8" and bits != 8:
            raise ValueError(
                f"bits is {bits} with target_precision={target_precision!r}, expected 8: only int8 has levels"
            )
        if target_precision != "int8" and calibration_file is not None:
            raise ValueError(
                f"calibration_file is {os.fspath(calibration_file)!r} with target_precision={target_precision!r}, "
                "expected None: only int8 is calibrated"
            )
        self.target_precision = target_precision
        self.calibration_samples = calibration_samples
        self.accuracy_threshold = float(accuracy_threshold)
        self._options = Options(
            threshold=self.accuracy_threshold,
            eval_fn=eval_fn,
            include=check_globs(include, "include", target_precision),  # none: all layers
            exclude=check_globs(exclude, "exclude"),
            calibrator=calibrator,
            activations=activations,
            smooth_quant=smooth_quant,
            bias_correction=bias_correction,
            fold_batch_norm=fold_batch_norm,
            speed_guard=speed_guard,
            compiled=bool(compiled),
            strict=strict,
            bits=bits,
            recurrent_weights=recurrent_weights,
            progress=progress,
        )
        self._calibration_file = calibration_file
        self._compiled = compiled
        self._report: Report | None = None
        self._saved: SavedResult | None = None

    def optimize_for_inference(
        self, model: nn.Module, calibration_data: Any, target_device: str | torch.device = "cuda"
    ) -> nn.Module:
        """Return an optimized copy of the model on `target_device`, in eval mode; the model itself is not changed.

        calibration_data: an iterable of batches, read once: tensors, tuples or lists (positional arguments, perhaps
        with labels at the end), or dicts (keyword arguments). The copy is called as the model is, with the model's
        dtypes. `report()` and `explain()` then say what was done and why. A model of TorchScript, scripted, traced or
        loaded, gives one; ValueError says what in its forward cannot be taken apart (halfstep/torch/int8_script.h).
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}, expected torch.nn.Module")
        device = checked_device(target_device, "target_device")
        refuse_int8(model)
        refuse_casts(model)
        options = self._options
        if self._compiled is None and any_compiled(model):
            options = replace(options, compiled=True)
        model = inner_of(model)
        refuse_uninitialized(model)
        refuse_parted_names(model, options.include, options.exclude)
        file = None
        if self._calibration_file is not None:
            file = CalibrationFile(self._calibration_file, model)
        with torch.no_grad():  # scripted modules copy their parameters by an operation
            reference, inner = without_wrappers(copy.deepcopy(model, kept_results(model)))
            reference = reference.eval().to(device)
        for parameter in reference.parameters():  # scripts have no requires_grad_()
            parameter.requires_grad_(False)
        batches = collect(reference, calibration_data, self.calibration_samples)
        calibration, guard = split(batches)
        report = Report(self.target_precision, str(device), threshold=self.accuracy_threshold)
        report.samples = {
            "calibration": sum(batch.size for batch in calibration),
            "guard": sum(batch.size for batch in guard),
        }
        if inner:
            report.notes.append(
                f"torch.compile or a parallel wrapper stood around {', '.join(inner)}: they are not in what came back"
            )
        for number, batch in enumerate(batches):
            if names := batch.without_finite_values():
                report.warn(
                    f"batch {number} of calibration_data has no finite value in {', '.join(names)}: all are NaN or "
                    "infinite"
                )
        form = None
        with same_random_numbers([device]):  # a model or an eval_fn may draw some
            if self.target_precision == "int8":
                run = Int8Run(reference, calibration, guard, device, options, report, file)
                result, form = run.run(), run.form
            else:
                result = optimize_half(reference, guard, device, options, report)
        self._report = report
        self._example = example_of(calibration, device)
        self._saved = SavedResult.of(result.eval(), reference, report, self._example.arguments(), form)
        for note in report.warnings:
            warnings.warn(note, UserWarning, stacklevel=2)
        return result

    def report(self) -> dict[str, Any]:
        """Return what the last optimization did, as plain values."""
        return self._last().as_dict()

    def explain(self) -> str:
        """Return what the last optimization did, as text: a line for each region of layers, with the reason."""
        return str(self._last())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the last result to a file: its weights as safetensors, and a plan of how the model was optimized.

        load() reads it, given a model of the same code. The file holds no code and no pickle; whatever was at `path` is
        replaced when all is written. ValueError for a model of TorchScript, whose code is the file: save_torchscript().
        """
        save_result(path, self._last_result())

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        model: nn.Module,
        device: str | torch.device = "cpu",
        *,
        retime: bool | None = None,
    ) -> nn.Module:
        """Return the model that save() wrote; the same as halfstep.int8_load.load_int8(), which see."""
        return load_int8(path, model, device, retime=retime)

    def save_torchscript(self, path: str | os.PathLike[str]) -> None:
        """Write the last result as a TorchScript file, for C++ and for Python without the model's code.

        A process that runs it loads halfstep's library before. ValueError if the model cannot be scripted or traced so
        that it gives the same bits on batches of two sizes.
        """
        save_script(path, self._last_result().model, self._example)

    @staticmethod
    def load_torchscript(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> torch.jit.ScriptModule:
        """Return the model that save_torchscript() wrote; the same as halfstep.int8_script.load_script(), which see."""
        return load_script(path, device)

    def _last_result(self) -> SavedResult:
        if self._saved is None:
            raise RuntimeError("nothing has been optimized yet: call optimize_for_inference() first")
        return self._saved

    def _last(self) -> Report:
        if self._report is None:
            raise RuntimeError("nothing has been optimized yet: call optimize_for_inference() first")
        return self._report
