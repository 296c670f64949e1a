"""What a full `make fuzz` covers, as a table in docs/reliability.md: ``python -m tests.fuzz --record`` keeps it.

The numbers are those that atheris reports, in docs/fuzz.json; a run with ``--only`` adds or replaces its readers. It
reads no foreign bytes itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.cost_tables import updated
from pyunictokens.utils.files import write_json, write_text_atomic

DOCS = Path(__file__).parent.parent.parent / "docs"
KEPT, PAGE = DOCS / "fuzz.json", DOCS / "reliability.md"


def executed(output: str) -> int:
    """Inputs that atheris says it has tried; 0 where it does not say."""
    found = re.search(r"stat::number_of_executed_units:\s*(\d+)", output)
    return int(found[1]) if found else 0


def table() -> str:
    """Readers by the number of inputs they were given."""
    record = json.loads(KEPT.read_text(encoding="utf-8"))
    readers: Mapping[str, int] = record["readers"]
    lines = [f"| reader | inputs in {record['seconds']} s |", "|---|---|"]
    lines += [f"| {name} | {_spaced(count)} |" for name, count in sorted(readers.items(), key=lambda pair: -pair[1])]
    lines.append(f"| {len(readers)} readers | {_spaced(sum(readers.values()))} |")
    return "\n".join(lines)


def keep(seconds: int, readers: Mapping[str, int]) -> None:
    """Write the numbers of a run, and the table."""
    record: dict[str, Any] = {"seconds": seconds, "readers": {}}
    if KEPT.is_file():
        found = json.loads(KEPT.read_text(encoding="utf-8"))
        record = found if found["seconds"] == seconds else record
    record["readers"] = {**record["readers"], **readers}
    write_json(KEPT, record)
    text = PAGE.read_text(encoding="utf-8")
    write_text_atomic(PAGE, updated(text, {"fuzz": table}, PAGE.name))


def _spaced(count: int) -> str:
    return f"{count:,}".replace(",", " ")
