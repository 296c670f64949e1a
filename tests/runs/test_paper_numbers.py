"""The paper's numbers: a value for each column, and differences with their intervals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyunictokens.evaluate.report import beside
from pyunictokens.evaluate.sample_cache import Record
from pyunictokens.evaluate.table_files import Table
from pyunictokens.evaluate.tables import TABLES
from pyunictokens.runs import paper
from pyunictokens.runs.paper_numbers import NUMBERS, number
from pyunictokens.runs.rivals import PAPER, TOY, rivals_of


def test_rows_have_a_value_for_each_column() -> None:
    for table, rows in NUMBERS.items():
        for name, values in rows.items():
            assert len(values) == len(TABLES[table if table in TABLES else "unify"]), (table, name)
            assert all(value is None or 0 < value < 1 for value in values)
    assert number("table1", "UniCTokens-R1", "recognition.weight") == 0.859
    assert number("table1", "UniCTokens-R1", "dense_reasoning_generation.clip_i") == 0.756
    assert number("table1", "Real Images", "pure.clip_i") == 0.833
    assert number("table1", "Text inversion", "vqa.bleu") is None
    assert number("table1", "nobody", "vqa.bleu") is None and number("table1", "UniCTokens", "vqa.exact") is None


def test_rows_of_tables_are_rows_of_the_paper() -> None:
    """But ours in the part of Table 5 whose numbers the copy at hand does not have."""
    for table, about in paper.TABLES.items():
        if table == "dreambench":
            continue
        layout = about.layout if about.layout != "unify" else table
        for variant in about.variants:
            assert paper.VARIANTS[variant].title in NUMBERS[layout], variant
    assert {rival.paper for rival in (*TOY, *PAPER)} <= {row for rows in NUMBERS.values() for row in rows}
    assert {rival.paper for rival in rivals_of("table1", toy=False)} <= set(NUMBERS["table1"])


def record(model: str, item: str, value: float, group: str = "positive") -> Record:
    return Record(
        model=model,
        concept="bo",
        kind="animal",
        task="recognition",
        item=item,
        text=item,
        meant=item,
        group=group,
        seed=0,
        scores={"weight": [value]},
    )


def test_differences_have_the_interval_of_our_value(tmp_path: Path) -> None:
    values = [("a", 1.0, "positive"), ("b", 0.0, "positive"), ("c", 1.0, "negative"), ("d", 1.0, "negative")]
    table = Table("unify", [record("mine", item, value, group) for item, value, group in values])
    rows = [paper.TableRow("ours:x", "mine", "UniCTokens-R1", trained=True)]

    class Named:
        name = "mine"

    found = paper.beside_paper("table1", table, rows, [Named()], ["rap: no weights"], toy=True)  # type: ignore[list-item]
    cell = found["rows"][0]["cells"]["recognition.weight"]
    assert cell["mean"] == 0.75 and cell["paper"] == 0.859
    assert cell["difference"] == pytest.approx(0.75 - 0.859)
    assert cell["low"] is not None and cell["difference_low"] == pytest.approx(cell["low"] - 0.859)
    assert "UniCTokens-R1" not in found["absent"] and "RAP-MLLM" in found["absent"]
    page = beside.save(found, tmp_path)
    assert json.loads((tmp_path / "paper.json").read_text())["rows"][0]["trained"] is True
    text = page.read_text()
    assert "0.750" in text and "paper 0.859" in text and "-0.109" in text and "rap: no weights" in text
    assert "0.750 [" in (tmp_path / "paper.md").read_text() and "; 0.859; -0.109" in (tmp_path / "paper.md").read_text()
