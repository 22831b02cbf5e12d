"""MixedPrecisionManager: one object that configures mixed precision for a framework."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from halfstep.config import MixedPrecisionConfig, check_bool, check_choice
from halfstep.statistics import MixedPrecisionStatistics

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from halfstep.policy import CustomPrecisionPolicy, PrecisionPlan, PrecisionPolicy
    from halfstep.sklearn_optimizer import SklearnPrecisionOptimizer
    from halfstep.step_graph import StepGraph

# "auto" takes the first of these whose module can be found.
_MODULES = {"pytorch": "torch", "tensorflow": "tensorflow", "sklearn": "sklearn"}
FRAMEWORKS = ("auto", *_MODULES)
_DEFAULT_POLICY = "mixed_float16"
_DEFAULT_SCALE = 2**15


class MixedPrecisionManager:
    """Mixed precision for a training loop, or smaller dtypes for data that scikit-learn is to learn from.

    framework: "pytorch", "tensorflow", "sklearn", or "auto" for the installed one, in this order if there are several.
        Under "tensorflow" see setup_tensorflow_policy(), wrap_optimizer() and docs/tensorflow.md. Under "sklearn" only
        optimize_data_precision(), optimizer and the statistics are of use: see SklearnPrecisionOptimizer.
    precision_policy: "mixed_float16", "mixed_bfloat16" or "float32".
    enable_loss_scaling: scale the loss (mixed_float16).
    initial_loss_scale: first scale, > 0.
    enable_monitoring: collect statistics. With PyTorch, under a mixed policy, this runs the model in float32 too, on a
        copy, in the second training call and then so rarely that it takes at most 1 % of the time
        (docs/statistics.md). On a GPU such a run raises the peak of the memory. With TensorFlow one batch is kept, and
        copies of the model run when the statistics are asked for.
    config: a MixedPrecisionConfig instead of precision_policy and initial_loss_scale. With one, gradients are clipped
        to its gradient_clipping_threshold in scaler.step(), with TensorFlow by the optimizer of wrap_optimizer();
        without one nothing is, unless update_config() sets the threshold.
    custom_policy: a precision for each layer, and with a CustomPrecisionPolicy whose get_loss_scale_factor is
        overridden the loss scale too: an instance of a subclass of CustomPrecisionPolicy, or a PrecisionPolicy. What it
        leaves to half precision runs in that of precision_policy; under "float32" it is not asked. With TensorFlow
        apply_policy(model) asks it, and for no loss scale.

        manager = MixedPrecisionManager(framework="pytorch")
        model, optimizer, scaler = manager.setup_pytorch_training(model, optimizer)
        with manager.autocast_context():
            loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    """

    def __init__(
        self,
        framework: str = "auto",
        precision_policy: str = _DEFAULT_POLICY,
        enable_loss_scaling: bool = True,
        initial_loss_scale: float = _DEFAULT_SCALE,
        enable_monitoring: bool = True,
        *,
        config: MixedPrecisionConfig | None = None,
        custom_policy: CustomPrecisionPolicy | PrecisionPolicy | None = None,
    ) -> None:
        check_choice(*FRAMEWORKS)("framework", framework)
        check_bool("enable_loss_scaling", enable_loss_scaling)
        check_bool("enable_monitoring", enable_monitoring)
        if config is None:
            settings = _config_of(precision_policy, initial_loss_scale)
        else:
            if not isinstance(config, MixedPrecisionConfig):
                raise TypeError(f"config is {type(config).__name__}, expected MixedPrecisionConfig")
            if (precision_policy, initial_loss_scale) != (_DEFAULT_POLICY, _DEFAULT_SCALE):
                raise ValueError("got config together with precision_policy or initial_loss_scale; set them in config")
            settings = dataclasses.replace(config)
        framework = _installed(framework)
        if framework == "sklearn":
            if custom_policy is not None:
                raise ValueError("custom_policy is for 'pytorch' and 'tensorflow': scikit-learn has no layers")
            from halfstep.sklearn_manager import SklearnManager

            self._manager: Any = SklearnManager(settings)
            return
        # Imported here: only the framework in use may be loaded.
        if framework == "tensorflow":
            from halfstep.tensorflow_manager import TensorFlowManager as Manager
        else:
            from halfstep.pytorch import PyTorchManager as Manager
        self._manager = Manager(
            settings, enable_loss_scaling, enable_monitoring, clip=config is not None, custom_policy=custom_policy
        )

    @property
    def framework(self) -> str:
        """The framework in use."""
        return self._manager.framework

    @property
    def config(self) -> MixedPrecisionConfig:
        """A copy of the settings, as last set; change them with update_config()."""
        return dataclasses.replace(self._manager.config)

    def setup_pytorch_training(
        self, model: Any, optimizer: Any, use_custom_policy: bool | None = None
    ) -> tuple[Any, Any, Any]:
        """Return (model, optimizer, scaler): the two objects that came in, and the GradScaler for their loop.

        use_custom_policy: apply the manager's custom_policy to this model; by default if it has one. The policy is
        asked once per layer, here; precision_plan(model) says what came out.
        Under a mixed policy the model's LayerNorm, RMSNorm and GroupNorm modules get another `forward`
        (MixedPrecisionConfig.half_reductions), and so do the layers that a custom policy runs in another precision than
        autocast; parameters, buffers, state_dict and classes stay as they are. With enable_monitoring the model itself
        has one too, which hears of its calls.
        """
        return model, optimizer, self._manager.setup(model, optimizer, use_custom_policy)

    def precision_plan(self, model: Any) -> PrecisionPlan | None:
        """Return the plan that was applied to this model, None without one.

        Plans are applied by setup_pytorch_training() of a manager with a custom policy, and by apply_policy().
        """
        return self._manager.plan_of(model)

    def remove_policy(self, model: Any) -> None:
        """Give the model its own `forward` methods back, as they were before setup_pytorch_training().

        For torch.jit.script, and for a pickle of the whole model that is to be read without halfstep. TypeError if
        `model` is no torch.nn.Module; one that was never set up stays as it is. With TensorFlow the layers get back
        the precisions from before apply_policy().
        """
        self._manager.remove_policy(model)

    @property
    def optimizer(self) -> SklearnPrecisionOptimizer:
        """The SklearnPrecisionOptimizer of framework="sklearn": its report(), plan() and explain()."""
        return self._manager.optimizer

    def optimize_data_precision(self, X: Any, y: Any = None) -> tuple[Any, Any]:
        """Return (X, y) with smaller dtypes, under framework="sklearn"."""
        return self._manager.optimize_data_precision(X, y)

    def autocast_context(self) -> Any:
        """Return a context manager for the forward pass. Contexts nest, and each drops its weight casts at its end.

        With TensorFlow, whose layers take their precision when they are made, it is policy_context().
        """
        return self._manager.autocast_context()

    def setup_tensorflow_policy(self) -> None:
        """Make precision_policy the global dtype policy of Keras, and let this manager see what keras.Model.fit trains.

        Layers that are made from now on compute in it. Until restore_tensorflow_policy(), `keras.Model.fit` is wrapped:
        each call has a LossScaleCallback first among its callbacks, and with enable_monitoring a weak reference to the
        model and a copy of one batch on the host are kept for the statistics. What fit computes, returns and raises
        stays as it was. One manager is in force in a process: the latest to call this. Without a GPU float16 is slow
        in TensorFlow; a warning says so once.
        """
        self._tensorflow("setup_tensorflow_policy")()

    def restore_tensorflow_policy(self) -> None:
        """Put back the global dtype policy of Keras and `keras.Model.fit` as they were before the first setup.

        Nothing happens if this manager is not in force: before its setup, or after that of another manager, which has
        taken over what there is to put back.
        """
        self._tensorflow("restore_tensorflow_policy")()

    def policy_context(self) -> AbstractContextManager[None]:
        """Return a context in which layers of Keras are made under precision_policy. Contexts nest.

        At its end, by an exception too, Keras has the global policy of its beginning. fit is not wrapped by it.
        """
        return self._tensorflow("policy_context")()

    def wrap_optimizer(self, optimizer: Any) -> Any:
        """Return the optimizer for model.compile(): one that scales the loss where float16 needs that.

        optimizer: what keras.optimizers.get takes. Under "mixed_float16" with loss scaling (and for a model to which
            apply_policy() gave float16 layers) it comes back inside a halfstep.tensorflow.LossScaleOptimizer, which
            has the scale, the interval and the factors of the configuration. Of Keras' own LossScaleOptimizer the
            inner optimizer, the initial scale, the interval and, if it is built, the running scale are taken over;
            halfstep's comes back as it is. Otherwise the optimizer itself comes back.

        If the manager clips (see config), the inner optimizer's global_clipnorm is set. ValueError if it clips already,
        since Keras clips in one way alone.
        """
        return self._tensorflow("wrap_optimizer")(optimizer)

    def watch(self, model: Any, x: Any, y: Any = None, sample_weight: Any = None) -> None:
        """Keep a weak reference to a Keras model and a copy of this batch, for the statistics.

        For training that does not go through keras.Model.fit, or whose data fit does not let us see (notes say so).
        x, y, sample_weight: arrays or tensors, also in tuples, lists and dicts, as the model takes them; all of their
        rows are the batch. Nothing is kept with enable_monitoring=False.
        """
        self._tensorflow("watch")(model, x, y, sample_weight)

    def apply_policy(self, model: Any) -> Any:
        """Give the layers of a Keras model the precisions of the manager's custom_policy; return the plan.

        Call it before wrap_optimizer() and compile(). ValueError without a custom_policy.
        """
        return self._tensorflow("apply_policy")(model)

    def _tensorflow(self, name: str) -> Callable[..., Any]:
        """Return a method that only the TensorFlow manager has."""
        if self.framework != "tensorflow":
            raise AttributeError(
                f"this manager's framework is {self.framework!r}, which has no {name}: framework='tensorflow' has"
            )
        return getattr(self._manager, name)

    def capture(
        self,
        step: Callable[..., Any],
        example: tuple[Any, ...] | None = None,
        *,
        residual: str = "half",
        half_weights: bool = True,
        recheck: str = "version",
        warmup: int = 3,
        max_graphs: int = 8,
        copy_outputs: bool = True,
    ) -> StepGraph:
        """Return a training step that runs as one CUDA graph on half copies of the weights.

            def train_step(x, y):
                optimizer.zero_grad()
                with manager.autocast_context():
                    loss = criterion(model(x), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                return loss

            train_step = manager.capture(train_step)
            for x, y in loader:
                loss = train_step(x.cuda(), y.cuda())
                scheduler.step()

        step: trains one step on its arguments (tensors on the model's GPU, also in tuples, lists, dicts and
            other mutable mappings, and constants). A number that changes from call to call must be a tensor: each value
            of a constant is a capture of its own. It zeroes its gradients. What must run on the host each time belongs
            outside.
        example: arguments of one call. Nothing is trained on them; explain() then says whether they can be captured.
        residual: "half" computes everything but norms on half parameters, embeddings and with them the residual stream
            too; "float32" only torch's own linear and convolution layers, attention and recurrent cells, not those of
            subclasses, which changes no result of autocast. In float16 parameters outside of these layers stay float32
            if one of their values would become infinite, or if most that are not 0 are below 2^-14, the smallest normal
            number; this is looked at when the copies are made, not in each step.
        half_weights: False leaves the casts of weights to autocast.
        recheck: before each replay half copies of changed parameters are refreshed. "version" sees what torch counts:
            all in-place operations, but not those on `parameter.data`; after these call invalidate(). "always" copies
            all parameters in every step.
        warmup: calls with arguments of one shape before they are captured, at least 2.
        max_graphs: how many shapes are captured; others run as they are.
        copy_outputs: False returns the capture's own results, which the next call overwrites.

        A parameter that a module's forward uses where autocast is off, writes to, or does something with that fails
        in half, is float32 there at once and has no half copy from the next step on; explain() names it, and captures
        are made anew. If what fails got only results of half parameters, the forward of that module is called a second
        time, once. A compiled module runs without its compiler in its first call in each mode, to find all this out. A
        write within forward to a view of a weight (`self.weight[0].mul_(2)`) raises RuntimeError once. Not noticed
        are, in forward: a write by an extension that torch does not dispatch; a view of a weight that was made under
        autocast and is then read where it is off; and what a compiled module does only after its first call, such as
        leaving autocast. half_weights=False is for these.

        Within the step `.grad` is half after a single backward pass, and a norm of it is too. To clip, pass max_norm to
        scaler.step(), or call scaler.unscale_(optimizer) before torch.nn.utils.clip_grad_norm_, in bfloat16 also:
        it makes the gradients float32.

        Call setup_pytorch_training first. See StepGraph for what a capture follows, and its explain(), memory() and
        gradients(). On a CPU the step runs as it is, on half copies all the same.
        """
        if not isinstance(warmup, int):  # 2.0 is none
            raise TypeError(f"warmup is {warmup!r}, expected an integer >= 2")
        return self._manager.capture(
            step,
            example,
            residual=residual,
            half_weights=half_weights,
            recheck=recheck,
            warmup=warmup,
            max_graphs=max_graphs,
            copy_outputs=copy_outputs,
        )

    def invalidate(self) -> None:
        """Copy all half weights anew, after parameters were changed through `.data` (see capture)."""
        self._manager.invalidate()

    def update_config(self, **changes: Any) -> None:
        """Change settings by the names of MixedPrecisionConfig's fields (autocast_enabled is enable_autocast).

        loss_scale sets the running scale. All names and values are checked before any takes effect.
        """
        if "autocast_enabled" in changes:
            if "enable_autocast" in changes:
                raise ValueError("got both autocast_enabled and enable_autocast, which are one setting")
            changes["enable_autocast"] = changes.pop("autocast_enabled")
        fields = {field.name for field in dataclasses.fields(MixedPrecisionConfig)}
        unknown = sorted(set(changes) - fields)
        if unknown:
            raise ValueError(f"update_config got {unknown}, expected fields of MixedPrecisionConfig: {sorted(fields)}")
        self._manager.apply_config(dataclasses.replace(self._manager.config, **changes), set(changes))

    def adjust_loss_scale(self, factor: float) -> None:
        """Multiply the loss scale by `factor`, a finite number > 0. Nothing happens where the loss is not scaled."""
        self._manager.adjust_loss_scale(factor)

    def get_statistics(self) -> MixedPrecisionStatistics:
        """Return what was measured so far; what was not is NaN, with the reason in its `notes` (waits)."""
        return self._manager.statistics()

    def get_comprehensive_stats(self) -> dict[str, Any]:
        """Return the same as a dictionary.

        With TensorFlow it has training_speedup too, for which training steps are timed on copies of the model: up to
        about 20 seconds, once for a model and its batch.
        """
        if self.framework == "tensorflow":
            return self._manager.comprehensive_statistics()
        return self.get_statistics().as_dict()


def _installed(framework: str) -> str:
    """Return the framework to use: the one asked for, or the first that is installed. Nothing is imported."""
    if framework == "auto":
        for name, module in _MODULES.items():
            if importlib.util.find_spec(module) is not None:
                return name
        raise ImportError("framework is 'auto', but none is installed: pip install torch, tensorflow or scikit-learn")
    module = _MODULES[framework]
    # The dtype optimizer of "sklearn" works on arrays: it needs NumPy, which it says itself, and not scikit-learn.
    if framework != "sklearn" and importlib.util.find_spec(module) is None:
        raise ImportError(f"framework is {framework!r}, but {module} is not installed: pip install {module}")
    return framework


def _config_of(precision_policy: str, initial_loss_scale: float) -> MixedPrecisionConfig:
    """Make a config whose errors name the manager's parameters."""
    try:
        return MixedPrecisionConfig(precision_policy=precision_policy, loss_scale=initial_loss_scale)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("loss_scale is", "initial_loss_scale is", 1)) from None
