"""Half copies of weights where a step does more than forward, backward and step: it must still give autocast's bits.

Closures, modules that leave autocast, weights that forward writes, penalties, models that share parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from halfstep import MixedPrecisionConfig, MixedPrecisionManager
from halfstep.half_tensor import AUTOCAST_OFF, WRITTEN
from halfstep.step_capture import Recorder
from test_half_weights import WIDTH, WORDS, Run, copies_match, same_parameters
from torch import nn
from torch.nn.functional import linear

KIND = "cuda" if torch.cuda.is_available() else "cpu"  # of decorators, which know no device


class Net(nn.Module):
    """A layer of interest between an embedding and a head. The embedding's hook keeps it float32."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.embedding.weight.register_hook(lambda grad: grad)
        self.middle = middle
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.middle(self.embedding(words))))


def pair(
    device: torch.device, middle: Callable[[], nn.Module] | None = None, prepare: Callable[[Run], None] | None = None
) -> tuple[Run, Run]:
    """Return the same training on half copies and as the plain loop."""
    runs = []
    for capture in (True, False):
        torch.manual_seed(0)
        run = Run(device, None if middle is None else Net(middle()), capture=False)
        if prepare is not None:
            prepare(run)
        residual = "float32" if middle is None else "half"  # which gives subclasses of layers copies too
        run.step = run.manager.capture(run.train, residual=residual) if capture else run.train
        runs.append(run)
    return runs[0], runs[1]


def assert_alike(half: Run, plain: Run, steps: int = 6) -> None:
    assert half.losses(steps) == plain.losses(steps)
    assert same_parameters(half, plain)
    assert copies_match(half)


# ------------------------------------------------------------------------------------------------------------ closures


def with_closure(run: Run, *, scaled: bool = False) -> None:
    def closure() -> torch.Tensor:
        run.optimizer.zero_grad()
        loss = run.loss()
        loss.backward()
        return loss

    def train() -> torch.Tensor:
        if scaled:
            run.scaler.scale(closure())
            loss = run.scaler.step(run.optimizer, closure)
            run.scaler.update()
        else:
            loss = run.optimizer.step(closure)
        return loss.detach()

    run.train = train


@pytest.mark.parametrize("scaled", [True, False])
def test_an_optimizer_may_call_a_closure(device: torch.device, scaled: bool) -> None:
    half, plain = pair(device, prepare=lambda run: with_closure(run, scaled=scaled))
    assert half.losses(6) == plain.losses(6)
    assert same_parameters(half, plain)


def test_lbfgs_moves_the_weights_between_the_calls_of_its_closure(device: torch.device) -> None:
    def prepare(run: Run) -> None:
        run.optimizer = torch.optim.LBFGS(run.optimizer.param_groups[0]["params"], lr=0.1, max_iter=5)
        run.manager.setup_pytorch_training(run.model, run.optimizer)
        with_closure(run)

    half, plain = pair(device, prepare=prepare)
    first, second = half.losses(4), plain.losses(4)
    assert first == second
    assert first[-1] < first[0]
    assert same_parameters(half, plain)


def test_a_step_with_a_closure_is_not_captured(device: torch.device) -> None:
    half, _ = pair(device, prepare=with_closure)
    recorder = Recorder({}, [half.half])
    with recorder.recording():
        half.train()
    assert recorder.reason == "AdamW is stepped with a closure"
    half.losses(5)
    assert half.step.captures == 0
    assert "runs as it is: " in half.step.explain()


def test_weights_that_another_optimizer_moved_are_used_in_the_same_step(device: torch.device) -> None:
    def prepare(run: Run) -> None:
        other = torch.optim.RMSprop([run.model.twice.weight], lr=1e-2)

        def train() -> torch.Tensor:
            run.optimizer.zero_grad()
            run.loss().backward()
            other.step()
            run.optimizer.zero_grad()
            loss = run.loss()
            run.scaler.scale(loss).backward()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            return loss.detach()

        run.train = train

    half, plain = pair(device, prepare=prepare)
    assert half.losses(5) == plain.losses(5)
    assert same_parameters(half, plain)


# -------------------------------------------------------------------------------------------------------- autocast off


class Inside(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.float(), self.weight, self.bias)


class Rounded(nn.Linear):
    """No dtype error tells of the half weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.float(), self.weight.float(), self.bias.float())


class Decorated(nn.Linear):
    @torch.autocast(KIND, enabled=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x.float(), self.weight, self.bias)


def in_float32(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("bli,oi->blo", x.float(), weights[0]) + weights[1]


class Passed(nn.Linear):
    """The weight is read where autocast is on, and used where it is off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return in_float32(x, [self.weight, self.bias])


class Child(nn.Module):
    """A module within the region; it uses the same weight in half as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.weight(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.weight(x.float())


def linear_of_width(kind: type[nn.Linear]) -> Callable[[], nn.Module]:
    return lambda: kind(WIDTH, WIDTH)


@pytest.mark.parametrize("kind", [Inside, Rounded, Decorated, Passed])
def test_where_autocast_is_off_the_weight_is_float32(device: torch.device, kind: type[nn.Linear]) -> None:
    if kind is Decorated and device.type != KIND:
        device = torch.device(KIND)
    half, plain = pair(device, linear_of_width(kind))
    assert_alike(half, plain)
    assert half.half.kept["middle.weight"] == half.half.kept["middle.bias"] == AUTOCAST_OFF
    assert f"middle.weight, middle.bias: {AUTOCAST_OFF}" in half.step.explain()
    assert "started anew: a parameter has no half copy any more" in half.step.explain()
    assert half.model.head.weight in half.half.copies
    assert half.half.generation == 1


def test_a_module_called_where_autocast_is_off_has_float32_weights(device: torch.device) -> None:
    half, plain = pair(device, Child)
    assert half.losses(6) == pytest.approx(plain.losses(6), rel=1e-3)  # autocast's sum of both gradients is float32
    assert half.model.middle.weight.weight in half.half.copies  # autocast is on, or off, for all of its own forward


def test_a_function_of_torch_amp_that_casts_its_inputs_gets_the_float32_weight(device: torch.device) -> None:
    seen: list[torch.Tensor] = []

    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type=device.type, cast_inputs=torch.float32)
        def forward(ctx, x, weight):
            seen.append(weight.detach().clone())
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

        @staticmethod
        @torch.amp.custom_bwd(device_type=device.type)
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad @ weight, grad.flatten(0, 1).t() @ x.flatten(0, 1)

    class Custom(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Product.apply(x, self.weight)

    half, plain = pair(device, linear_of_width(Custom))
    before = half.model.middle.weight.detach().clone()
    # The gradient of the first step was rounded once; after it the weight has no half copy.
    assert half.losses(6) == pytest.approx(plain.losses(6), rel=1e-3)
    assert torch.equal(seen[0], before)
    assert half.half.kept["middle.weight"] == AUTOCAST_OFF


@pytest.mark.parametrize("kind", [Inside, Rounded])
@pytest.mark.parametrize("how", ["compile(model)", "model.compile()", "compiled layer"])
def test_compiled_modules_see_float32_weights_too(device: torch.device, how: str, kind: type[nn.Linear]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def compiled(run: Run) -> None:
        if how == "model.compile()":
            run.model.compile(backend=counter, fullgraph=True)
        elif how == "compiled layer":
            run.model.middle.compile(backend=counter, fullgraph=True)
        else:
            model = torch.compile(run.model, backend=counter, fullgraph=True)
            run.loss = lambda: loss_of(run, model)

    half, plain = pair(device, linear_of_width(kind))
    compiled(half)
    assert_alike(half, plain)
    assert half.half.kept["middle.weight"] == AUTOCAST_OFF
    assert half.model.head.weight in half.half.copies
    assert counter.frame_count == 1  # the first step of all ran as it is


def loss_of(run: Run, model: Callable[..., torch.Tensor]) -> torch.Tensor:
    with run.manager.autocast_context():
        return nn.functional.cross_entropy(model(run.words).flatten(0, 1).float(), run.targets.flatten())


def test_a_region_without_weights_keeps_a_compiled_module_half(device: torch.device) -> None:
    class Rotary(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(x.device.type, enabled=False):
                angle = torch.cos(x.float())
            return super().forward(x * angle)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    half, plain = pair(device, linear_of_width(Rotary))
    half.model.compile(backend=counter, fullgraph=True)
    assert_alike(half, plain)
    assert half.model.middle.weight in half.half.copies
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_function_takes_half_weights(device: torch.device, backend: str) -> None:
    torch._dynamo.reset()
    product = torch.compile(lambda x, weight, bias: x @ weight.t() + bias, backend=backend, fullgraph=True)

    class Calls(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return product(x, self.weight, self.bias)

    half, plain = pair(device, linear_of_width(Calls))
    assert half.losses(6) == pytest.approx(plain.losses(6), rel=1e-3)
    assert half.model.middle.weight in half.half.copies


# -------------------------------------------------------------------------------------------------- writes in forward


def scale_data(weight: torch.Tensor) -> None:
    weight.data.mul_(0.9)


def copy_to_data(weight: torch.Tensor) -> None:
    weight.data.copy_(weight.data * 0.9)


def assign_data(weight: torch.Tensor) -> None:
    weight.data = weight.data * 0.9


@torch.no_grad()
def scale(weight: torch.Tensor) -> None:
    weight.mul_(0.9)


@torch.no_grad()
def scale_out(weight: torch.Tensor) -> None:
    torch.mul(weight, 0.9, out=weight)


@torch.no_grad()
def set_items(weight: torch.Tensor) -> None:
    weight[:2] = 0.01


@torch.no_grad()
def augmented(weight: torch.Tensor) -> None:
    weight *= 0.9


def through_detach(weight: torch.Tensor) -> None:
    weight.detach().view(-1).mul_(0.9)


@torch.no_grad()
def foreach(weight: torch.Tensor) -> None:
    torch._foreach_mul_([weight], 0.9)


@torch.no_grad()
def fill(weight: torch.Tensor) -> None:
    nn.init.constant_(weight, 0.01)


WRITES = [scale_data, copy_to_data, assign_data, through_detach]
WRITES += [scale, scale_out, set_items, augmented, foreach, fill]


@pytest.mark.parametrize("write", WRITES)
def test_a_weight_that_forward_writes_is_not_lost(device: torch.device, write: Callable) -> None:
    class Writes(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            write(self.weight)
            return super().forward(x)

    half, plain = pair(device, linear_of_width(Writes))
    assert_alike(half, plain)
    assert half.half.kept["middle.weight"] == WRITTEN
    assert half.model.middle.bias in half.half.copies


def test_a_buffer_may_follow_a_weight_in_forward(device: torch.device) -> None:
    class Follows(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.register_buffer("average", torch.zeros(sizes[1], sizes[0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.average.lerp_(self.weight, 0.1)
            return super().forward(x)

    half, plain = pair(device, linear_of_width(Follows))
    assert_alike(half, plain)
    assert torch.equal(half.model.middle.average, plain.model.middle.average)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_write_through_a_view_is_refused_and_then_works(device: torch.device, order: str) -> None:
    class Views(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = super().forward(x) if order == "after" else None
            with torch.no_grad():
                self.weight[0].mul_(0.9)
            return super().forward(x) if result is None else result

    half, plain = pair(device, linear_of_width(Views))
    with pytest.raises(RuntimeError, match=r"middle\.weight was written within forward, through a view"):
        half.step()
    assert_alike(half, plain)
    assert half.half.kept["middle.weight"] == WRITTEN


def test_a_write_in_compiled_code_is_not_lost(device: torch.device) -> None:
    class Writes(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.mul_(0.9)
            return super().forward(x)

    torch._dynamo.reset()
    half, plain = pair(device, linear_of_width(Writes))
    half.model.compile(backend="eager")
    assert_alike(half, plain)  # the first step ran as it is
    assert half.half.kept["middle.weight"] == WRITTEN


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("compiled", [True, False])
def test_weights_made_by_hooks_before_forward_are_made_in_float32(
    device: torch.device, norm: Callable, compiled: bool
) -> None:
    torch._dynamo.reset()
    half, plain = pair(device, lambda: norm(nn.Linear(WIDTH, WIDTH)))
    if compiled:
        half.model.compile(backend="eager")
    assert_alike(half, plain)
    names = ["middle.weight_orig"] if norm is nn.utils.spectral_norm else ["middle.weight_g", "middle.weight_v"]
    assert {half.half.kept[name] for name in names} == {"it is parametrized"}


# ----------------------------------------------------------------------------------------------------------- penalties


@pytest.mark.parametrize("first", ["penalty", "loss"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_float32_gradient_is_added_unrounded(device: torch.device, first: str, passes: int) -> None:
    """In one backward pass or in one of its own, before the half gradient or after it."""

    # Its gradient is 1, to which half precision cannot add 2^-12.
    run = Run(device, nn.Sequential(nn.Linear(1, 1, bias=False)), capture=False)
    weight, x = run.model[0].weight, torch.ones(1, 1, device=device)

    def penalty() -> torch.Tensor:
        return weight.sum() * 2**-12

    def output() -> torch.Tensor:
        with run.manager.autocast_context():
            return run.model(x).float().sum()

    def train() -> None:
        run.optimizer.zero_grad()
        makers = [penalty, output] if first == "penalty" else [output, penalty]
        losses = [make() for make in makers]  # autograd runs the node that was made last first
        if passes == 1:
            losses = [losses[0] + losses[1]]
        for loss in losses:
            loss.backward()

    step = run.manager.capture(train, residual="float32")
    for _ in range(2):
        step()
        assert weight.grad.dtype is torch.float32
        assert weight.grad.item() == 1 + 2**-12
        assert step.gradients()["0.weight"].item() == 1 + 2**-12


def test_the_gradient_is_the_one_that_autograd_made(device: torch.device) -> None:
    """Holding it until it has arrived must not make torch copy it."""
    half, _ = pair(device, linear_of_width(nn.Linear))
    seen: list[int] = []
    arrived = half.half._arrived

    def looking(parameter: nn.Parameter, grad: torch.Tensor) -> None:
        seen.extend([grad.data_ptr()] if parameter is half.model.middle.weight else [])
        arrived(parameter, grad)

    half.half._arrived = looking
    half.losses(1)
    assert seen == [half.half.gradients[half.model.middle.weight].data_ptr()]


@pytest.mark.parametrize("create_graph", [True, False])
def test_gradients_asked_for_are_float32(device: torch.device, create_graph: bool) -> None:
    seen: dict[Run, list[torch.Tensor]] = {}

    def prepare(run: Run) -> None:
        parameters = [each for each in run.model.parameters() if each.requires_grad]

        def train() -> torch.Tensor:
            run.optimizer.zero_grad()
            loss = run.loss()
            grads = torch.autograd.grad(loss, parameters, create_graph=create_graph, retain_graph=True)
            seen.setdefault(run, []).extend(grad.detach().clone() for grad in grads)
            if create_graph:
                loss = loss + 0.1 * sum(grad.pow(2).sum() for grad in grads)
            run.scaler.scale(loss).backward()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            return loss.detach()

        run.train = train

    half, plain = pair(device, linear_of_width(nn.Linear), prepare)
    first, second = half.losses(4), plain.losses(4)
    assert first == pytest.approx(second, rel=1e-3)
    for mine, other in zip(seen[half], seen[plain], strict=True):
        assert mine.dtype is torch.float32
        torch.testing.assert_close(mine, other, rtol=0.05, atol=1e-3)


# --------------------------------------------------------------------------------- frozen, evaluated, shared, several


def test_evaluation_within_the_step(device: torch.device) -> None:
    """In eval mode and without gradients the weights are the ones of now as well."""

    def prepare(run: Run) -> None:
        train = run.train

        def evaluating() -> torch.Tensor:
            loss = train()
            run.model.eval()
            with torch.no_grad():
                after = run.loss()
            run.model.train()
            return torch.stack([loss, after])

        run.train = evaluating

    half, plain = pair(device, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)), prepare)
    seen = []
    for run in (half, plain):
        torch.manual_seed(1)
        seen.append([run.step().tolist() for _ in range(5)])
    assert seen[0] == seen[1]
    assert same_parameters(half, plain)


def test_a_model_in_eval_mode_trains(device: torch.device) -> None:
    half, plain = pair(device, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)))
    for run in (half, plain):
        run.model.eval()
    assert_alike(half, plain)


def test_gradients_follow_freezing(device: torch.device) -> None:
    half, plain = pair(device, linear_of_width(nn.Linear))
    for trained, steps in itertools.product((True, False), (4, 4)):
        for run in (half, plain):
            run.model.middle.weight.requires_grad_(trained)
            if not trained:
                run.model.middle.weight.grad = None
        assert_alike(half, plain, steps)
        mine = half.step.gradients()
        assert ("middle.weight" in mine) == trained
        for name, parameter in plain.model.named_parameters():
            if parameter.grad is not None:
                assert torch.equal(mine[name], parameter.grad)


class Shared:
    """Two models with one encoder, trained in turn by steps of their own, or both in one."""

    def __init__(self, device: torch.device, *, capture: bool, together: bool) -> None:
        torch.manual_seed(0)
        encoder = nn.Linear(WIDTH, WIDTH)
        self.models = [nn.Sequential(encoder, nn.ReLU(), nn.Linear(WIDTH, 1)).to(device) for _ in range(2)]
        self.x = torch.randn(16, WIDTH, device=device)
        manager = MixedPrecisionManager(config=MixedPrecisionConfig(precision_policy="mixed_bfloat16"))
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in self.models]
        for model, optimizer in zip(self.models, optimizers, strict=True):
            _, _, scaler = manager.setup_pytorch_training(model, optimizer)

        def train(*numbers: int) -> torch.Tensor:
            for i in numbers:
                optimizers[i].zero_grad()
            with manager.autocast_context():
                loss = sum((self.models[i](self.x).float() - i).pow(2).mean() for i in numbers)
            scaler.scale(loss).backward()
            for i in numbers:
                scaler.step(optimizers[i])
            scaler.update()
            return loss.detach()

        steps = [lambda: train(0, 1)] if together else [lambda: train(0), lambda: train(1)]
        self.steps = [manager.capture(step, residual="float32") for step in steps] if capture else steps

    def losses(self, rounds: int) -> list[float]:
        return [step().item() for _ in range(rounds) for step in self.steps]


@pytest.mark.parametrize("together", [True, False])
def test_models_that_share_parameters(device: torch.device, together: bool) -> None:
    half, plain = (Shared(device, capture=capture, together=together) for capture in (True, False))
    first, second = half.losses(6), plain.losses(6)
    # Together autocast adds both gradients of the encoder to its one cast, in half, where ours do so in float32.
    assert first == (pytest.approx(second, rel=1e-2) if together else second)
    named = {name for step in half.steps for name in step.gradients()}
    assert named == {"0.weight", "0.bias", "2.weight", "2.bias"}
    if not together:
        for mine, other in zip(half.models, plain.models, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))


def test_a_shared_parameter_is_read_as_it_is_by_the_model_that_trains_alone(device: torch.device) -> None:
    half = Shared(device, capture=True, together=False)
    half.losses(3)
    encoder = half.models[0][0].weight
    copies = [weights.copies[encoder] for weights in half.steps[0]._half]
    assert len({id(each) for each in copies}) == 2  # the optimizer writes one of them
    assert [encoder in weights._stale for weights in half.steps[0]._half] == [True, False]
