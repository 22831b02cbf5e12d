"""MixedPrecisionManager and MixedPrecisionConfig for PyTorch."""

from __future__ import annotations

import importlib.util
import inspect
import math
import warnings

import pytest
import torch
from halfstep import MixedPrecisionConfig, MixedPrecisionManager
from halfstep import manager as manager_module
from halfstep.grad_scaler import GradScaler
from torch import nn

find = importlib.util.find_spec


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message=".*has no float16 arithmetic.*")


def parts(device: str | torch.device = "cpu"):
    model = nn.Linear(4, 2).to(device)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def one_step(manager: MixedPrecisionManager, model, optimizer, scaler, factor: float = 1.0) -> torch.Tensor:
    optimizer.zero_grad()
    device = next(model.parameters()).device
    with manager.autocast_context():
        loss = model(torch.ones(8, 4, device=device)).square().mean() * factor
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def applied_norm(model, before: list[torch.Tensor]) -> float:
    """Return the norm of the gradient that parts()' optimizer has stepped with."""
    with torch.no_grad():
        return math.sqrt(
            sum(((b - p) / 0.1).square().sum().item() for b, p in zip(before, model.parameters(), strict=True))
        )


def copies(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_signature_is_the_documents() -> None:
    parameters = inspect.signature(MixedPrecisionManager).parameters
    documented = {
        "framework": "auto",
        "precision_policy": "mixed_float16",
        "enable_loss_scaling": True,
        "initial_loss_scale": 2**15,
        "enable_monitoring": True,
    }
    assert {name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD} == documented
    assert list(inspect.signature(MixedPrecisionConfig).parameters.items())[0][0] == "precision_policy"
    assert MixedPrecisionConfig() == MixedPrecisionConfig(
        "mixed_float16", 2**15, 2.0, 0.5, 2000, True, "cuda", 1.0, True
    )


def test_the_users_objects_stay_theirs(device: torch.device) -> None:
    model, optimizer = parts(device)
    manager = MixedPrecisionManager("auto")
    assert manager.framework == "pytorch"
    got_model, got_optimizer, scaler = manager.setup_pytorch_training(model=model, optimizer=optimizer)
    assert got_model is model
    assert got_optimizer is optimizer
    assert isinstance(scaler, torch.amp.GradScaler)
    assert scaler.get_scale() == 2**15
    one_step(manager, model, optimizer, scaler)
    assert all(p.dtype is torch.float32 and p.grad.dtype is torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("mixed_float16", torch.float16), ("mixed_bfloat16", torch.bfloat16), ("float32", torch.float32)],
)
def test_the_policy_decides_the_forward_dtype(device: torch.device, policy: str, dtype: torch.dtype) -> None:
    model, optimizer = parts(device)
    manager = MixedPrecisionManager("pytorch", policy)
    manager.setup_pytorch_training(model, optimizer)
    x = torch.ones(3, 4, device=device)
    with manager.autocast_context():
        assert model(x).dtype is dtype
    manager.update_config(autocast_enabled=False)
    with manager.autocast_context():
        assert model(x).dtype is torch.float32
    manager.update_config(enable_autocast=True)
    with manager.autocast_context():
        assert model(x).dtype is dtype


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("loss_scaling", [True, False])
def test_bad_gradients_are_skipped_by_every_half_policy(policy: str, loss_scaling: bool) -> None:
    model, optimizer = parts()
    manager = MixedPrecisionManager("pytorch", policy, enable_loss_scaling=loss_scaling)
    model, optimizer, scaler = manager.setup_pytorch_training(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    one_step(manager, model, optimizer, scaler, factor=math.inf)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    one_step(manager, model, optimizer, scaler)
    assert not torch.equal(model.weight, before[0])
    scales = loss_scaling and policy == "mixed_float16"
    assert scaler.get_scale() == (2**14 if scales else 1.0)
    assert manager.get_statistics().skipped_steps == 1


def test_float32_and_unchecked_policies_leave_the_loop_alone() -> None:
    for settings in (
        {"precision_policy": "float32"},
        {"config": MixedPrecisionConfig("mixed_bfloat16", numerical_stability_check=False)},
    ):
        model, optimizer = parts()
        _, _, scaler = MixedPrecisionManager("pytorch", **settings).setup_pytorch_training(model, optimizer)
        assert not scaler.is_enabled()


def test_a_config_sets_everything_and_clips() -> None:
    config = MixedPrecisionConfig(
        loss_scale=2**8, loss_scale_growth_factor=4.0, loss_scale_backoff_factor=0.25, loss_scale_growth_interval=7
    )
    model, optimizer = parts()
    manager = MixedPrecisionManager(config=config)
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    assert scaler.get_scale() == 256.0
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (4.0, 0.25, 7)
    before = copies(model)
    one_step(manager, model, optimizer, scaler, factor=30.0)
    assert applied_norm(model, before) == pytest.approx(1.0, rel=1e-4)
    config.loss_scale = 2.0
    assert manager.config.loss_scale == 2**8, "the manager keeps its own copy"
    with pytest.raises(ValueError, match="config together with precision_policy"):
        MixedPrecisionManager(precision_policy="float32", config=config)


@pytest.mark.parametrize("policy", ["mixed_float16", "float32"])
def test_an_explicit_unscale_leaves_clipping_to_the_loop(policy: str) -> None:
    model, optimizer = parts()
    manager = MixedPrecisionManager(config=MixedPrecisionConfig(policy, loss_scale=2**8))
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    for explicit in (True, False):
        optimizer.zero_grad()
        before = copies(model)
        scaler.scale(model(torch.ones(8, 4)).square().mean() * 30.0).backward()
        if explicit:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert (applied_norm(model, before) > 2.0) == explicit


def test_without_a_config_nothing_is_clipped() -> None:
    model, optimizer = parts()
    manager = MixedPrecisionManager(initial_loss_scale=2**8)
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    before = copies(model)
    one_step(manager, model, optimizer, scaler, factor=30.0)
    assert applied_norm(model, before) > 2.0


def test_a_threshold_set_before_the_setup_clips() -> None:
    model, optimizer = parts()
    manager = MixedPrecisionManager(initial_loss_scale=2**8)
    manager.update_config(gradient_clipping_threshold=0.5)
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    before = copies(model)
    one_step(manager, model, optimizer, scaler, factor=30.0)
    assert applied_norm(model, before) == pytest.approx(0.5, rel=1e-3)


def test_update_config_reaches_the_running_scaler() -> None:
    model, optimizer = parts()
    manager = MixedPrecisionManager()
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    manager.update_config(loss_scale=2**10)
    assert scaler.get_scale() == 1024.0
    one_step(manager, model, optimizer, scaler)
    manager.update_config(loss_scale=2**8, loss_scale_growth_interval=3, gradient_clipping_threshold=0.5)
    assert scaler.get_scale() == 256.0
    assert scaler.get_growth_interval() == 3
    before = copies(model)
    one_step(manager, model, optimizer, scaler, factor=30.0)
    assert applied_norm(model, before) == pytest.approx(0.5, rel=1e-3)
    manager.update_config(gradient_clipping_threshold=math.inf)
    before = copies(model)
    one_step(manager, model, optimizer, scaler, factor=30.0)
    assert applied_norm(model, before) > 2.0


def test_adjust_loss_scale() -> None:
    model, optimizer = parts()
    manager = MixedPrecisionManager()
    with pytest.raises(ValueError, match="^factor is 1e"):
        manager.adjust_loss_scale(factor=1e308)
    manager.adjust_loss_scale(factor=0.5)
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    assert scaler.get_scale() == 2**14
    manager.adjust_loss_scale(factor=0.25)
    assert scaler.get_scale() == 2**12
    one_step(manager, model, optimizer, scaler)
    manager.adjust_loss_scale(factor=4.0)
    assert scaler.get_scale() == 2**14
    for bad, error in (
        (0.0, ValueError),
        (-1.0, ValueError),
        (math.nan, ValueError),
        ("x", TypeError),
        (1e38, ValueError),
        (1e-100, ValueError),
    ):
        with pytest.raises(error, match="factor is"):
            manager.adjust_loss_scale(factor=bad)
    assert scaler.get_scale() == 2**14


def test_statistics_are_measured_or_nan_with_a_reason() -> None:
    model, optimizer = parts()
    manager = MixedPrecisionManager()
    before = manager.get_statistics()
    assert math.isnan(before.steps)
    assert "setup_pytorch_training" in before.notes["steps"]
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    one_step(manager, model, optimizer, scaler)
    one_step(manager, model, optimizer, scaler, factor=math.inf)
    stats = manager.get_comprehensive_stats()
    assert (stats["steps"], stats["skipped_steps"], stats["overflow_events"]) == (2, 1, 1)
    assert (stats["scale_adjustments"], stats["loss_scale"], stats["host_syncs"]) == (1, 2**14, 0)
    for name, value in stats.items():
        if isinstance(value, float) and math.isnan(value):
            assert stats["notes"][name], name
        elif name in stats["notes"]:
            assert ("(CPU)" if name.startswith("memory_") else "of one sample") in stats["notes"][name]
    assert stats["speedup_factor"] > 0, "the second step was sampled"
    off = MixedPrecisionManager(enable_monitoring=False).get_comprehensive_stats()
    assert "monitoring is off" in off["notes"]["steps"]


def test_the_scaler_lives_on_the_models_device(device: torch.device) -> None:
    model, optimizer = parts(device)
    manager = MixedPrecisionManager()
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    assert isinstance(scaler, GradScaler)
    one_step(manager, model, optimizer, scaler)
    assert scaler._scale.device.type == device.type


BAD_CONFIG = [
    ("precision_policy", "float8", ValueError),
    ("loss_scale", -1.0, ValueError),
    ("loss_scale", math.nan, ValueError),
    ("loss_scale", math.inf, ValueError),
    ("loss_scale", 1e39, ValueError),
    ("loss_scale", 1e-60, ValueError),
    ("loss_scale", 10**400, ValueError),
    ("loss_scale", "high", TypeError),
    ("loss_scale_growth_interval", 2**40, ValueError),
    ("loss_scale_growth_factor", 1.0, ValueError),
    ("loss_scale_backoff_factor", 1.0, ValueError),
    ("loss_scale_growth_interval", 0, ValueError),
    ("loss_scale_growth_interval", 1.5, TypeError),
    ("enable_autocast", 1, TypeError),
    ("autocast_device_type", "tpu", ValueError),
    ("gradient_clipping_threshold", 0.0, ValueError),
    ("gradient_clipping_threshold", math.nan, ValueError),
    ("numerical_stability_check", None, TypeError),
]


@pytest.mark.parametrize(("field", "value", "error"), BAD_CONFIG)
def test_bad_config_values_are_named_and_change_nothing(field: str, value: object, error: type) -> None:
    with pytest.raises(error, match=f"^{field} is .*, expected"):
        MixedPrecisionConfig(**{field: value})
    config = MixedPrecisionConfig()
    with pytest.raises(error, match=f"^{field} is .*, expected"):
        setattr(config, field, value)
    assert config == MixedPrecisionConfig()
    manager = MixedPrecisionManager()
    _, _, scaler = manager.setup_pytorch_training(*parts())
    before = manager.config, scaler.state_dict()
    with pytest.raises(error, match=f"^{field} is .*, expected"):
        manager.update_config(**{"loss_scale": 4.0, field: value} if field != "loss_scale" else {field: value})
    assert (manager.config, scaler.state_dict()) == before


def test_bad_arguments_of_the_manager_are_named() -> None:
    with pytest.raises(
        ValueError, match="framework is 'jax', expected one of 'auto', 'pytorch', 'tensorflow', 'sklearn'"
    ):
        MixedPrecisionManager("jax")
    with pytest.raises(ValueError, match="precision_policy is 'int4', expected one of"):
        MixedPrecisionManager(precision_policy="int4")
    with pytest.raises(ValueError, match="^initial_loss_scale is -1, expected"):
        MixedPrecisionManager(initial_loss_scale=-1)
    with pytest.raises(ValueError, match="^initial_loss_scale is nan, expected"):
        MixedPrecisionManager(initial_loss_scale=math.nan)
    with pytest.raises(TypeError, match="enable_loss_scaling is 'no', expected True or False"):
        MixedPrecisionManager(enable_loss_scaling="no")
    with pytest.raises(TypeError, match="config is dict, expected MixedPrecisionConfig"):
        MixedPrecisionManager(config={})
    with pytest.raises(AttributeError, match="has no field 'loss_scalee'"):
        MixedPrecisionConfig().loss_scalee = 1.0
    manager = MixedPrecisionManager()
    model, optimizer = parts()
    with pytest.raises(TypeError, match="model is str, expected torch.nn.Module"):
        manager.setup_pytorch_training("model", optimizer)
    with pytest.raises(TypeError, match="optimizer is list, expected torch.optim.Optimizer"):
        manager.setup_pytorch_training(model, [optimizer])
    with pytest.raises(ValueError, match=r"update_config got \['lr'\], expected fields"):
        manager.update_config(lr=1.0)
    with pytest.raises(ValueError, match="both autocast_enabled and enable_autocast"):
        manager.update_config(autocast_enabled=True, enable_autocast=True)
    manager.setup_pytorch_training(model, optimizer)
    with pytest.raises(ValueError, match="Make a new MixedPrecisionManager"):
        manager.update_config(precision_policy="float32")
    assert manager.config.precision_policy == "mixed_float16"


def test_what_is_of_tensorflow_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = MixedPrecisionManager("pytorch")
    for name, arguments in {
        "setup_tensorflow_policy": (),
        "restore_tensorflow_policy": (),
        "policy_context": (),
        "wrap_optimizer": ("adam",),
        "watch": (None, None),
        "apply_policy": (None,),
    }.items():
        message = f"this manager's framework is 'pytorch', which has no {name}: framework='tensorflow' has"
        with pytest.raises(AttributeError, match=message):
            getattr(manager, name)(*arguments)
    hide(monkeypatch, "tensorflow")
    with pytest.raises(ImportError, match="'tensorflow', but tensorflow is not installed: pip install tensorflow"):
        MixedPrecisionManager("tensorflow")


def test_auto_takes_the_first_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert manager_module._installed("auto") == "pytorch"
    hide(monkeypatch, "torch", shown=("tensorflow", "sklearn"))
    assert manager_module._installed("auto") == "tensorflow"
    hide(monkeypatch, "torch", "tensorflow", shown=("sklearn",))
    assert MixedPrecisionManager().framework == "sklearn"
    hide(monkeypatch, "torch", "tensorflow", "sklearn")
    with pytest.raises(ImportError, match="none is installed: pip install torch, tensorflow or scikit-learn"):
        MixedPrecisionManager()
    assert MixedPrecisionManager("sklearn").framework == "sklearn", "it works on arrays without scikit-learn"


def hide(monkeypatch: pytest.MonkeyPatch, *names: str, shown: tuple[str, ...] = ()) -> None:
    """Let the manager find no module of these names, and find those that are shown."""

    def find_spec(name: str) -> object:
        return None if name in names else name if name in shown else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_a_model_on_two_kinds_of_device_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="the model's parameters are on"):
        MixedPrecisionManager().setup_pytorch_training(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_overflows_are_named_as_the_model_names_its_parameters(device: torch.device) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)  # which knows no names
    manager = MixedPrecisionManager(precision_policy="mixed_bfloat16")
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    with manager.autocast_context():
        loss = model(torch.ones(2, 4, device=device)).sum()
    scaler.scale(loss + model[0].bias[1] * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.last_step(wait=True).overflowed == ("0.bias",)
