"""The benchmark suite of the operations, end to end on tiny shapes: run, report, tables, pictures; and its honesty.

What is held: a side that computes something else is never timed, a missing number names its reason, the pages are what
the results say. No test looks at a speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import compare, engine_report, machine, plan
from benchmarks.engine_report import EngineReport, Number
from benchmarks.ops import cases, check, clock, goals, memory, peers, plot, run, schema, tables
from benchmarks.ops.cases import Case
from benchmarks.ops.schema import Absence, CaseInfo, Machine, Measurement, Memory, Rates, Report

ROOT = Path(__file__).parent.parent
SIDES = ("ours-reference", "ours-cpu", "eager", "cce", "products")
SMOKE = cases.suite("cpu", smoke=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a smoke run of some sides, as the command line makes it."""
    out = tmp_path_factory.mktemp("bench") / "ops-smoke.json"
    code, said = command("benchmarks.ops", "--smoke", "--device", "cpu", "--out", out, "--peers", *SIDES)
    assert code == 0 and "not measured: cce: " in said
    return out


def command(module: str, *words: object) -> tuple[object, str]:
    """(what `python -m module` with these words ends with, what it printed), in this process: torch is here already."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", [module, *map(str, words)])
        patch.delitem(sys.modules, module, raising=False)  # imported above; runpy would warn of it
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code or 0, said.getvalue()
    return 0, said.getvalue()


def test_a_smoke_run_measures_every_case(smoke: Path) -> None:
    report = Report.load(smoke)
    assert report.machine.smoke and report.machine.device == "cpu" and report.date and "--smoke" in report.command
    assert set(report.versions) >= {"torch", "liger-kernel", "trl", "cut-cross-entropy", "python", "pyunictokens"}
    assert report.rates is not None and report.rates.copy_bytes_per_second > 0
    assert {info.operation for info in report.cases} == set(cases.OPERATIONS)
    for case in SMOKE:
        for peer in ("ours-reference", "eager"):
            for phase in case.phases:
                found = report.measurement(case.operation, case.shape, peer, phase)
                assert found is not None and 0 < found.low <= found.seconds <= found.high
            held = report.extra(case.operation, case.shape, peer)
            assert held is not None and held.extra_bytes >= 0
        forward = report.measurement(case.operation, case.shape, "eager", "forward")
        assert forward is not None and forward.fraction is not None and forward.fraction > 0
        assert report.reason(case.operation, case.shape, "cce")
    assert {(one.operation, one.peer) for one in report.checks} >= {(each, "eager") for each in cases.OPERATIONS}
    assert all(one.value <= 1e-4 and (one.gradient or 0) <= 1e-4 for one in report.checks)


def test_the_pages_are_made_from_a_report(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="smoke"):
        _write(Report.load(smoke), tmp_path)
        tables.load(tmp_path)
    report = Report.load(smoke)
    report.machine = dataclasses.replace(report.machine, smoke=False)
    _write(report, tmp_path)
    summary, full = tables.summary(tmp_path), tables.full(tmp_path)
    for operation in cases.OPERATIONS:
        assert f"`{operation}` (float32)" in summary and f"#### {operation} on the CPU" in full
    assert "The operations on a GPU: not measured" in summary and "On a GPU nothing was measured" in full
    assert "cut-cross-entropy" in summary and ("GPU only" in summary or "not installed" in summary)
    assert full.count("not measured") >= len(goals.GOALS)
    made = tmp_path / "ops-x-grpo_loss.png"
    assert plot.draw(report, "grpo_loss", made) and made.stat().st_size > 1000
    assert "ops-x-grpo_loss.png" in tables.full(tmp_path, tmp_path)
    for number, operation in enumerate(cases.OPERATIONS):
        roof = tmp_path / f"ops-x-{operation}-roofline.png"
        assert plot.roofline(report, operation, roof) and (number or roof.stat().st_size > 1000)
        # one is painted; of the others every step before that runs
        monkeypatch.setattr(Figure, "tight_layout", lambda self: None)
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.touch())
    assert "grpo_loss on " in tables.full(tmp_path, tmp_path) and ": roofline]" in tables.full(tmp_path, tmp_path)


def _write(report: Report, folder: Path) -> None:
    report.save(folder / "ops-x.json")


def test_every_page_says_what_the_results_say() -> None:
    assert command("experiments.readme_tables", "--check")[0] == 0


def test_another_schema_is_refused(smoke: Path, tmp_path: Path) -> None:
    content = json.loads(smoke.read_text())
    content["schema"] = 99
    (tmp_path / "ops-x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="schema=99"):
        Report.load(tmp_path / "ops-x.json")


@pytest.mark.parametrize("name", [peer.name for peer in peers.peers() if peer.exact and peer.name != "compile"])
@pytest.mark.parametrize("case", SMOKE, ids=lambda case: f"{case.operation}-{case.shape}")
def test_every_side_that_runs_here_computes_the_same(name: str, case: Case) -> None:
    peer = peers.by_name(name)
    reason = peer.missing(case, "cpu", torch.float32)
    if reason:
        pytest.skip(f"{peer.title}: {reason}")
    check.check(peer, case, "cpu", torch.float32)


def test_a_side_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = peers.by_name("eager")
    halved = {name: (lambda i, b=build: lambda: 0.5 * b(i)()) for name, build in real.builds.items()}
    wrong = dataclasses.replace(real, builds=halved)
    monkeypatch.setattr(run, "peers", lambda: [peers.by_name("ours-reference"), wrong])
    settings = run.Settings(smoke=True, operations=("grpo_loss",), rounds=1, with_memory=False)
    report = run.Run(settings, tmp_path / "x.json", say=lambda _: None).all()
    assert "wrong: 5" in (report.reason("grpo_loss", "smoke", "eager") or "")
    assert report.seconds("grpo_loss", "smoke", "eager") is None
    assert report.seconds("grpo_loss", "smoke", "ours-reference") is not None


def test_a_budget_cuts_the_tail_and_says_so(tmp_path: Path) -> None:
    settings = run.Settings(smoke=True, only_peers=("eager",), rounds=1, budget=1e-9, with_memory=False)
    report = run.Run(settings, tmp_path / "x.json", say=lambda _: None).all()
    assert not report.measurements and len(report.cases) == len(SMOKE)
    assert report.reason("grpo_loss", "smoke", "eager") == "time budget spent"


def test_sides_take_turns() -> None:
    order: list[str] = []
    turns = [clock.Turn(lambda _, n=name: order.append(n)) for name in "ab"]
    clock.rounds(turns, "cpu", 3, share=60.0)
    assert "".join(order) == "abbaab" and all(len(turn.samples) == 3 for turn in turns)
    for spent, least in ((2.0, clock.MIN_ROUNDS), (1e9, clock.FEWEST)):  # past its share, and far past it
        slow = clock.Turn(lambda _: None, spent=spent)
        clock.rounds([slow], "cpu", clock.MIN_ROUNDS + 4, share=1.0)
        assert len(slow.samples) == least


def test_extra_memory_sees_what_a_side_holds() -> None:
    case = Case("selected_logprob", "x", {"R": 2, "T": 2, "N": 64, "D": 8, "K": 2048})
    plain = memory.measure_here("eager", case).extra_bytes
    logits = 4 * case.tokens * 2048
    assert 2 * logits <= plain <= 6 * logits


@pytest.mark.slow
def test_memory_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = [case for case in SMOKE if case.operation == "grpo_loss"]
    (held,) = memory.measure_apart("eager", wanted, smoke=True)
    assert held.operation == "grpo_loss" and held.extra_bytes > 0
    code, _ = command("benchmarks.ops.memory", "--smoke", "eager", "grpo_loss", "none")
    assert code == "grpo_loss none: no such case"
    broken = tmp_path / "python"  # as quick as a process that fails can be
    broken.write_text("#!/bin/sh\necho first >&2; echo grpo_loss none: no such case >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RuntimeError, match=r"^grpo_loss none: no such case$"):
        memory.measure_apart("eager", [Case("grpo_loss", "none", {})], smoke=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cost_model(device: str) -> None:
    suite = {(case.operation, case.shape): case for case in cases.suite(device)}
    assert len(suite) == len(cases.suite(device)), "a case is there twice"
    assert {operation for operation, _ in suite} == set(cases.OPERATIONS)
    for goal in goals.GOALS:  # every goal speaks of a case that exists: an empty report answers none of them
        assert goal.answer(_report(device if goal.device == device else goal.device)) is None
    if device == "cuda":
        case = suite[goals.HEAD, goals.FIRST]
        assert case.tokens == 460800 and case.flops()["both"] == pytest.approx(46.4e12, rel=1e-2)
        kept = suite[goals.HEAD, f"{goals.FIRST} newly_unmasked"]
        assert kept.kept() == pytest.approx(1 / 50) and kept.flops()["both"] == pytest.approx(case.flops()["both"] / 50)


@pytest.mark.parametrize("scope", ["masked", "newly_unmasked"])
def test_masks_hold_the_share_they_say(scope: str) -> None:
    case = Case("maskgit_grpo_loss", "x", {"R": 3, "T": 5, "N": 40, "D": 4, "K": 8}, scope=scope)
    mask = cases.make(case, "cpu", torch.float32).mask
    assert mask.float().mean().item() == pytest.approx(case.kept())
    shown = mask if scope == "newly_unmasked" else mask[:, :-1] & ~mask[:, 1:]
    assert (shown.sum(1) <= 1).all(), "a position is shown once"


def _report(device: str) -> Report:
    return Report(Machine("X", device, 2, 2, False), {"torch": "2"}, None, "c", "2026-01-01T00:00:00", peers={})


def test_goals_are_judged_by_what_was_measured() -> None:
    report = _report("cuda")
    report.peers = {"ours-triton": "ours: triton", "eager": "plain PyTorch", "trl": "TRL", "products": "products"}
    for shape, kept in ((goals.FIRST, 1.0), (f"{goals.FIRST} newly_unmasked", 0.02)):
        report.cases.append(CaseInfo(goals.HEAD, shape, {"kept": kept}, "bfloat16", "matrix", {}, {}))
    for peer, shape, took in (
        ("ours-triton", goals.FIRST, 1.1),
        ("ours-triton", f"{goals.FIRST} newly_unmasked", 0.05),
        ("products", goals.FIRST, 1.0),
        ("eager", goals.FIRST, 3.3),
        ("trl", goals.FIRST, 2.2),
    ):
        report.measurements.append(Measurement(goals.HEAD, shape, peer, "both", "call", took, took, took, 5))
    report.memory.append(Memory(goals.HEAD, goals.FIRST, "ours-triton", 2 << 30))
    answers = [goal.answer(report) for goal in goals.GOALS if goal.device == "cuda"]
    assert answers[:4] == [("1.10 ×", True), None, ("2048 MiB", False), ("2.00 × (TRL)", True)]
    assert answers[4] is not None and not answers[4][1], "2.3 times its share is not proportional"
    assert answers[5:] == [None] * 3
    text = tables.goals([report])
    assert "| 2048 MiB | **no** |" in text and text.count("not measured") == len(goals.GOALS) - 4


def test_reports_survive_a_round_trip(tmp_path: Path) -> None:
    report = _report("cpu")
    report.rates = Rates(1e9, 1e12, "float32", 0.01)
    report.absences.append(Absence("grpo_loss", "*", "cce", "GPU only"))
    report.save(tmp_path / "ops-a.json")
    assert Report.load(tmp_path / "ops-a.json") == report
    assert report.reason("grpo_loss", "any", "cce") == "GPU only" and report.reason("grpo_loss", "any", "trl") is None
    assert schema.VERSION == 1


def test_the_engines_goals_are_answered_from_its_report(tmp_path: Path) -> None:
    report = EngineReport(Machine("X", "cuda", 2, 2, False), {}, "abc", "c", "2026-01-01", {"T": 50})
    report.rates = Rates(1e12, 100.0, "bfloat16", 0.0)
    assert all(goal.measured(report) is None for goal in engine_report.GOALS)
    empty = engine_report.goals(None)
    assert empty.count("not measured") == len(engine_report.GOALS) == 8
    report.numbers = [
        Number("images", "loop", 2.0, 3, 9, "images", flops=120.0),
        Number("images", "published", 9.0, 3, 1, "images", note="4 steps timed, scaled to 50"),
        Number("images", "batched bfloat16", 4.0, 3, 9, "images"),
        Number("grpo T=10", "whole step", 9.0, 1, 1, "steps", peak_bytes=60 * 10**9),
        Number("grpo T=50", "whole step", 40.0, 1, 1, "steps", peak_bytes=66 * 10**9),
        Number("grpo T=50", "update", 20.0, 1, 1, "steps", flops=1000.0),
    ]
    report.absences["answers"] = "RuntimeError: no room"
    values = [goal.measured(report) for goal in engine_report.GOALS]
    assert values == [pytest.approx(v) if v else None for v in (40.5, 2.0, 0.6, None, None, 66.0, 1.1, 0.5)]
    text = engine_report.goals(report)
    assert "| 40.50 × | yes |" in text and "| 2.00 × | **no** |" in text and "| 1.100 × | **no** |" in text
    report.save(tmp_path / "engine-x.json")
    assert EngineReport.load(tmp_path / "engine-x.json") == report
    page = engine_report.full(tmp_path)
    assert "4 steps timed, scaled to 50" in page and "no room" in page and "66.0 GB" in page
    assert "The rollout engine on X (T 50)" in engine_report.summary(tmp_path)
    assert "not measured" in engine_report.summary(tmp_path / "none")
    report.machine = Machine("X", "cuda", 2, 2, True)
    report.save(tmp_path / "engine-x.json")
    with pytest.raises(ValueError, match="smoke"):
        engine_report.full(tmp_path)
    (tmp_path / "engine-y.json").write_text("{}")
    with pytest.raises(ValueError, match="what='engine'"):
        EngineReport.load(tmp_path / "engine-y.json")


def test_the_adapter_of_ligers_kernels_computes_the_same() -> None:
    """GPU only, so their Triton kernels run in the interpreter, in a process of their own."""
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("Liger-Kernel is not installed")
    code = """
import dataclasses
import torch
from benchmarks import compare, engine_report, machine, plan
from benchmarks.engine_report import EngineReport, Number
from benchmarks.ops import cases, check, peers
peer = peers.by_name("liger-triton")
for case in cases.suite("cpu", smoke=True):
    if case.operation in peer.builds:
        case = dataclasses.replace(case, bias=case.bias and peer.with_bias)
        print("checked", check.check(peer, case, "cpu", torch.float32))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count("checked") == 3, done.stderr[-2000:]


def test_the_adapter_of_cut_cross_entropy_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels run on a GPU alone; the adapter is held against float64 over that library's own plain way."""
    cce = pytest.importorskip("cut_cross_entropy", reason="cut-cross-entropy is not installed")
    with_kernels = cce.linear_cross_entropy
    monkeypatch.setattr(cce, "linear_cross_entropy", lambda *a, **k: with_kernels(*a, **k, impl="torch_compile"))
    peer = peers.by_name("cce")
    for case in SMOKE:
        if case.operation in peer.builds and case.scope == "all":
            with torch.compiler.set_stance("force_eager"):
                check.check(peer, dataclasses.replace(case, bias=case.bias and peer.with_bias), "cpu", torch.float32)


def test_two_reports_are_compared_and_a_slower_one_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def report(name: str, took: float, spread: float, extra: int, smoke: bool = False) -> Path:
        made = _report("cpu")
        made.machine = dataclasses.replace(made.machine, smoke=smoke)
        for peer in ("ours-cpu", "eager"):
            low, high = took * (1 - spread), took * (1 + spread)
            made.measurements.append(Measurement("grpo_loss", "x", peer, "both", "call", took, low, high, 5))
        made.memory.append(Memory("grpo_loss", "x", "ours-cpu", extra))
        made.save(tmp_path / name)
        return tmp_path / name

    old = report("old.json", 1.0, 0.01, 100)
    lines, worse = compare.compare(old, report("new.json", 1.2, 0.01, 100), 0.05)
    assert worse == ["grpo_loss x, cpu, both (call)"] and "+20.0%" in lines[0] and "WORSE" in lines[0]
    assert len(lines) == 2, "sides of others do not count"
    assert compare.compare(old, report("noisy.json", 1.2, 0.3, 100), 0.05)[1] == [], "within the spread"
    assert compare.compare(old, report("large.json", 1.0, 0.01, 200), 0.05)[1] == ["grpo_loss x, cpu, memory"]
    assert compare.compare(old, tmp_path / "new.json", 0.25)[1] == []
    with pytest.raises(ValueError, match="smoke"):
        compare.compare(old, report("smoke.json", 1.0, 0.01, 100, smoke=True), 0.05)
    assert compare.percent("5%") == compare.percent("0.05") == 0.05
    for more, code in ((["--fail-above", "5%"], 1), (["--fail-above", "25%"], 0), ([], 0), (["--fail-above", "-1"], 2)):
        assert command("benchmarks.compare", old, tmp_path / "new.json", *more)[0] == code


def test_a_case_of_ones_own() -> None:
    case = cases.own("maskgit_grpo_loss:R=9,T=2,N=3,D=4,K=5,scope=masked,guidance=5,bias=1")
    assert case.sizes == {"R": 9, "T": 2, "N": 3, "D": 4, "K": 5} and case.bias
    assert case.scope == "masked" and case.guidance == 5.0
    for bad in ("speed:R=1", "maskgit_step:B=1,N=2", "maskgit_step:B=1,N=2,K=0", "grpo_loss:R=1,T=1,N=1,D=2"):
        with pytest.raises(ValueError, match=bad.partition(":")[0]):
            cases.own(bad)


def test_the_plan_of_a_shape_is_printed() -> None:
    lines = plan.describe("R=9,T=50,N=1024,D=2048,K=8192", "bfloat16")
    assert lines[0].startswith("460800 tokens") and all("assumed" in line for line in lines[3:6])
    assert sum("MiB" in line for line in lines) == 2
    assert lines[-1].startswith("statistics: by the rows; no GPU here") or "measured on" in lines[-1]


def test_results_go_to_the_clone_or_beside_the_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT / "docs")
    assert machine.results() == ROOT / "benchmarks" / "results"
    monkeypatch.chdir(tmp_path)
    assert machine.results() == tmp_path / "benchmark-results"
