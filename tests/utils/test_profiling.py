"""Phases: whose time it is, operations, what happens without a recorder, nvtx ranges, traces and the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyunictokens.models.showo import costs as cost
from pyunictokens.utils import profiling
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.profiling import PhaseReport, PhaseTotal, Recorder, count, phase, step_done, trace
from tests.rollout.tiny import CONFIG, tiny_engine, tiny_model


def test_time_goes_to_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *range(10, 1000, 10)])
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(clock)))
    with Recorder() as recorder:  # the clock says 0
        with phase("rollout steps"), phase("previews"), phase("decode", unless="previews"):  # 10, 20, nothing; 30, 40
            pass
        with phase("update"):  # 50, 60
            pass
    found = {total.name: (total.calls, total.seconds) for total in recorder._totals.values()}
    assert found == {"rollout steps": (1, 20.0), "previews": (1, 10.0), "update": (1, 10.0)}


def test_decorated_functions_may_call_themselves_and_may_fail() -> None:
    @phase("decode")
    def down(depth: int) -> int:
        if depth < 0:
            raise RuntimeError
        return depth and down(depth - 1) + 1

    assert down(3) == 3, "without a recorder"
    with Recorder() as recorder:
        assert down(3) == 3
        with pytest.raises(RuntimeError):
            down(-1)
    assert recorder._totals["decode"].calls == 5 and not recorder._open


def test_operations_are_computed_only_where_they_are_wanted() -> None:
    count("update", lambda: pytest.fail("nobody listens"))
    with Recorder() as recorder:
        count("update", lambda: 5.0)
        count("update", lambda: 7.0)
    count("update", lambda: pytest.fail("nobody listens any more"))
    assert recorder._totals["update"].flops == 12


def test_a_report_goes_to_a_file_and_back(tmp_path: Path) -> None:
    with Recorder() as recorder:
        for name in ("something else", "update", "prefill"):
            with phase(name):
                pass
        count("prefill", lambda: 1e6)
    report = recorder.report(torch.float32)
    assert [total.name for total in report.phases] == ["prefill", "update", "something else"]
    assert report.matrix_flops_per_second > 1e8 and report.dtype == "float32" and report.device == "cpu"
    Recorder.save(tmp_path / "phases.json", report)
    assert PhaseReport.load(tmp_path / "phases.json") == report
    one = PhaseReport("x", "bfloat16", 100.0, 9.0, [])
    assert one.fraction(PhaseTotal("a", 1, 2.0, 50.0)) == 0.25
    assert one.fraction(PhaseTotal("a", 1, 2.0)) is None and one.fraction(PhaseTotal("a", 1, 0.0, 5.0)) is None
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="not a report"):
        PhaseReport.load(tmp_path / "other.json")


def test_nvtx_ranges_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("end"))
    monkeypatch.setattr(profiling, "_has_nvtx", lambda: True)
    with phase("update"), phase("optimizer"):
        pass
    assert seen == ["update", "optimizer", "end", "end"]
    monkeypatch.setattr(profiling, "_has_nvtx", lambda: False)
    with phase("update"):
        pass
    assert len(seen) == 4


def test_a_trace_holds_the_phases_and_ends_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "new" / "trace.json"
    with trace(file):
        for step in range(profiling.TRACED_STEPS + 1):
            assert file.exists() == (step >= profiling.TRACED_STEPS)
            with phase(f"step {step}"):
                torch.ones(3).sum()
            step_done()
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert {"step 0", "step 1", "aten::sum"} <= names and "step 2" not in names
    with trace(None), phase("x"):
        pass
    short = tmp_path / "short.json"
    with trace(short), phase("alone"):
        pass
    assert "alone" in short.read_text() and [f.name for f in tmp_path.iterdir() if "part" in f.name] == []


@pytest.mark.slow
def test_a_trace_without_a_gpu_prints_nothing(tmp_path: Path) -> None:
    code = "import torch; from pyunictokens.utils.profiling import trace\nwith trace('a.json'): torch.ones(3).sum()"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("KINETO_LOG_LEVEL", None)
    command = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "") and "aten::sum" in (tmp_path / "a.json").read_text()


def test_the_engine_tells_its_phases_and_what_they_cost() -> None:
    model = tiny_model(dtype=torch.float32)
    engine = tiny_engine(model)
    with Recorder() as recorder:
        images = engine.generate_images([[1, 2, 3]], samples=2, steps=3, guidance_scale=2.0)
        engine.generate_text(images.codes[:1], [[4, 5]], samples=2, max_new_tokens=3)
    totals = {total.name: total for total in recorder.report(torch.float32).phases}
    assert list(totals) == ["prefill", "rollout steps", "decode", "answers"]
    assert all(total.seconds > 0 for total in totals.values())
    prompt = 3 + 3
    assert totals["rollout steps"].flops == 6 * cost.image_step(CONFIG, 1, prompt, 9).flops
    assert totals["prefill"].flops == cost.prefill(CONFIG, prompt).flops + cost.prefill(CONFIG, 3).flops
    assert totals["answers"].flops > 0


def test_shares_and_ways_taken_are_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pyunictokens.cli.shell import show_phases

    profiling.share("nobody listens", 1, 1)
    profiling.taken("nobody listens", "x")
    with Recorder() as recorder:
        profiling.share("row-steps that ran captured", 0, 30)
        profiling.share("row-steps that ran captured", 10, 10)
        for way in ("one kernel", "another", "one kernel"):
            profiling.taken("attention", way)
    report = recorder.report(torch.float32)
    assert report.shares == {"row-steps that ran captured": 0.25}
    assert report.paths == {"attention": "one kernel, another"}
    Recorder.save(tmp_path / "phases.json", report)
    assert PhaseReport.load(tmp_path / "phases.json") == report
    show_phases(report)
    said = capsys.readouterr().out
    assert "row-steps that ran captured" in said and "25.0 %" in said and "another" in said
