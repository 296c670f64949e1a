"""Many concepts: which are chosen, how jobs end and are taken up again, what the table and the page say."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyunictokens.runs.ray_jobs import run_on_ray
from pyunictokens.runs.sweep import Job, Status, choose, finished, plan, run_local, work
from pyunictokens.runs.sweep_results import collect, summary, write_results
from pyunictokens.utils.errors import MissingExtra, UserError
from pyunictokens.utils.signals import ENDS_WITH_STDIN

FAKE = """
import json, os, pathlib, signal, sys, time
from pyunictokens.utils.signals import end_with_parent
end_with_parent()
words = sys.argv[1:]
assert words[0] == "train" and words[2] == pathlib.Path(words[words.index("--out") + 1]).name
out = pathlib.Path(words[words.index("--out") + 1])
out.mkdir(exist_ok=True)
with (out / "lives").open("a") as file:
    file.write("resumed\\n" if "--resume" in words else "begun\\n")
(out / "config.yaml").write_text("{}")
lives = (out / "lives").read_text().count("\\n")
name = words[2]
if name.startswith("hopeless"):
    print("something broke"); sys.exit(1)
if name.startswith("wrong"):
    print("error: no such data"); sys.exit(2)
if name.startswith("shaky") and lives < 3:
    os.kill(os.getpid(), signal.SIGKILL)
if name.startswith("taken"):
    print(f"error: {out}: another process is working in this folder"); sys.exit(2)
if name.startswith(("slow", "kept")):
    (out / "pid").write_text(f"{os.getpid()} {os.getsid(0)}"); time.sleep(60)
if name.startswith("long"):
    signal.signal(signal.SIGTERM, lambda *_: (print("stopped after step 3"), sys.exit(0)))
    (out / "began").touch(); time.sleep(60)
(out / "about.json").write_text(json.dumps({"kind": "animal"}))
(out / "threads").write_text(os.environ["OMP_NUM_THREADS"] + " " + os.environ.get("CUDA_VISIBLE_DEVICES", "-"))
for part, value in (("before", 0.25), ("after", 0.5 + 0.125 * len(name))):
    metric = {"mean": value, "low": value, "high": value, "n": 3}
    (out / f"{part}.json").write_text(json.dumps({"metrics": {"pure.attributes": metric, "other": metric}}))
(out / "report.html").write_text("")
(out / "final").mkdir(exist_ok=True)
(out / "final" / "policy.json").write_text("{}")
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Any:
    program = tmp_path / "fake.py"
    program.write_text(FAKE)

    def make(*names: str, retries: int = 1) -> list[Job]:
        planned = plan(tmp_path / "runs", names, ["DATA", "{name}", "a=1"], grpo=True, evaluate=True, retries=retries)
        return [Job(**{**vars(job), "program": (str(program),)}) for job in planned]

    return make


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def lives(job: Job) -> list[str]:
    return (job.out / "lives").read_text().split()


def test_which_concepts(tmp_path: Path) -> None:
    there = ["bo", "mug", "ann", "zoë"]
    assert choose(there, "all") == there and choose(there, "mug, bo,mug") == ["mug", "bo"]
    (tmp_path / "list.txt").write_text("ann\n\nzoë\n", encoding="utf-8")
    assert choose(there, str(tmp_path / "list.txt")) == ["ann", "zoë"]
    shards = [choose(there, "all", f"{part}/3") for part in (1, 2, 3)]
    assert shards == [["bo", "zoë"], ["mug"], ["ann"]]
    for wanted in ("cat", "bo,../x", ","):
        with pytest.raises(UserError, match="not in the data folder"):
            choose(there, wanted)
    for shard in ("0/3", "4/3", "a/b", "1", "1/0", "-1/2", "²/3"):
        with pytest.raises(UserError, match="must be I/N"):
            choose(there, "all", shard)


def test_every_way_a_job_can_end(jobs: Any) -> None:
    names = ["fine", "shaky", "hopeless", "wrong", "taken"]
    statuses = {status.name: status for status in run_local(jobs(*names, retries=2), workers=2)}
    assert {name: status.state for name, status in statuses.items()} == {
        "fine": "done", "shaky": "done", "hopeless": "failed", "wrong": "failed", "taken": "elsewhere",
    }  # fmt: skip
    assert {name: status.tries for name, status in statuses.items()} == {
        "fine": 1, "shaky": 3, "hopeless": 3, "wrong": 1, "taken": 1,
    }  # fmt: skip
    assert statuses["hopeless"].message == "ended with code 1: something broke"
    assert statuses["wrong"].message == "ended with code 2: error: no such data"
    made = {job.name: job for job in jobs(*names)}
    assert lives(made["shaky"]) == ["begun", "resumed", "resumed"]
    assert all(Status.read(made[name].runs, name) == status for name, status in statuses.items())


def test_what_is_done_is_not_done_again_and_the_rest_is(jobs: Any) -> None:
    (shaky, fine) = jobs("shaky", "fine", retries=0)
    assert [status.state for status in run_local([shaky, fine], workers=1)] == ["failed", "done"]
    assert "killed by SIGKILL" in Status.read(shaky.runs, "shaky").message
    for _ in range(2):
        list(run_local([shaky, fine], workers=1))
    assert lives(fine) == ["begun"] and len(lives(shaky)) == 3 and finished(shaky)
    assert Status.read(shaky.runs, "shaky").tries == 3
    (fine.out / "report.html").unlink()  # not whole any more: taken up again
    assert work(fine, {"OMP_NUM_THREADS": "1"}).state == "done" and lives(fine) == ["begun", "resumed"]
    (Path(fine.runs) / ".jobs" / "fine.json").write_text("{torn")
    assert Status.read(fine.runs, "fine").state == "waiting"


def test_cores_and_gpus_are_shared_out(jobs: Any) -> None:
    made = jobs("a", "b", "c", "d")
    assert {status.state for status in run_local(made, workers=2, gpus=2)} == {"done"}
    given = [(job.out / "threads").read_text().split() for job in made]
    assert {threads for threads, _ in given} == {str(max(1, (os.cpu_count() or 1) // 2))}
    assert {gpu for _, gpu in given} <= {"0", "1"}
    with pytest.raises(UserError, match="workers=0"):
        list(run_local(made, workers=0))


def test_asked_to_stop(jobs: Any) -> None:
    made = jobs("long1", "long2", "fine")
    asked = threading.Event()

    def ask() -> None:
        while not all((job.out / "began").exists() for job in made[:2]):
            time.sleep(0.01)
        asked.set()

    threading.Thread(target=ask).start()
    statuses = list(run_local(made, workers=2, stop=asked.is_set))
    assert {status.state for status in statuses} == {"stopped"} and {status.name for status in statuses} == {
        "long1",
        "long2",
    }
    assert statuses[0].message == "stopped after step 3" and not made[2].out.exists()


def pids(job: Job) -> list[int]:
    """(process, session) of a job, as soon as it has written them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (job.out / "pid").exists() and (words := (job.out / "pid").read_text().split()):
            return [int(word) for word in words]
        time.sleep(0.01)
    raise AssertionError(f"{job.name} did not begin")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_a_job_that_dies_of_being_asked_is_stopped_and_not_taken_up_again(jobs: Any) -> None:
    """A job that is still loading has no way to end in good order: SIGTERM kills it, and that is no failure."""
    (job,) = jobs("slow", retries=3)
    statuses = list(run_local([job], workers=1, stop=lambda: (job.out / "pid").exists()))
    assert [(status.state, status.tries) for status in statuses] == [("stopped", 1)] and lives(job) == ["begun"]
    assert gone(pids(job)[0])


def test_a_scheduler_that_ends_a_job_itself_is_not_taken_for_a_failure(jobs: Any) -> None:
    (job,) = jobs("slow", retries=3)
    threading.Thread(target=lambda: os.kill(pids(job)[0], signal.SIGTERM)).start()
    assert [status.state for status in run_local([job], workers=1)] == ["stopped"] and lives(job) == ["begun"]


def test_jobs_have_a_session_of_their_own(jobs: Any) -> None:
    """So a Ctrl-C in the terminal reaches them through us alone."""
    (job,) = jobs("slow")
    list(run_local([job], workers=1, stop=lambda: (job.out / "pid").exists()))
    assert pids(job)[1] == pids(job)[0] != os.getsid(0)


def test_a_second_ctrl_c_kills_what_runs(jobs: Any) -> None:
    made = jobs("kept1", "kept2", retries=3)

    def stop() -> bool:
        if all((job.out / "pid").exists() for job in made):
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        list(run_local(made, workers=2, stop=stop))
    assert all(gone(pids(job)[0]) and lives(job) == ["begun"] for job in made)


def test_nothing_outlives_a_sweep_that_is_killed(jobs: Any, tmp_path: Path) -> None:
    (job,) = jobs("kept", retries=3)
    code = f"from pyunictokens.runs.sweep import Job, run_local; list(run_local([{job!r}], workers=1))"
    sweep = subprocess.Popen([sys.executable, "-c", code])
    pid = pids(job)[0]
    assert alive(pid)
    sweep.kill()
    sweep.wait()
    assert gone(pid) and lives(job) == ["begun"]


def test_a_command_that_a_sweep_started_ends_with_it() -> None:
    code = "import time, pyunictokens.cli as cli; cli.app = lambda: print('ready', flush=True) or time.sleep(60); "
    code += "cli.main()"
    environment = {**os.environ, ENDS_WITH_STDIN: "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.close()
        assert process.wait(20) == -signal.SIGTERM


def test_another_command_in_the_same_folder_is_refused(jobs: Any, tmp_path: Path) -> None:
    jobs("a")
    with pytest.raises(UserError, match=r"was begun with `train DATA \{name\} a=1`, this is `train DATA \{name\} a=2`"):
        plan(tmp_path / "runs", ["a"], ["DATA", "{name}", "a=2"], grpo=True, evaluate=True, retries=1)
    joined = plan(tmp_path / "other", ["a"], ["D"], grpo=False, evaluate=False, retries=0)
    assert joined[0].files == ("concept/concept.json",)


def test_table_and_page(jobs: Any, tmp_path: Path) -> None:
    made = jobs("ab", "abc", "wrong<b>", retries=0)
    list(run_local(made, workers=1))
    after = (made[1].out / "after.json").read_text()
    (made[1].out / "after.json").write_text(after.replace('"mean": 0.875', '"mean": Infinity'))
    row = collect(tmp_path / "runs", ["abc"])[0]
    assert "pure.attributes is inf" in row.status.message and not summary([row])
    (made[1].out / "after.json").write_text(after)
    (made[1].out / "about.json").write_text("[]")
    rows = collect(tmp_path / "runs", [job.name for job in made])
    assert "cannot be read" in rows[1].status.message and rows[0].kind == "animal"
    rows = collect(tmp_path / "runs", ["ab", "wrong<b>", "never"])
    (made[1].out / "about.json").write_text('{"kind": "object"}')
    rows = collect(tmp_path / "runs", ["ab", "abc", "wrong<b>", "never"])
    ((key, _, before, after, change),) = summary(rows)
    assert key == "pure.attributes" and before.mean == 0.25 and change.n == 2
    assert after.mean == pytest.approx(0.5 + 0.125 * 2.5) and change.mean == pytest.approx(0.5625)
    rows[0].status.message = '=HYPERLINK("http://example.org")'
    page = write_results(tmp_path / "runs", rows).read_text()
    cells = next(csv.DictReader((tmp_path / "runs" / "results.csv").open()))
    assert cells["message"] == '\'=HYPERLINK("http://example.org")', "no spreadsheet takes it for a formula"
    assert page.count("<tr>") == page.count("</tr>") and page.count("<table") == page.count("</table>")
    assert 'href="ab/report.html"' in page and "wrong&lt;b&gt;" in page and "<b>" not in page
    assert "2 done" in page and "1 failed" in page and "1 waiting" in page
    with (tmp_path / "runs" / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["state"] for line in table] == ["done", "done", "failed", "waiting"]
    assert table[0]["pure.attributes.after"] == "0.75" and table[3]["pure.attributes.after"] == ""
    numbers = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert numbers["summary"]["pure.attributes"]["change"]["mean"] == pytest.approx(0.5625)
    assert len(numbers["concepts"]) == 4


class FakeRay:
    """What the adapter uses of ray, run at once; one job's machine is lost."""

    def __init__(self, gpus: int = 0):
        self.gpus, self.most, self.alive, self.options = gpus, 0, 0, {}
        self.cancelled: list[Any] = []

    def init(self, address: str | None, **_: Any) -> None:
        if address == "nowhere":
            raise ConnectionError("no answer")

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4, "GPU": self.gpus}

    def remote(self, **options: Any) -> Any:
        self.options = options

        def wrap(function: Any) -> Any:
            def call(job: Job) -> Any:
                self.alive += 1
                self.most = max(self.most, self.alive)
                return (function, job)

            return SimpleNamespace(remote=call)

        return wrap

    def wait(self, pending: list[Any], num_returns: int, timeout: float) -> Any:
        return pending[:num_returns], pending[num_returns:]

    def get(self, future: Any) -> Any:
        self.alive -= 1
        function, job = future
        if job.name == "lost":
            raise RuntimeError("the machine is gone\nreally")
        return function(job, {"OMP_NUM_THREADS": "1"})

    def cancel(self, future: Any) -> None:
        self.cancelled.append(future)

    def shutdown(self) -> None:
        self.down = True


def test_the_same_jobs_on_a_cluster(jobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(gpus=2)
    monkeypatch.setitem(sys.modules, "ray", ray)
    made = jobs("a", "b", "lost", "wrong")
    statuses = {status.name: status.state for status in run_on_ray(made, "auto", workers=2, cpus=2)}
    assert statuses == {"a": "done", "b": "done", "lost": "failed", "wrong": "failed"}
    assert ray.most == 2 and ray.options == {"num_cpus": 2, "num_gpus": 1, "max_retries": 0} and ray.down
    assert Status.read(made[0].runs, "lost").message == "RuntimeError: really"
    answers = iter([False, False, False, True])
    left = list(run_on_ray(jobs("c", "d"), "auto", workers=2, stop=lambda: next(answers, True)))
    assert len(left) == 1 and len(ray.cancelled) == 1
    with pytest.raises(UserError, match="no Ray cluster at 'nowhere'"):
        list(run_on_ray(made, "nowhere", workers=1))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pyunictokens\[cluster\]"):
        list(run_on_ray(made, "auto", workers=1))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options become arguments of the jobs; failures end with code 2 and name the logs."""
    from typer.testing import CliRunner

    from pyunictokens.cli import app
    from pyunictokens.runs import sweep as many
    from pyunictokens.toy.concept import write_toy_concept

    for seed, name in enumerate(("fine", "wrong")):
        write_toy_concept(tmp_path / "data", seed=seed, kind="object", name=name)
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    real = many.plan

    def planned(*arguments: Any, **named: Any) -> list[Job]:
        return [Job(**{**vars(job), "program": (str(program),)}) for job in real(*arguments, **named)]

    monkeypatch.setattr(many, "plan", planned)

    def call(*words: str, code: int) -> str:
        result = CliRunner().invoke(app, ["train", *words])
        assert result.exit_code == code, result.output + result.stderr
        return " ".join((result.output + result.stderr).split())

    out = ("--out", str(tmp_path / "runs"))
    data = str(tmp_path / "data")
    said = call("--concepts", "all", "--workers", "2", data, "grpo.steps=3", *out, "--seed", "4", code=2)
    assert "1 of 2 jobs failed (wrong)" in said and "1 done, 1 failed" in said
    text = (tmp_path / "runs" / ".jobs" / "plan.yaml").read_text()
    assert "grpo.steps=3" in text and "--seed" in text
    assert "results.csv" in call("--concepts", "fine", data, "grpo.steps=3", *out, "--seed", "4", code=0)
    assert lives(Job("fine", str(tmp_path / "runs"), ())) == ["begun"]
    assert "was begun with" in call("--concepts", "all", data, *out, code=2)
    assert "goes without NAME" in call("--concepts", "all", data, "fine", *out, code=2)
    assert "--concepts needs" in call("--concepts", "all", data, code=2)
    assert "give --concepts" in call(data, "fine", "--shard", "1/2", code=2)


def test_the_table_of_twenty_toys_is_that_of_its_numbers() -> None:
    from experiments import twenty_table
    from experiments.cost_tables import updated

    text = twenty_table.PAGE.read_text(encoding="utf-8")
    parts = {"twenty": twenty_table.table}
    assert updated(text, parts) == text, "run python -m experiments.twenty_table"
    assert updated(text.replace("| toy7 | human | done | 2 |", "| toy7 | human | done | 1 |"), parts) == text
