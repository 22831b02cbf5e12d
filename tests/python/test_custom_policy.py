"""MixedPrecisionManager(custom_policy=...): layers, the scale, captured steps, and the way back."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from halfstep import CustomPrecisionPolicy, MixedPrecisionManager, PrecisionPolicy, apply_plan
from halfstep.policy import PlannedLayer, PrecisionPlan
from halfstep.scopes import LayerScope
from seed_document import block
from torch import nn


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message=".*has no float16 arithmetic.*")


class Net(nn.Module):
    """The layers that the document's policy tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 16)
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.hidden = nn.Linear(16, 16)
        self.output = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        x = self.conv(x.unsqueeze(1)).mean(1)
        return self.output(torch.tanh(self.hidden(self.norm(x))))


class Careful(CustomPrecisionPolicy):
    def should_use_fp16(self, layer_type: str, layer_name: str) -> bool:
        return layer_name not in ("norm", "output")


def parts(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net().to(device)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def dtypes(manager: MixedPrecisionManager, model: nn.Module, device: torch.device) -> dict[str, torch.dtype]:
    """Return what each layer hands on, seen by hooks."""
    seen: dict[str, torch.dtype] = {}

    def note(name: str):
        def hook(module: nn.Module, args: object, out: torch.Tensor) -> None:
            seen[name] = out.dtype

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_children()]
    with manager.autocast_context():
        model(torch.randn(4, 8, device=device))
    for hook in hooks:
        hook.remove()
    return seen


def train(manager, model, optimizer, scaler, steps: int, device: torch.device, factor: float = 1.0):
    torch.manual_seed(1)
    x = torch.randn(64, 8, device=device)
    y = x[:, :2].sin()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with manager.autocast_context():
            loss = factor * nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def test_the_documents_block_runs_word_for_word(device: torch.device) -> None:
    model, optimizer = parts(device)
    namespace = {"MixedPrecisionManager": MixedPrecisionManager, "model": model, "optimizer": optimizer}
    exec(compile(block("Custom Mixed Precision Policies"), "seed.md", "exec"), namespace)
    manager, scaler = namespace["custom_manager"], namespace["scaler"]
    assert namespace["model"] is model
    assert dtypes(manager, model, device) == {
        "embedding": torch.float32,
        "conv": torch.float16,
        "norm": torch.float32,
        "hidden": torch.float16,
        "output": torch.float32,
    }
    losses = train(manager, model, optimizer, scaler, 30, device)
    assert losses[-1] < 0.5 * losses[0]
    train(manager, model, optimizer, scaler, 5, device, factor=1e-3)
    policy = namespace["ConservativeMixedPrecision"]()
    records = scaler.history()
    for before, now in zip(records, records[2:], strict=False):
        assert now.scale == policy.get_loss_scale_factor(before.norm)
    assert len({record.scale for record in records}) > 1, "the thresholds were crossed"
    assert manager.get_statistics().skipped_steps == 0


def test_the_plan_can_be_read(device: torch.device) -> None:
    model, optimizer = parts(device)
    manager = MixedPrecisionManager("pytorch", "mixed_bfloat16", custom_policy=Careful())
    assert manager.precision_plan(model) is None
    manager.setup_pytorch_training(model, optimizer)
    plan = manager.precision_plan(model)
    assert plan["hidden"].precision == "bfloat16"
    assert plan["output"].reason == "Careful.should_use_fp16 is False"
    assert dtypes(manager, model, device)["hidden"] is torch.bfloat16
    assert dtypes(manager, model, device)["output"] is torch.float32
    assert not isinstance(model.hidden.__dict__.get("forward"), LayerScope), "what autocast does anyway costs nothing"


def test_rules_are_a_custom_policy_too(device: torch.device) -> None:
    model, optimizer = parts(device)
    rules = PrecisionPolicy("mine", "bfloat16", [{"name": "output", "precision": "float32"}])
    manager = MixedPrecisionManager("pytorch", "mixed_bfloat16", custom_policy=rules)
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    assert dtypes(manager, model, device)["output"] is torch.float32
    assert scaler.get_scale() == 1.0
    losses = train(manager, model, optimizer, scaler, 20, device)
    assert losses[-1] < 0.6 * losses[0]


def test_a_float16_layer_under_bfloat16_scales_the_loss(device: torch.device) -> None:
    model, optimizer = parts(device)
    rules = PrecisionPolicy("mine", "bfloat16", [{"name": "hidden", "precision": "float16"}])
    manager = MixedPrecisionManager("pytorch", "mixed_bfloat16", custom_policy=rules)
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    assert dtypes(manager, model, device)["hidden"] is torch.float16
    assert scaler.get_scale() == 2**15
    manager.adjust_loss_scale(0.5)
    assert scaler.get_scale() == 2**14
    assert train(manager, model, optimizer, scaler, 20, device)[-1] < 0.5
    off = MixedPrecisionManager("pytorch", "mixed_bfloat16", enable_loss_scaling=False, custom_policy=rules)
    assert off.setup_pytorch_training(*parts(device))[2].get_scale() == 1.0


def test_use_custom_policy_chooses(device: torch.device) -> None:
    model, optimizer = parts(device)
    manager = MixedPrecisionManager("pytorch", "mixed_bfloat16", custom_policy=Careful())
    manager.setup_pytorch_training(model, optimizer, use_custom_policy=False)
    assert dtypes(manager, model, device)["output"] is torch.bfloat16
    manager.setup_pytorch_training(model, optimizer, use_custom_policy=True)
    assert dtypes(manager, model, device)["output"] is torch.float32
    manager.setup_pytorch_training(model, optimizer, use_custom_policy=False)
    assert dtypes(manager, model, device)["output"] is torch.bfloat16, "the plan of the setup before is gone"
    with pytest.raises(ValueError, match="use_custom_policy is True, but the manager was made without"):
        MixedPrecisionManager("pytorch").setup_pytorch_training(model, optimizer, use_custom_policy=True)
    with pytest.raises(TypeError, match="use_custom_policy is 1"):
        manager.setup_pytorch_training(model, optimizer, use_custom_policy=1)


def test_bad_policies_change_nothing() -> None:
    with pytest.raises(TypeError, match="custom_policy is <class .*Careful'>, expected an instance"):
        MixedPrecisionManager("pytorch", custom_policy=Careful)
    model, optimizer = parts(torch.device("cpu"))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    rules = PrecisionPolicy("mine", "bfloat16", [{"name": "output", "precision": "int8"}])
    manager = MixedPrecisionManager("pytorch", "mixed_bfloat16", custom_policy=rules)
    with pytest.raises(ValueError, match="'output' is planned as int8"):
        manager.setup_pytorch_training(model, optimizer)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert manager.precision_plan(model) is None


def test_settings_and_removal_keep_the_plan_or_take_it_out(device: torch.device) -> None:
    model, optimizer = parts(device)
    state = list(model.state_dict())
    manager = MixedPrecisionManager("pytorch", "mixed_bfloat16", custom_policy=Careful())
    manager.setup_pytorch_training(model, optimizer)
    assert list(model.state_dict()) == state
    scope = model.output.forward
    manager.update_config(loss_scale_growth_interval=7)
    assert model.output.forward is scope, "nothing to compile again"
    manager.update_config(half_reductions=())
    assert dtypes(manager, model, device)["output"] is torch.float32
    manager.update_config(enable_autocast=False)
    assert "forward" not in model.output.__dict__
    manager.update_config(enable_autocast=True)
    assert dtypes(manager, model, device)["output"] is torch.float32
    manager.remove_policy(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert manager.precision_plan(model) is None


def test_a_plan_that_the_user_has_applied_stays(device: torch.device) -> None:
    model, optimizer = parts(device)
    apply_plan(model, PrecisionPolicy("own", "bfloat16", [{"name": "output", "precision": "float32"}]).plan(model))
    manager = MixedPrecisionManager("pytorch", "mixed_bfloat16")
    manager.setup_pytorch_training(model, optimizer)
    manager.update_config(half_reductions=())
    assert dtypes(manager, model, device)["output"] is torch.float32


def test_float32_asks_nobody(device: torch.device) -> None:
    class Never(CustomPrecisionPolicy):
        def should_use_fp16(self, layer_type: str, layer_name: str) -> bool:
            raise AssertionError

    model, optimizer = parts(device)
    manager = MixedPrecisionManager("pytorch", "float32", custom_policy=Never())
    manager.setup_pytorch_training(model, optimizer)
    assert set(dtypes(manager, model, device).values()) == {torch.float32}


def test_a_float32_norm_is_torchs(device: torch.device) -> None:
    """Half reductions are of the norms that the policy leaves in half."""
    model, optimizer = parts(device)
    manager = MixedPrecisionManager("pytorch", "mixed_bfloat16", custom_policy=Careful())
    manager.setup_pytorch_training(model, optimizer)
    x = torch.randn(4, 16, device=device).bfloat16()
    with manager.autocast_context():
        got = model.norm(x)
    expected = nn.functional.layer_norm(x.float(), (16,), model.norm.weight, model.norm.bias)
    assert got.dtype is torch.float32
    assert torch.equal(got, expected)


def test_captured_steps_train_to_the_same_bits(device: torch.device) -> None:
    """With half weights and scopes; on the CPU the captured step runs as it is, on half copies too."""
    results = []
    for captured in (False, True):
        model, optimizer = parts(device)
        policy = "mixed_float16" if device.type == "cuda" else "mixed_bfloat16"
        manager = MixedPrecisionManager("pytorch", policy, custom_policy=Careful())
        _, _, scaler = manager.setup_pytorch_training(model, optimizer)
        torch.manual_seed(1)
        x = torch.randn(64, 8, device=device)
        y = x[:, :2].sin()

        def step(x, y, model=model, optimizer=optimizer, scaler=scaler, manager=manager):
            optimizer.zero_grad()
            with manager.autocast_context():
                loss = nn.functional.mse_loss(model(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss

        run = manager.capture(step, residual="float32") if captured else step
        losses = [run(x, y).detach().clone() for _ in range(12)]
        results.append((torch.stack(losses), copy.deepcopy(model.state_dict())))
        if captured:
            assert "output.weight" in run.explain()
            assert "the plan runs its layer in float32" in run.explain()
            if device.type == "cuda":
                assert run.captures == 1, run.explain()
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


@pytest.mark.cuda
def test_a_new_plan_is_captured_anew_and_the_scale_follows_replays() -> None:
    device = torch.device("cuda")

    class Scaled(Careful):
        def get_loss_scale_factor(self, gradient_norm: float) -> float:
            return 2.0**10 if gradient_norm > 0.1 else 2.0**13

    def run(captured: bool):
        model, optimizer = parts(device)
        manager = MixedPrecisionManager("pytorch", initial_loss_scale=2.0**10, custom_policy=Scaled())
        _, _, scaler = manager.setup_pytorch_training(model, optimizer)
        torch.manual_seed(1)
        x = torch.randn(64, 8, device=device)

        def step(x, factor):
            optimizer.zero_grad()
            with manager.autocast_context():
                loss = model(x).float().square().mean() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss

        call = manager.capture(step, residual="float32") if captured else step
        scales = []
        for index in range(14):
            call(x, torch.tensor(3.0 if index % 3 == 0 else 0.001, device=device))
            scales.append(scaler.get_scale())
        if captured:
            assert call.captures == 1
            assert call.replays >= 10
            manager.setup_pytorch_training(model, optimizer, use_custom_policy=False)
            call(x, torch.ones((), device=device))
            assert "a module's forward was replaced" in call.explain()
        return scales

    scales = run(captured=True)
    assert scales == run(captured=False)
    assert set(scales) == {2.0**10, 2.0**13}


def test_plans_of_json_and_of_code_agree() -> None:
    model, _ = parts(torch.device("cpu"))
    plan = Careful().plan(model, "bfloat16")
    assert isinstance(plan, PrecisionPlan)
    assert plan["norm"] == PlannedLayer("norm", "LayerNorm", "float32", "Careful.should_use_fp16 is False")
