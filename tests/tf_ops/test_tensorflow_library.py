"""The compiled library: what it links, and what happens where it is missing, foreign or broken."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

PACKAGE = Path(__file__).resolve().parents[2] / "python_shim" / "halfstep"
FOLDER = PACKAGE / f"tensorflow-{tf.__version__.split('.')[0]}"
LIBRARY = FOLDER / "lib" / "libhalfstep_tf.so"

# Two steps, the second one skipped, and every warning of halfstep's as a line.
PROGRAM = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import keras, tensorflow as tf
    from halfstep.tensorflow import LossScaleOptimizer
    variable = keras.Variable([1.0, 2.0], name="v")
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), 4.0)
    step = tf.function(lambda grad: optimizer.apply([grad], [variable]))
    step(tf.constant([4.0, 8.0]))
    step(tf.constant([float("inf"), 8.0]))
    second = LossScaleOptimizer(keras.optimizers.SGD(1.0), 4.0)
    second.apply([tf.constant([4.0, 8.0])], [keras.Variable([1.0, 2.0])])
print("values", variable.numpy().tolist(), optimizer.scale(), optimizer.counters()["skipped"], optimizer.overflowed())
print("explain", optimizer.explain())
for warning in caught:
    if "plain TensorFlow operations" in str(warning.message):
        print("warning", warning.message)
"""


def run(package: Path) -> tuple[str, list[str]]:
    """Run PROGRAM with a copy of the package: what explain() says, and the warnings."""
    command = [sys.executable, "-c", PROGRAM, str(package)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout
    assert "values [0.0, 0.0] 2.0 1 {'v': 1}" in output
    [explained] = re.findall("^explain (.*)$", output, re.MULTILINE)
    return explained, re.findall("^warning (.*)$", output, re.MULTILINE)


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and its TensorFlow library; what lies in it comes before the one that is installed."""
    ignored = shutil.ignore_patterns("torch-*", "numpy-*", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "halfstep", ignore=ignored)
    return tmp_path


def test_custom_ops_run_where_the_library_is(copy: Path) -> None:
    assert run(copy) == ("custom ops of halfstep's TensorFlow library", [])


def test_without_the_library_plain_ops_run_after_one_warning(copy: Path) -> None:
    shutil.rmtree(copy / "halfstep" / FOLDER.name)
    explained, [warning] = run(copy)
    assert explained.startswith("plain ops: halfstep's TensorFlow library is not built")
    assert "is not there" in warning
    assert "HALFSTEP_TF=ON" in warning
    assert "same results" in warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"halfstep": "0.0.9"}, "was built as part of halfstep 0.0.9 and TensorFlow"),
        (None, "holds no readable build_info.json"),
    ],
)
def test_a_foreign_library_is_not_loaded(copy: Path, change: dict | None, message: str) -> None:
    path = copy / "halfstep" / FOLDER.name / "build_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) if change else "{")
    explained, [warning] = run(copy)
    assert message in explained
    assert message in warning
    assert "HALFSTEP_TF=ON" in warning


def test_a_library_that_does_not_load_is_explained(copy: Path, tmp_path: Path) -> None:
    """As one that was built for a TensorFlow whose functions are not here."""
    source = tmp_path / "foreign.c"
    source.write_text(
        "void gone_from_tensorflow(void); __attribute__((constructor)) void f(void) { gone_from_tensorflow(); }"
    )
    library = copy / "halfstep" / FOLDER.name / "lib" / "libhalfstep_tf.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-z,now", "-o", library, source], check=True)
    info = copy / "halfstep" / FOLDER.name / "build_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "tensorflow": "2.99.0"}))
    explained, [warning] = run(copy)
    assert "gone_from_tensorflow" in warning
    assert "TensorFlow 2.99.0" in warning
    assert f"this is halfstep {json.loads(info.read_text())['halfstep']} with TensorFlow {tf.__version__}" in explained


def test_only_the_framework_library_is_linked_and_nothing_is_exported() -> None:
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    assert needed - system == {"libtensorflow_framework.so.2"}
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    assert not re.findall("absl|tensorflow::|google::protobuf|tsl::", symbols.stdout)
    defined = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert not [line for line in defined.splitlines() if re.search("TF_|avx|Tensor", line)]


def test_the_library_says_what_it_was_built_for() -> None:
    from halfstep import __version__

    info = json.loads((FOLDER / "build_info.json").read_text())
    assert info["halfstep"] == __version__
    assert re.fullmatch(r"2\.\d+\.\d+", info["tensorflow"])


def test_a_saved_graph_with_the_ops_loads_after_the_import(tmp_path: Path) -> None:
    """And before anything of TensorFlow's has run: devices can still be configured."""
    import keras
    from halfstep.tensorflow import LossScaleOptimizer

    class Module(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.variable = keras.Variable([1.0, 2.0])
            self.optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), 4.0)
            self.optimizer.build([self.variable])

        @tf.function(input_signature=[tf.TensorSpec([2])])
        def train(self, grad: tf.Tensor) -> tf.Tensor:
            self.optimizer.apply([grad], [self.variable])
            return tf.convert_to_tensor(self.variable)

    tf.saved_model.save(Module(), tmp_path / "module")
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
import halfstep.tensorflow
import tensorflow as tf
[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
module = tf.saved_model.load({str(tmp_path / "module")!r})
print(module.train(tf.constant([4.0, 8.0])).numpy().tolist())
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert output.stdout.strip() == "[0.0, 0.0]", output.stderr


def test_an_installed_package_is_told_to_be_installed_anew(copy: Path) -> None:
    """The copy lies in no source tree, where make would build into."""
    shutil.rmtree(copy / "halfstep" / FOLDER.name)
    [warning] = run(copy)[1]
    assert "HALFSTEP_TORCH=OFF HALFSTEP_TF=ON pip install --no-build-isolation" in warning


def test_build_info_needs_no_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from halfstep.__main__ import main

    monkeypatch.setattr(sys, "argv", ["halfstep", "--build-info"])
    assert main() == 0
    assert re.search(r"^tensorflow +2\.", capsys.readouterr().out, re.MULTILINE)


def test_names_that_need_torch_say_so() -> None:
    import halfstep

    with pytest.raises(ModuleNotFoundError, match=r"PrecisionPolicy needs torch.*halfstep\.tensorflow\.KerasPolicy"):
        halfstep.PrecisionPolicy  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match="GradScaler needs torch, which is not installed$"):
        halfstep.GradScaler  # noqa: B018


def test_halfstep_itself_imports_no_tensorflow() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import halfstep; print('tensorflow' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
