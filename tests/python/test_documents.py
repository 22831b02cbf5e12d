"""The Python blocks of the documents run as they stand; those of TensorFlow do in tests/tf_ops/test_documents_tf.py."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = [
    pytest.param(match[1], id=f"{path}-line-{text[: match.start()].count(chr(10)) + 2}")
    for path in (
        "README.md",
        "docs/adaptive.md",
        "docs/analysis.md",
        "docs/estimators.md",
        "docs/policies.md",
        "docs/sklearn.md",
    )
    for text in [(ROOT / path).read_text()]
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if 'framework="tensorflow"' not in match[1]
]
# Of this one later blocks go on where earlier ones end.
_INT8 = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "int8.md").read_text(), re.MULTILINE | re.DOTALL)
BLOCKS.append(pytest.param("\n".join(_INT8), id="docs/int8.md"))


@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*has no float16 arithmetic.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.jit")
        exec(compile(code, "document", "exec"), {"__name__": "document"})
