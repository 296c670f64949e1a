"""Write the table of settings in docs/training.md from the dataclasses: ``python -m experiments.settings_table``.

With ``--check`` nothing is written and the exit code says whether the table is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pyunictokens.config.settings import describe
from pyunictokens.config.training import PRESETS
from pyunictokens.utils.files import write_text_atomic

FILE = Path(__file__).parent.parent / "docs" / "training.md"
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->"


def table() -> str:
    """The Markdown table: name, the paper's default, the other presets' where they differ, and what it is."""
    others = [
        {setting.name: setting.default for setting in describe(preset)}
        for name, preset in PRESETS.items()
        if name != "paper"
    ]
    lines = ["| setting | " + " | ".join(PRESETS) + " | |", "|---|" + "---|" * (len(PRESETS) + 1)]
    for setting in describe(PRESETS["paper"]):
        values = [each[setting.name] for each in others]
        other = " | ".join("" if value == setting.default else _show(value) for value in values)
        about = setting.about.replace("<", "&lt;").replace("|", "\\|").replace("`&lt;", "`<")
        lines.append(f"| `{setting.name}` | {_show(setting.default)} | {other} | {about} |")
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    """`text` with the table between its marks renewed."""
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + table() + text[end:]


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if value is None:
        return "the model's"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    text = FILE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(updated(text) != text)
    write_text_atomic(FILE, updated(text))


if __name__ == "__main__":
    main()
