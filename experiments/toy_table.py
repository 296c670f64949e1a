"""Table 1 for the toy concept in one command: make the concept, train briefly, serve a judge, fill the table.

    python experiments/toy_table.py                          # everything into tables/toy
    python experiments/toy_table.py --run runs/bo            # a run that is there already
    python experiments/toy_table.py --samples 4 --out tables/other

Rows: our model, Show-o told in words, Show-o shown a photo, real images. What is there already is not done again, so a
second call goes on where the first one stopped. The judge is local_judge.py, on a free port of this machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from local_judge import make_server

SHORT = ("stages.max_steps=60", "grpo.steps=2", "grpo.group_size=4")
"""Settings of the brief training: enough for a table to have something to tell, not for good numbers."""
MODELS = ("ours", "showo-tp", "showo-ip", "real")


def call(*words: object) -> None:
    """`pyunictokens` with these words, in a process of its own; a failure ends this script with its status."""
    done = subprocess.run([sys.executable, "-m", "pyunictokens", *map(str, words)])
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tables/toy"))
    parser.add_argument("--run", type=Path, help="a run of `pyunictokens train`; default: a brief one below --out")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--limit", type=int, default=6, help="items of each task; 0 means all")
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
    asked = (f"samples={given.samples}", f"limit={given.limit}")
    judged = ("--judge-url", judge, "--judge-model", "toy", "--judge-key-env", "none")
    call("evaluate", "table", run, *rows, *judged, "--out", given.out, *asked, *given.words)
    server.shutdown()


if __name__ == "__main__":
    main()
