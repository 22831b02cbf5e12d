"""Half copies of weights in a captured step, on every device: the step is the same with and without a graph.

With residual="float32" and all gradients half anyway, the step must give torch autocast's bits.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from halfstep import MixedPrecisionConfig, MixedPrecisionManager, reductions
from torch import nn

WORDS, WIDTH, LENGTH = 40, 32, 8


class Block(nn.TransformerEncoderLayer):
    """A user's own class: torch.compile skips calls of torch's."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden)


class Model(nn.Module):
    """A tied embedding, a directly held parameter, attention, norms, a parameter used twice and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.block = Block(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.block(self.embedding(words) + self.position)
        hidden = self.frozen(self.twice(torch.relu(self.twice(hidden))))
        return nn.functional.linear(self.norm(hidden), self.embedding.weight)


class Run:
    """A model with its captured step, on fixed data."""

    def __init__(
        self, device: torch.device, model: nn.Module | None = None, *, capture: bool = True, **settings
    ) -> None:
        torch.manual_seed(0)
        self.model = (model or Model()).to(device)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad], lr=1e-2
        )
        config = MixedPrecisionConfig(precision_policy="mixed_bfloat16")
        if not capture:  # a float32 stream stays one, as under autocast and with residual="float32"
            config.half_reductions = config.half_reductions[:-1]
        self.manager = MixedPrecisionManager(framework="pytorch", config=config)
        _, _, self.scaler = self.manager.setup_pytorch_training(self.model, self.optimizer)
        self.words = torch.randint(0, WORDS, (4, LENGTH), device=device)
        self.targets = (self.words * 7 + 3) % WORDS
        self.step = self.manager.capture(self.train, **settings) if capture else self.train

    def loss(self) -> torch.Tensor:
        with self.manager.autocast_context():
            return nn.functional.cross_entropy(self.model(self.words).flatten(0, 1).float(), self.targets.flatten())

    def train(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def losses(self, steps: int) -> list[float]:
        return [self.step().item() for _ in range(steps)]

    @property
    def half(self):
        return self.step._half[0]


def copies_match(run: Run) -> bool:
    return all(torch.equal(half, parameter.to(half.dtype)) for parameter, half in run.half.copies.items())


def same_parameters(first: Run, second: Run) -> bool:
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    return all(torch.equal(mine, other) for mine, other in pairs)


def test_linear_layers_alone_compute_the_bits_of_autocast(device: torch.device) -> None:
    plain, half = Run(device, capture=False), Run(device, residual="float32")
    assert plain.losses(8) == half.losses(8)
    assert same_parameters(plain, half)


def test_half_copies_everywhere_train_as_well_as_autocast(device: torch.device) -> None:
    plain, half = Run(device, capture=False), Run(device)
    first, last = plain.losses(60), half.losses(60)
    assert last[-1] < 0.2 * last[0]
    assert last[0] == pytest.approx(first[0], rel=0.01)
    assert last[-1] == pytest.approx(first[-1], abs=0.05)


def test_outside_of_a_step_nothing_shows(device: torch.device) -> None:
    run = Run(device)
    keys, before = list(run.model.state_dict()), {name: set(vars(m)) for name, m in run.model.named_modules()}
    run.losses(5)
    assert list(run.model.state_dict()) == keys
    assert {name: set(vars(m)) for name, m in run.model.named_modules()} == before
    for parameter in run.model.parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.dtype is parameter.grad_dtype is torch.float32
        assert parameter.grad is None or parameter.grad.dtype is torch.float32
    assert copies_match(run)
    run.train()  # the plain loop goes on with the same objects
    run.losses(2)
    assert copies_match(run)


def test_gradients_on_demand_are_those_of_the_step(device: torch.device) -> None:
    half, plain = Run(device, residual="float32"), Run(device, capture=False)
    half.losses(5)
    plain.losses(5)
    mine = half.step.gradients()
    named = {name: parameter for name, parameter in plain.model.named_parameters() if parameter.grad is not None}
    assert mine.keys() == named.keys()
    for name, parameter in named.items():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=0, atol=0)


def test_a_tied_weight_sums_its_gradients(device: torch.device) -> None:
    run = Run(device)
    run.losses(1)
    weight = run.model.embedding.weight
    assert weight in run.half.copies
    reference = Run(device, capture=False)
    reference.losses(1)
    mine = run.step.gradients()["embedding.weight"]
    expected = reference.model.embedding.weight.grad
    # bfloat16 throughout, in another order; with one of the two uses missing it would be off by far more.
    assert (mine - expected).norm() < 0.04 * expected.norm()


def test_a_float32_use_beside_the_half_one_adds_to_the_gradient(device: torch.device) -> None:
    """A penalty on the parameters, outside of every forward, must not be lost nor rounded to half."""
    runs = [Run(device, residual="float32"), Run(device, capture=False)]
    for run in runs:
        plain_loss = run.loss
        run.loss = lambda run=run, plain=plain_loss: plain() + 1e-3 * run.model.twice.weight.pow(2).sum()
        run.losses(1)
    mine = runs[0].step.gradients()["twice.weight"]
    assert runs[0].model.twice.weight.grad.dtype is torch.float32
    torch.testing.assert_close(mine, runs[1].model.twice.weight.grad, rtol=1e-2, atol=1e-5)
    rest = mine - 2e-3 * Run(device).model.twice.weight  # without the penalty's part it would be off by that
    assert not torch.allclose(rest, runs[1].model.twice.weight.grad, rtol=1e-2, atol=1e-5)


def test_a_frozen_layer_has_a_copy_and_keeps_its_bytes(device: torch.device) -> None:
    run = Run(device)
    before = run.model.frozen.weight.clone()
    run.losses(5)
    assert run.model.frozen.weight in run.half.copies
    assert torch.equal(run.model.frozen.weight, before)


def test_freezing_under_way_is_followed(device: torch.device) -> None:
    run = Run(device)
    run.losses(5)
    run.model.twice.requires_grad_(False)
    before = run.model.twice.weight.clone()
    run.losses(5)
    assert torch.equal(run.model.twice.weight, before)
    run.model.twice.requires_grad_(True)
    run.losses(5)
    assert not torch.equal(run.model.twice.weight, before)


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "assign", "data", "ema swap"])
def test_parameters_changed_between_steps_are_used(device: torch.device, how: str) -> None:
    run, other = Run(device, residual="float32"), Run(device, capture=False, residual="float32")
    trained = copy.deepcopy(run.model.state_dict())
    run.losses(5)
    other.losses(5)
    for each in (run, other):
        weights = {key: value.clone() for key, value in trained.items()}
        if how == "in place":
            with torch.no_grad():
                each.model.twice.weight.mul_(0.5)
        elif how == "load_state_dict":
            each.model.load_state_dict(weights)
        elif how == "assign":
            each.model.load_state_dict(weights, assign=True)
            each.optimizer.param_groups[0]["params"] = [p for p in each.model.parameters() if p.requires_grad]
            each.optimizer.state.clear()
            each.model.frozen.requires_grad_(False)
            each.optimizer.param_groups[0]["params"] = [p for p in each.model.parameters() if p.requires_grad]
        elif how == "data":
            each.model.twice.weight.data = each.model.twice.weight.data * 0.5
        else:  # to averaged weights and back, as evaluation with an EMA does
            kept = {name: parameter.detach().clone() for name, parameter in each.model.named_parameters()}
            with torch.no_grad():
                for name, parameter in each.model.named_parameters():
                    parameter.copy_(weights[name])
                each.model(each.words)
                for name, parameter in each.model.named_parameters():
                    parameter.copy_(kept[name])
    assert run.losses(4) == other.losses(4)
    assert same_parameters(run, other)


@pytest.mark.parametrize("remedy", ["invalidate", "always"])
def test_a_change_through_data_needs_invalidate_or_always(device: torch.device, remedy: str) -> None:
    run = Run(device, residual="float32", recheck="always" if remedy == "always" else "version")
    other = Run(device, capture=False)
    run.losses(5)
    other.losses(5)
    for each in (run, other):
        each.model.twice.weight.data.mul_(0.5)
    if remedy == "invalidate":
        run.manager.invalidate()
    assert run.losses(4) == other.losses(4)


def test_a_parameter_changed_within_the_step_is_copied_anew(device: torch.device) -> None:
    runs = [Run(device, residual="float32"), Run(device, capture=False)]
    for run in runs:
        plain = run.train

        def clamped(run=run, plain=plain):
            loss = plain()
            with torch.no_grad():
                run.model.twice.weight.clamp_(-0.05, 0.05)
            return loss

        run.step = run.manager.capture(clamped, residual="float32") if run is runs[0] else clamped
    assert runs[0].losses(8) == runs[1].losses(8)
    assert same_parameters(*runs)


def test_several_backward_passes_are_summed_in_float32(device: torch.device) -> None:
    runs = [Run(device, residual="float32"), Run(device, capture=False)]
    for run in runs:

        def accumulating(run=run):
            run.optimizer.zero_grad()
            for _ in range(3):
                loss = run.loss()
                run.scaler.scale(loss / 3).backward()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            return loss.detach()

        run.step = run.manager.capture(accumulating, residual="float32") if run is runs[0] else accumulating
    assert runs[0].losses(6) == runs[1].losses(6)
    assert same_parameters(*runs)


def test_explicit_unscale_and_clip_see_float32_gradients(device: torch.device) -> None:
    runs = [Run(device, residual="float32"), Run(device, capture=False)]
    seen: list[torch.dtype] = []
    for run in runs:

        def clipped(run=run):
            run.optimizer.zero_grad()
            loss = run.loss()
            run.scaler.scale(loss).backward()
            run.scaler.unscale_(run.optimizer)
            seen.extend(parameter.grad.dtype for parameter in run.model.parameters() if parameter.grad is not None)
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            return loss.detach()

        run.step = run.manager.capture(clipped, residual="float32") if run is runs[0] else clipped
    assert runs[0].losses(6) == runs[1].losses(6)
    assert set(seen) == {torch.float32}
    assert same_parameters(*runs)


def test_a_frozen_average_that_the_step_moves_is_followed(device: torch.device) -> None:
    runs = [Run(device, residual="float32"), Run(device, capture=False)]
    for run in runs:
        plain = run.train

        def averaging(run=run, plain=plain):
            loss = plain()
            with torch.no_grad():
                run.model.frozen.weight.lerp_(run.model.twice.weight, 0.5)
            return loss

        run.step = run.manager.capture(averaging, residual="float32") if run is runs[0] else averaging
    assert runs[0].losses(8) == runs[1].losses(8)
    assert same_parameters(*runs)
    assert [id(parameter) for parameter in runs[0].half._stale] == [id(runs[0].model.frozen.weight)]


def test_a_hook_before_the_step_sees_true_float32_gradients(device: torch.device) -> None:
    runs = [Run(device, residual="float32"), Run(device, capture=False)]
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for number, run in enumerate(runs):

        def look(optimizer, args, kwargs, run=run, number=number):
            seen[number].append(run.model.twice.weight.grad.clone())

        run.optimizer.register_step_pre_hook(look)
    assert runs[0].losses(5) == runs[1].losses(5)
    for mine, other in zip(seen[0], seen[1], strict=True):
        assert mine.dtype is torch.float32
        assert torch.equal(mine, other)
    assert same_parameters(*runs)


def test_a_backward_pass_after_the_step_is_an_error(device: torch.device) -> None:
    run = Run(device)

    def late():
        run.optimizer.zero_grad()
        loss = run.loss()
        run.scaler.scale(loss).backward(retain_graph=True)
        run.scaler.step(run.optimizer)
        run.scaler.scale(loss).backward()  # of weights that are gone

    run.step = run.manager.capture(late)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run.step()


@pytest.mark.parametrize("scaled", [True, False])
def test_an_optimizer_that_torch_steps_gets_float32_gradients(device: torch.device, scaled: bool) -> None:
    runs = [Run(device, residual="float32"), Run(device, capture=False)]
    for run in runs:
        run.optimizer = torch.optim.RMSprop(run.optimizer.param_groups[0]["params"], lr=1e-3)
        _, _, run.scaler = run.manager.setup_pytorch_training(run.model, run.optimizer)

        def unscaled(run=run):
            run.optimizer.zero_grad()
            loss = run.loss()
            loss.backward()
            run.optimizer.step()
            return loss.detach()

        step = run.train if scaled else unscaled
        run.step = run.manager.capture(step, residual="float32") if run is runs[0] else step
    assert runs[0].losses(6) == runs[1].losses(6)
    assert same_parameters(*runs)


def test_gradients_that_no_step_used_stay_the_users(device: torch.device) -> None:
    run = Run(device, residual="float32")

    def backward_only():
        run.scaler.scale(run.loss()).backward()

    accumulate = run.manager.capture(backward_only, residual="float32")
    reference = Run(device, capture=False)
    for _ in range(3):
        accumulate()
        reference.scaler.scale(reference.loss()).backward()
    for mine, other in zip(run.model.parameters(), reference.model.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)
    for each in (run, reference):
        each.scaler.step(each.optimizer)
        each.scaler.update()
    assert same_parameters(run, reference)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_compute_on_copies_too(device: torch.device, reentrant: bool) -> None:
    class Checkpointed(Model):
        def forward(self, words: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(words) + self.position
            hidden = torch.utils.checkpoint.checkpoint(self.block, hidden, use_reentrant=reentrant)
            hidden = self.frozen(self.twice(torch.relu(self.twice(hidden))))
            return nn.functional.linear(self.norm(hidden), self.embedding.weight)

    torch.manual_seed(0)
    checkpointed = Run(device, Checkpointed())
    torch.manual_seed(0)
    plain = Run(device, Model())
    assert checkpointed.losses(8) == pytest.approx(plain.losses(8), rel=2e-2)


def test_what_has_no_copy_and_why(device: torch.device) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hooked = nn.Linear(4, 4)
            self.hooked.weight.register_hook(lambda grad: grad)
            self.lstm = nn.LSTM(4, 4)
            self.batch_norm = nn.BatchNorm1d(4)
            self.sparse = nn.Embedding(3, 4, sparse=True)
            self.double = nn.Linear(4, 4).double()
            self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.batch_norm(self.lstm(self.parametrized(self.hooked(x)))[0])

    run = Run(device, Odd())
    kept = run.half.kept
    reasons = {
        "hooked.weight": "a hook reads its gradient",
        "lstm.weight_ih_l0": "LSTM keeps its weights in one buffer",
        "batch_norm.weight": "weights of norms stay float32",
        "sparse.weight": "sparse gradients and max_norm need the parameter itself",
        "double.weight": f"it is torch.float64 on {next(run.model.parameters()).device}",
        "parametrized.parametrizations.weight.original0": "it is parametrized",
    }
    for name, reason in reasons.items():
        assert kept[name] == reason
        assert reason in run.step.explain()
    assert "hooked.bias" not in kept


def test_a_wrapped_model_is_reduced_in_float32() -> None:
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:  # without a process group
            nn.Module.__init__(self)
            self.module = module

        def forward(self, *args):
            return self.module(*args)

    run = Run(torch.device("cpu"), Wrapped(Model()))
    assert run.half.copies == {}
    assert "DistributedDataParallel reads its gradient" in run.step.explain()


def test_without_autocast_the_weights_are_float32(device: torch.device) -> None:
    run = Run(device)
    seen: list[torch.dtype] = []
    run.model.twice.register_forward_pre_hook(lambda module, args: None)
    forward = type(run.model.twice).forward

    def looking(x: torch.Tensor) -> torch.Tensor:
        seen.append(run.model.twice.weight.dtype)
        return forward(run.model.twice, x)

    run.model.twice.forward = looking

    def step():
        with torch.no_grad():
            run.model(run.words)
        return run.train()

    run.step = run.manager.capture(step)
    run.losses(2)
    assert seen[:4] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert run.model.twice.forward is looking


def test_an_exception_in_the_step_leaves_nothing_behind(device: torch.device) -> None:
    run = Run(device)
    run.losses(2)
    fail = [True]
    train = run.train

    def failing():
        run.optimizer.zero_grad()
        loss = run.loss()
        if fail[0]:
            run.scaler.scale(loss).backward()
            raise ZeroDivisionError("in the step")
        return train()

    run.step = run.manager.capture(failing)
    with pytest.raises(ZeroDivisionError, match="in the step"):
        run.losses(1)
    assert "forward" not in vars(run.model.twice)
    assert all(parameter.grad_dtype is torch.float32 for parameter in run.model.parameters())
    assert type(run.model.twice.weight) is nn.Parameter
    fail[0] = False
    assert run.losses(3)[-1] > 0


@pytest.mark.parametrize("how", ["compile(model)", "model.compile()", "compiled block"])
def test_compiled_models_compute_on_copies_in_one_graph(device: torch.device, how: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    run = Run(device, residual="float32")
    plain = Run(device, capture=False)
    if how == "compile(model)":
        compiled = torch.compile(run.model, backend=counter, fullgraph=True)
        model = run.model

        def loss():
            with run.manager.autocast_context():
                return nn.functional.cross_entropy(compiled(run.words).flatten(0, 1).float(), run.targets.flatten())

        run.loss = loss
        assert run.model is model
    elif how == "model.compile()":
        run.model.compile(backend=counter, fullgraph=True)
    else:
        run.model.block.compile(backend=counter, fullgraph=True)
    assert run.losses(6) == pytest.approx(plain.losses(6), rel=1e-2)
    assert counter.frame_count == 1
    assert copies_match(run)
    assert run.model.block.linear1.weight in run.half.gradients


class Stream(nn.Module):
    """A residual stream that norms carry on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear, self.head = (
            nn.Embedding(WORDS, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WORDS),
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(words)
        self.stream = self.norm(hidden + self.linear(hidden))
        return self.head(self.stream)


def test_norms_pass_a_float32_residual_on_in_float32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "_FASTER_ON_CPU", (nn.Module,))
    run = Run(device, Stream(), residual="float32")
    run.step()
    assert run.model.stream.dtype is torch.float32
    run.train()
    assert run.model.stream.dtype is torch.bfloat16, "outside of the step the rule of the policy stands"
