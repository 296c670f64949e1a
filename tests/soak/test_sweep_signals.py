"""`make soak`: signals to a sweep over several concepts, at random moments, until it has ended by itself.

Each job is a real run in miniature. SIGTERM, SIGINT and SIGHUP ask, SIGKILL does not; whatever came, nothing goes on
unseen, and the sweep that is begun again ends with the runs that were never disturbed. `SIGNALS` is their number.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyunictokens.runs.sweep import Status, plan
from tests.soak import chaos
from tests.train.world import world

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore:.*rows are filled")]

SIGNALS = int(os.environ.get("SIGNALS", "20"))
ROOT = Path(__file__).parents[2]
NAMES = ("bo", "mug", "ann")
JOB = """
import sys
from pathlib import Path
from pyunictokens.utils.signals import Stopped, end_with_parent, stop_on_signals
end_with_parent()
from pyunictokens.data.folder import load_concept
from tests.soak import chaos
from tests.train.world import World, tiny_concept, tiny_model, tiny_tokenizer, tiny_vq
out = Path(sys.argv[sys.argv.index("--out") + 1])
here = World(tiny_model(), tiny_vq(), tiny_tokenizer(), load_concept(DATA, "bo"), tiny_concept())
try:
    with stop_on_signals(print) as stop:
        chaos.run(here, chaos.settings(), out, stop)
except Stopped as stopped:
    print(stopped)
    sys.exit(0)
(out / "report.html").write_text("")
"""
SWEEP = """
from pyunictokens.runs.sweep import Job, run_local
from pyunictokens.utils.signals import stop_on_signals
with stop_on_signals() as stop:
    print([status.state for status in run_local(JOBS, workers=2, stop=stop)])
"""


def working(place: Path) -> list[int]:
    """Processes whose command line names `place`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(place).encode() in words and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def test_signals_to_a_sweep(tmp_path: Path) -> None:
    here, straight = world(tmp_path / "data"), tmp_path / "straight"
    chaos.run(here, chaos.settings(), straight)
    wanted, program, runs = chaos.contents(straight), tmp_path / "job.py", tmp_path / "runs"
    program.write_text(JOB.replace("DATA", repr(str(tmp_path / "data"))))
    planned = plan(runs, NAMES, ["DATA", "{name}"], grpo=True, evaluate=True, retries=1)
    jobs = [type(job)(**{**vars(job), "program": (str(program),)}) for job in planned]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    rng, sent = random.Random(11), 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", SWEEP.replace("JOBS", repr(jobs))], env=environment)
        if sent < SIGNALS:
            try:
                process.wait(rng.uniform(0.5, 9.0))
            except subprocess.TimeoutExpired:
                process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL]))
                sent += 1
        process.wait(300)
        end = time.monotonic() + 60
        while working(runs) and time.monotonic() < end:
            time.sleep(0.2)
        assert not working(runs), "something goes on after its sweep has ended"
        states = {name: Status.read(runs, name).state for name in NAMES}
        assert "failed" not in states.values(), states
        if set(states.values()) == {"done"}:
            if sent >= SIGNALS:
                break
            for name in NAMES:  # once more from the start
                subprocess.run(["rm", "-r", str(runs / name)], check=True)
    for name in NAMES:
        assert chaos.contents(runs / name) == wanted and not chaos.leftovers(runs / name), name
    print(f"{sent} signals to sweeps of {len(NAMES)} concepts")
