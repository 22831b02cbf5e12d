"""The code blocks of the user's document, tests/data/seed.md, by the heading above them."""

from __future__ import annotations

import re
from pathlib import Path

_DOCUMENT = Path(__file__).parents[1] / "data" / "seed.md"


def block(heading: str) -> str:
    """Return the first Python block below the heading, to the letter."""
    text = _DOCUMENT.read_text()
    match = re.search(rf"^#+ {re.escape(heading)}$(.*?)^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert match, f"the document has no block under {heading!r}"
    assert "\n#" not in match[1], f"the block under {heading!r} belongs to another heading"
    return match[2]
