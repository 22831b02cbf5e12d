"""Loads the TensorFlow ops of the compiled library, or says why they cannot be had."""

from __future__ import annotations

import functools
import json
import os
import warnings
from types import ModuleType

import tensorflow as tf

from halfstep._version import __version__

_PACKAGE = os.path.dirname(os.path.realpath(__file__))


def _how_to_build() -> str:
    if os.path.exists(os.path.join(_PACKAGE, "..", "..", "tools", "bootstrap.py")):
        return (
            "Build it with `make setup-tf` in halfstep's folder, or for the TensorFlow of another Python with "
            "`make setup-tf TF_PYTHON=<that python>`."
        )
    return (
        "Install halfstep with it, from a clone and with cmake, ninja and nlohmann-json in this environment: "
        "`HALFSTEP_TORCH=OFF HALFSTEP_TF=ON pip install --no-build-isolation .`"
    )


def _folder() -> str:
    major = tf.__version__.split(".")[0]
    return os.path.join(_PACKAGE, f"tensorflow-{major}")


@functools.cache
def _register() -> tuple[ModuleType | None, str]:
    """Load the library; return the module of its ops and what it was built for, or None and why there is none."""
    folder = _folder()
    library = os.path.join(folder, "lib", "libhalfstep_tf.so")
    if not os.path.exists(library):
        return None, f"halfstep's TensorFlow library is not built ({library} is not there)"
    try:
        with open(os.path.join(folder, "build_info.json"), encoding="utf-8") as file:
            info = json.load(file)
        built = f"halfstep {info['halfstep']} and TensorFlow {info['tensorflow']}"
    except (OSError, ValueError, KeyError) as error:
        return None, f"{folder} holds no readable build_info.json ({error!r})"
    here = f"this is halfstep {__version__} with TensorFlow {tf.__version__}"
    if info["halfstep"] != __version__:
        return None, f"{library} was built as part of {built}, but {here}"
    try:
        return tf.load_op_library(library), built
    except Exception as error:  # whatever a foreign library does: the plain ops are right in any case
        return None, f"{library} was built for {built}, does not load here ({error}), and {here}"


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """Return the ops and "", or None and why there are none."""
    ops, said = _register()
    if ops is None:
        return None, said
    try:
        _try(ops)
    except Exception as error:  # as above
        return None, f"the library in {_folder()} was built for {said}, and does not work here ({error})"
    return ops, ""


def _try(ops: ModuleType) -> None:
    """Call each op once. The C API that they are written against calls itself unstable."""
    with tf.init_scope(), tf.device("CPU"):  # eagerly, also where a function is being traced
        grads = [tf.constant([2.0, -4.0]), tf.constant([[8.0]], tf.float16)]
        unscaled, found, norm = ops.halfstep_check_and_unscale(grads, 2.0)
        rows = ops.halfstep_gradient_statistics(grads, 2.0)
        state = ops.halfstep_update_scale(
            2.0, 0, 1, [0] * 8, [1.0], [float("inf")], [2.0, 0.5, 0.0, 4.0], growth_interval=1
        )
    got = [*(value.numpy().tolist() for value in unscaled), float(found), float(norm) ** 2, rows.numpy()[:, 1].tolist()]
    got += [float(state[0]), state[3].numpy().tolist()]
    want = [[1.0, -2.0], [[4.0]], 0.0, 21.0, [2.0, 4.0], 1.0, [1, 1, 1, 0, 1, 0, 0, 1]]
    if any(abs(a - b) > 1e-4 if isinstance(a, float) else a != b for a, b in zip(got, want, strict=True)):
        raise RuntimeError(f"its ops answered {got}, expected {want}")


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}. The loss scale is kept by plain TensorFlow operations instead, with the same results. "
        f"{_how_to_build()}",
        stacklevel=2,
    )


def register() -> None:
    """Make the ops known to TensorFlow where they can be had, so that graphs which were saved with them load.

    Nothing runs, so TensorFlow's devices can still be configured.
    """
    _register()


def library() -> ModuleType | None:
    """Return the module of the ops, or None after one warning that says why and how to build them."""
    ops, reason = _load()
    if ops is None:
        _warn(reason)
    return ops


def library_missing() -> str:
    """Return why the ops cannot be had, or ""."""
    return _load()[1]
