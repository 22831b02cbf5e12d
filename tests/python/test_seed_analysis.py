"""The document's blocks on analysis, gradual adoption and PyTorch's settings, run word for word."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from analysis_cases import Training, sample
from halfstep import MixedPrecisionConfig, MixedPrecisionManager
from seed_document import block

PLOTS = ("precision_timeline.png", "speedup_distribution.png", "memory_usage.png", "numerical_stability.png")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    warnings.filterwarnings("ignore", message=".*has no float16 arithmetic.*")
    monkeypatch.setenv("MPLBACKEND", "agg")  # the block imports pyplot
    benchmark, flash = torch.backends.cudnn.benchmark, torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cuda.enable_flash_sdp(flash)


def run(heading: str, **names) -> tuple[dict, str]:
    output = io.StringIO()
    namespace = {"__name__": "seed", **names}
    with contextlib.redirect_stdout(output):
        exec(compile(block(heading), "seed.md", "exec"), namespace)
    return namespace, output.getvalue()


def test_comprehensive_statistics_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands: trained before, and nothing within the window."""
    monkeypatch.chdir(tmp_path)
    training = Training()
    training.steps(5, overflow_every=2)
    namespace, printed = run("Comprehensive Statistics Tracking", mp_manager=training.manager)
    assert "    FP16 operations: nan%\n" in printed
    assert "    Average speedup: nanx\n" in printed
    assert "    Memory saved: nan GB\n" in printed
    assert "    Overflow events: 0\n" in printed, "those before the window are not its own"
    assert printed.endswith("Analysis plots saved to disk\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PLOTS)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    assert namespace["report"]["notes"]["fp16_ops_percentage"]


def test_comprehensive_statistics_tracking_with_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block's own place for it, "# train_model()", is where this trains."""
    monkeypatch.chdir(tmp_path)
    training = Training()

    def train_model() -> None:
        training.steps(6, overflow_every=3)
        training.monitor.samples.append(sample(2, fp32_ms=3.0, mixed_ms=2.0, fp32_bytes=2**30, mixed_bytes=2**29))

    code = block("Comprehensive Statistics Tracking")
    assert code.count("# train_model()") == 1
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = code.replace("# train_model()", "train_model()")
        exec(compile(code, "seed.md", "exec"), {"mp_manager": training.manager, "train_model": train_model})
    for line in (
        "    FP16 operations: 60.0%",
        "    FP32 operations: 30.0%",
        "    Mixed operations: 10.0%",
        "    Average speedup: 1.50x",
        "    Peak speedup: 1.50x",
        "    Memory saved: 0.50 GB",
        "    Overflow events: 2",
        "    Scale adjustments: 2",
    ):
        assert f"{line}\n" in output.getvalue()


def test_gradual_adoption() -> None:
    seen = []
    training = Training()
    training.manager.update_config(gradient_clipping_threshold=math.inf)

    def train_epoch(model, epoch: int) -> None:
        assert training.scaler.get_scale() == training.manager.config.loss_scale
        with training.manager.autocast_context():
            seen.append((training.manager.config.loss_scale, torch.is_autocast_enabled("cpu")))
        training.steps(2)

    namespace, _ = run(
        "1. Gradual Mixed Precision Adoption",
        MixedPrecisionConfig=MixedPrecisionConfig,
        mp_manager=training.manager,
        train_epoch=train_epoch,
    )
    namespace["gradual_mixed_precision_training"](training.model)
    assert seen == [(2**12, False)] * 5 + [(2**14, True)] * 5 + [(2**16, True)] * 10


def test_the_conservative_config_makes_a_manager_that_clips() -> None:
    namespace, _ = run("1. Gradual Mixed Precision Adoption", MixedPrecisionConfig=MixedPrecisionConfig)
    manager = MixedPrecisionManager(config=namespace["conservative_config"])
    assert manager.config == namespace["conservative_config"]
    weight = torch.nn.Parameter(torch.zeros(4))
    model = torch.nn.ParameterList([weight])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    scaler.scale(weight.sum()).backward()
    assert scaler.get_scale() == 2**12
    scaler.step(optimizer)
    scaler.update()
    assert weight.norm().item() == pytest.approx(0.5), "the norm of the gradient was 2"


def test_optimizations_for_pytorch(device: torch.device) -> None:
    namespace, _ = run("2. Framework-Specific Optimizations", torch=torch)
    convolution = torch.nn.Conv2d(4, 8, 3).to(device)
    optimized = namespace["optimize_pytorch_mixed_precision"](convolution)
    assert optimized is convolution
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cuda.flash_sdp_enabled()
    manager = MixedPrecisionManager(framework="pytorch", precision_policy="mixed_bfloat16")
    optimizer = torch.optim.SGD(convolution.parameters(), lr=0.1)
    _, _, scaler = manager.setup_pytorch_training(optimized, optimizer)
    before = convolution.weight.detach().clone()
    with manager.autocast_context():
        loss = optimized(torch.randn(2, 4, 8, 8, device=device)).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, convolution.weight)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
