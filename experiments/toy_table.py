"""Table 1 for the toy concept in one command: make the concept, train briefly, serve a judge, fill the table.

    python experiments/toy_table.py                          # everything into tables/toy
    python experiments/toy_table.py --run runs/bo            # a run that is there already
    python experiments/toy_table.py --samples 4 --limit 0 --out tables/other
    python experiments/toy_table.py --docs                   # and write docs/toy_table.json and its table in the page

Rows: our model, Show-o told in words, Show-o shown a photo, real images. What is there already is not done again, so a
second call goes on where the first one stopped. The judge is local_judge.py, on a free port of this machine.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from local_judge import make_server

SHORT = ("stages.max_steps=60", "grpo.steps=2", "grpo.group_size=4")
"""Settings of the brief training: enough for a table to have something to tell, not for good numbers."""
MODELS = ("ours", "showo-tp", "showo-ip", "real")
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- toy-table:begin -->\n", "<!-- toy-table:end -->\n"


def call(*words: object) -> None:
    """`pyunictokens` with these words, in a process of its own; a failure ends this script with its status."""
    done = subprocess.run([sys.executable, "-m", "pyunictokens", *map(str, words)])
    if done.returncode:
        raise SystemExit(done.returncode)


def block(content: dict[str, Any]) -> str:
    """The table of the page, from docs/toy_table.json: columns of the paper as lines, models as columns."""
    from pyunictokens.evaluate.tables import TABLE_1

    models = list(content["rows"])

    def cell(model: str, key: str) -> str:
        metric = content["rows"][model].get(key)
        return "–" if metric is None else f"{metric['mean']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"

    lines = [["", *models], ["---"] * (len(models) + 1)]
    lines += [[f"{c.heading} {c.label}", *(cell(model, c.key) for model in models)] for c in TABLE_1]
    asked = content["settings"]
    about = (
        f"The result of this command ({asked['samples']} images a prompt, {asked['limit']} items a task at most, so "
        "the intervals are wide; trained for a moment only, and the toy never learned to read a squeezed photo):"
    )
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    machine = content["machine"]
    made = f"Python {machine['python']}, torch {machine['torch']}, {machine['cores']} cores; written by `--docs`."
    return f"\n{about}\n\n{table}\n{made}\n\n"


def write_docs(out: Path) -> None:
    """Keep the table's means in docs/toy_table.json and put them into docs/evaluation.md."""
    import os

    import torch

    from pyunictokens.utils.files import read_json, write_json_rows, write_text_atomic

    results = read_json(out / "results.json")
    content = {
        "settings": results["settings"],
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()},
        "rows": {row["model"]: row["metrics"] for row in results["rows"]["all"]},
        "failures": len(results["failures"]),
    }
    content["settings"].pop("suite")
    write_json_rows(DOCS / "toy_table.json", content)
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    write_text_atomic(DOCS / "evaluation.md", before + BEGIN + block(content) + END + rest.partition(END)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tables/toy"))
    parser.add_argument("--run", type=Path, help="a run of `pyunictokens train`; default: a brief one below --out")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--limit", type=int, default=4, help="items of each task; 0 means all")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/evaluation.md")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of `evaluate table`")
    given = parser.parse_args()
    run = given.run or given.out / "run"
    if given.run is None and not (run / "final").is_dir():
        data = given.out / "data"
        if not data.is_dir():
            call("data", "toy", data, "bo", "--kind", "animal")
        call("train", data, "bo", "--out", run, "--no-evaluate", *SHORT, *(["--resume"] if run.is_dir() else []))
    server = make_server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = f"http://127.0.0.1:{server.server_address[1]}/v1"
    rows = [word for model in MODELS for word in ("--model", model)]
    asked = (f"samples={given.samples}", f"limit={given.limit}", "judged_as=class")  # as the table of the page was
    judged = ("--judge-url", judge, "--judge-model", "toy", "--judge-key-env", "none")
    call("evaluate", "table", run, *rows, *judged, "--out", given.out, *asked, *given.words)
    server.shutdown()
    if given.docs:
        write_docs(given.out)


if __name__ == "__main__":
    main()
