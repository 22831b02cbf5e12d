"""int8 inference of real models: accuracy on data that was held out, bytes of weights, and time, beside its peers.

    python bench/int8_models.py [--device cuda|cpu] [--models minilm,resnet18,...] [--rounds 25]
        [--threads N] [--batch 64] [--threshold 0.02] [--minilm FILE] [--peers onnxruntime,torchao] [--compile]
        [--borders] [--out FILE.json]

Models: MiniLM, a sentence encoder, whose file is made by bench/int8_sentences.py (--minilm, else
build/int8_models/minilm.pt; left out without it), and four networks trained on scikit-learn's digits, see
bench/int8_model_zoo.py. "bert-base" and "vit-b" have the size of those and random weights: their times count, and the
agreement of their outputs. Runs: the model in float32 and in half; "int8 everywhere" is the optimizer with
speed_guard=False, all layers that keep the accuracy; "int8, speed guard" is the default, and the last column says what
came back. Peers run where they import; ONNX Runtime on the CPU alone. --compile adds torch.compile
of half and of int8, int8 that the guard compared compiled, and int8 as TorchScript.
--borders prints where the time of the int8 models goes, see bench/int8_borders.py.
On a GPU the time in brackets is that of a CUDA graph's replay, and the limit is printed: the operations of a batch's
products, attention's included, over the rate of an H100's tensor cores.

Accuracy is top-1 for digits and the mean reciprocal rank of a query's document for MiniLM. "agreement" is the share of
digits of one class as in float32, or the mean cosine between both vectors of a sentence (in brackets the least).
Single layers are in bench/int8_gemm.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import int8_model_zoo as zoo
import int8_sentences as sentences
import torch
from halfstep import InferencePrecisionOptimizer
from int8_borders import shares
from int8_peers import Inputs, bytes_of, onnx_models, torchao_model
from timing import PEAKS, machine, measure_in_turns, replayed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SIZED = ("bert-base", "vit-b")
MODELS = ("minilm", *zoo.RECIPES, *SIZED)


@dataclass
class Case:
    """A model, its data, and how it is judged.

    evaluate(model) gives the score of each sample that was held out and what agreement() compares; `example` is the
    batch whose time is taken, on the device.
    """

    name: str
    model: nn.Module
    calibration: list[Any]
    eval_fn: Callable[[nn.Module], torch.Tensor] | None
    evaluate: Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor]]
    agreement: Callable[[torch.Tensor, torch.Tensor], str]
    example: Inputs


def cosines(before: torch.Tensor, after: torch.Tensor) -> str:
    """Return the mean cosine between vectors, and the least in brackets."""
    found = torch.cosine_similarity(before, after)
    return f"{found.mean():.4f} ({found.min():.4f})"


def minilm(path: Path, device: torch.device, batch: int) -> Case:
    model, data = sentences.load(path)

    def reciprocal_ranks(pairs: range, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        queries, documents = data.encode(model, pairs, device)
        return 1.0 / sentences.ranks(queries, documents), torch.cat([queries, documents])

    return Case(
        "minilm",
        model,
        data.calibration(),
        lambda model: reciprocal_ranks(data.guard, model)[0],
        partial(reciprocal_ranks, data.held_out),
        cosines,
        tuple(tensor.to(device) for tensor in data.example(batch)),
    )


def digits(name: str, device: torch.device, batch: int) -> Case:
    size = zoo.RECIPES[name].size
    images, labels = zoo.digits(size)
    held, answers = images[zoo.TRAINED_ON :], labels[zoo.TRAINED_ON :]

    def evaluate(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        classes = zoo.classes(model, held, device)
        return (classes == answers).float(), classes

    return Case(
        name,
        zoo.trained(name, device),
        zoo.calibration(size),
        None,
        evaluate,
        lambda before, after: f"{(before == after).float().mean():.4f}",
        (held[:batch].contiguous().to(device),),
    )


def sized(name: str, device: torch.device, batch: int) -> Case:
    """Return a model of the size of BERT-base, at 128 tokens, or ViT-B/16, with random weights: for its times alone."""
    torch.manual_seed(0)
    if name == "bert-base":
        model: nn.Module = sentences.SentenceEncoder(768, 12, 12)
        mask = torch.ones(batch, 128, dtype=torch.bool)
        batches = [(torch.randint(30522, (batch, 128)), mask) for _ in range(3)]
    else:
        model = zoo.ViT(768, 12, 224, 16, heads=12, channels=3)
        batches = [(torch.randn(batch, 3, 224, 224),) for _ in range(3)]
    example = tuple(tensor.to(device) for tensor in batches[0])

    def evaluate(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return torch.zeros(batch), model(*example).float().cpu()

    return Case(name, model.eval(), batches, None, evaluate, cosines, example)


def said(report: dict[str, Any]) -> str:
    """Return what came back, and how many layers of it are int8."""
    regions = report["regions"]
    count = sum(len(region["layers"]) for region in regions if region["state"] == "int8")
    layers = f"{count} of {sum(len(region['layers']) for region in regions) + len(report['left'])} layers"
    kept = "" if report["kept"] else ", guard NOT kept"
    rest = f", rest {report['carrier']}" if report["result"] == "int8" else ""
    return f"{report['result']}, {layers}{rest}; guard's bound {100 * report['bound']:.2f}{kept}"


class Runs:
    """The models of one table by the name of their run, and what is known of each; what fails is told to stderr."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.models: dict[str, nn.Module] = {}
        self.notes: dict[str, str] = {}
        self.optimizers: dict[str, InferencePrecisionOptimizer] = {}

    def add(self, name: str, make: Callable[[], nn.Module]) -> nn.Module | None:
        """Make a model and call it once; None if that fails."""
        try:
            model = make()
            with torch.inference_mode():
                model(*self.case.example)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            print(f"{self.case.name}, {name}: {type(error).__name__}: {first}", file=sys.stderr, flush=True)
            return None
        self.models[name] = model
        return model


def halfstep_model(runs: Runs, name: str, options: argparse.Namespace, **choices: Any) -> nn.Module:
    case = runs.case
    optimizer = InferencePrecisionOptimizer(
        accuracy_threshold=options.threshold, eval_fn=case.eval_fn, progress=False, **choices
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the float model came back is said in the last column
        model = optimizer.optimize_for_inference(case.model, case.calibration, options.device)
    if options.explain:
        print(f"{case.name}, {name}: {optimizer.explain()}\n", file=sys.stderr, flush=True)
    runs.optimizers[name], runs.notes[name] = optimizer, said(optimizer.report())
    return model


def all_runs(case: Case, options: argparse.Namespace, folder: Path) -> Runs:
    """Return the models of all runs, float32 first."""
    runs, device = Runs(case), torch.device(options.device)
    half = torch.bfloat16

    def in_half() -> nn.Module:
        inference = InferencePrecisionOptimizer("bfloat16", accuracy_threshold=1.0, speed_guard=False)
        return inference.optimize_for_inference(case.model, case.calibration[:3], device)

    def inputs_of(batch: Any) -> Inputs:
        return batch[: len(case.example)]

    runs.add("float32", lambda: case.model.to(device))
    runs.add("bfloat16", in_half)
    runs.add("int8 everywhere", lambda: halfstep_model(runs, "int8 everywhere", options, speed_guard=False))
    runs.add("int8, speed guard", lambda: halfstep_model(runs, "int8, speed guard", options))
    if "torchao" in options.peers:
        for dtype in (torch.float32, half):
            name = str(dtype).removeprefix("torch.")
            runs.add(f"torchao int8, rest {name}", partial(torchao_model, case.model, dtype, case.example))
    if "onnxruntime" in options.peers and device.type == "cpu":
        try:
            batches = [inputs_of(batch) for batch in case.calibration]
            for name, model in onnx_models(case.model, batches, folder).items():
                runs.add(name, lambda model=model: model)
        except Exception as error:
            print(f"{case.name}, onnxruntime: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if options.compile:
        guarded = "int8, guard of compiled models"
        runs.add(guarded, lambda: halfstep_model(runs, guarded, options, compiled=True))
        for name in [n for n in runs.models if n != "float32" and not n.startswith("onnxruntime")]:
            model = runs.models[name]
            runs.add(f"{name}, compiled", lambda model=model: torch.compile(model))
            runs.notes[f"{name}, compiled"] = runs.notes.get(name, "")
        for name, optimizer in runs.optimizers.items():

            def script(optimizer: InferencePrecisionOptimizer = optimizer) -> nn.Module:
                optimizer.save_torchscript(folder / "script.pt")
                return torch.jit.load(folder / "script.pt", map_location=device)

            runs.add(f"{name}, script", script)
            runs.notes[f"{name}, script"] = runs.notes[name]
    return runs


def table(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one model, print its rows, and return them."""
    device, rows = torch.device(options.device), []
    torch.compiler.reset()  # it compiles code of one place, such as CastModel's, for 8 models at most
    with tempfile.TemporaryDirectory() as folder:
        runs = all_runs(case, options, Path(folder))
        scores, outputs = case.evaluate(runs.models["float32"])
        with torch.inference_mode():
            calls = {name: partial(model, *case.example) for name, model in runs.models.items()}
            times = measure_in_turns(calls, device, options.rounds)
            graphs: dict[str, float] = {}
            if device.type == "cuda":
                captured = {}
                for name, run in calls.items():
                    try:
                        captured[name] = replayed(run, device)
                    except Exception as error:
                        print(f"{case.name}, {name}: no CUDA graph: {error}", file=sys.stderr)
                graphs = measure_in_turns(captured, device, options.rounds)
        for name, model in runs.models.items():
            found, after = case.evaluate(model)
            optimizer = runs.optimizers.get(name)
            rows.append(
                {
                    "model": case.name,
                    "run": name,
                    "accuracy": found.mean().item(),
                    "drop": (scores - found).mean().item(),
                    "error": (scores - found).std().item() / len(found) ** 0.5,
                    "agreement": case.agreement(outputs, after),
                    "bytes": bytes_of(model),
                    "milliseconds": times[name],
                    "replayed": graphs.get(name),
                    "over float32": times["float32"] / times[name],
                    "over bfloat16": times["bfloat16"] / times[name] if "bfloat16" in times else None,
                    "note": runs.notes.get(name, ""),
                    "report": optimizer.report() if optimizer else None,
                }
            )
            print(line(rows[-1]), flush=True)
        if options.borders:
            for row in rows:
                if row["report"] and row["report"]["result"] == "int8":
                    row["shares"] = shares(runs.models[row["run"]], case.example)
    return rows


def limit_line(case: Case) -> str:
    """Return how long the tensor cores of an H100 need at least for one batch."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into it
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        case.model(*case.example)
    torch.backends.mha.set_fastpath_enabled(fast)
    operations = counter.get_total_flops()
    least = ", ".join(f"{1e3 * operations / peak:.3f} ms in {name}" for name, peak in PEAKS.items())
    return f"{case.name}: {operations:.3g} operations, limit {least}"


def shares_line(row: dict[str, Any]) -> str:
    """Return milliseconds, and parts of the whole."""
    whole = row["shares"]["model"]
    parts = (
        f"{row['shares'][part]:.3f} ({row['shares'][part] / whole:.0%})" for part in ("products", "borders", "rest")
    )
    return f"| {row['model']} | {row['run']} | {whole:.3f} | {' | '.join(parts)} |"


HEAD = (
    "| model | run | accuracy | drop, points | agreement | MB | ms | float32's time / its | bfloat16's / its "
    "| what came back |\n|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    graph = f" ({row['replayed']:.3f})" if row["replayed"] else ""
    half = f"{row['over bfloat16']:.2f}x" if row["over bfloat16"] else "-"
    return (
        f"| {row['model']} | {row['run']} | {row['accuracy']:.4f} | {100 * row['drop']:.2f} +- "
        f"{100 * row['error']:.2f} | {row['agreement']} | {row['bytes'] / 1e6:.2f} | {row['milliseconds']:.3f}{graph} "
        f"| {row['over float32']:.2f}x | {half} | {row['note']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threshold", type=float, default=0.02)
    parser.add_argument("--minilm", type=Path, default=sentences.FILE)
    parser.add_argument("--peers", default="onnxruntime,torchao")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--borders", action="store_true", help="print where the time of the int8 models goes")
    parser.add_argument("--explain", action="store_true", help="print what the optimizer did, to stderr")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    chosen = options.models.split(",")
    if unknown := set(chosen) - set(MODELS):
        parser.error(f"--models has {', '.join(sorted(unknown))}, expected some of {', '.join(MODELS)}")
    print(f"{machine(device)}, batches of {options.batch}, threshold {options.threshold:g}\n")
    result: dict[str, Any] = {"machine": machine(device), "models": []}
    print(HEAD)
    limits = []
    for name in chosen:
        if name == "minilm" and not options.minilm.exists():
            print(f"minilm: left out, there is no {options.minilm}; see bench/int8_sentences.py", file=sys.stderr)
            continue
        if name == "minilm":
            case = minilm(options.minilm, device, options.batch)
        else:
            case = (sized if name in SIZED else digits)(name, device, options.batch)
        result["models"] += table(case, options)
        if device.type == "cuda":
            limits.append(limit_line(case))
        if options.out:
            options.out.write_text(json.dumps(result, indent=1))
    if limits:
        print("\n" + "\n".join(limits))
    if options.borders:
        print("\n| model | run | ms | int8 products | borders | everything else |\n|---|---|---|---|---|---|")
        print("\n".join(shares_line(row) for row in result["models"] if "shares" in row))


if __name__ == "__main__":
    main()
