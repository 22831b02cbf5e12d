"""The Python blocks of docs/tensorflow.md run, top to bottom, as one program; so do those of the README for Keras."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("document", ["docs/tensorflow.md", "README.md"])
def test_the_blocks_run(document: str, tmp_path: Path) -> None:
    """In a process of its own: some set Keras' global policy. Lines keep their numbers, for tracebacks."""
    text = (ROOT / document).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    if document == "README.md":
        blocks = [block for block in blocks if 'framework="tensorflow"' in block[1]]
    assert blocks
    program = ""
    for block in blocks:
        program += "\n" * (text.count("\n", 0, block.start(1)) - program.count("\n")) + block[1]
    path = tmp_path / "document.py"
    path.write_text(program)
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'python_shim')!r}); runpy.run_path({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_example_runs() -> None:
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'python_shim')!r}); "
    code += f"runpy.run_path({str(ROOT / 'examples' / 'tensorflow_digits.py')!r})['main'](epochs=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["float32", "mixed_bfloat16", "mixed_float16"]
    assert "loss scale 32768, skipped 0" in lines[2]
