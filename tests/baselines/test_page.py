"""The table of docs/baselines.md is the one of docs/paper_toy.json."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_page_shows_the_stored_numbers() -> None:
    spec = importlib.util.spec_from_file_location("paper_toy", ROOT / "experiments" / "paper_toy.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")
    assert script.with_table(page) == page
    found = json.loads((ROOT / "docs" / "paper_toy.json").read_text(encoding="utf-8"))
    trained = [row for row in found["rows"] if row["trained"]]
    assert len(trained) >= 5 and len(found["concepts"]) == 2
    assert all(row["cells"]["pure.clip_i"]["n"] > 0 for row in trained)
