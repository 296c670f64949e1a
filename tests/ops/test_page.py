"""Every block of docs/ops.md runs, in the order of the page and in one scope."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[2] / "docs" / "ops.md"
_FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_blocks_run() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    text, count = PAGE.read_text(encoding="utf-8"), 0
    scope: dict[str, Any] = {}
    for found in _FENCE.finditer(text):
        if re.match(r"\w+\(.*?\)\s*->", found[1], re.DOTALL):
            continue  # a signature: held against the real one by tests/test_docs.py
        line = text[: found.start()].count("\n") + 1
        exec(compile("\n" * line + found[1], PAGE.name, "exec"), scope)  # line numbers are those of the page
        count += 1
    assert count >= 8


def test_every_public_name_is_on_the_page() -> None:
    from pyunictokens import ops

    text = PAGE.read_text(encoding="utf-8")
    missing = [name for name in ops.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing
