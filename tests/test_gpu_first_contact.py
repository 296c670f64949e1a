"""What would end the first minutes on a GPU, played through with a stand-in for the device that fails as one does.

The stand-in computes on the CPU. A capture of something that waits is invalidated, and from then on torch's allocator
raises at every `empty_cache` and every later capture, as torch 2.11 does.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engine_gpu, gpu, levers, machine
from benchmarks.engine_report import EngineReport, Number
from benchmarks.ops import cases, clock, memory, peers, run
from benchmarks.ops.__main__ import main as ops_main
from benchmarks.ops.schema import Machine, Report

ROOT = Path(__file__).parent.parent
real_make, real_seconds = cases.make, clock.seconds


class Device:
    """torch.cuda as far as the benchmarks use it."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.mode: Any = 0
        self.capturing, self.spoilt, self.lost = False, False, ""
        self.captured: list[str] = []
        for name in ("empty_cache", "synchronize", "get_sync_debug_mode", "set_sync_debug_mode"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        patch.setattr(torch.cuda, "graph", lambda graph: self)
        patch.setattr(run, "machine", lambda settings: Machine("stand-in", "cuda", 1, 1, settings.smoke))
        patch.setattr(clock, "synchronize", lambda device: self.synchronize())
        patch.setattr(clock, "seconds", lambda call, device: real_seconds(call, "cpu"))
        patch.setattr(clock, "ceilings", lambda *a: (1e9, 1e9))
        patch.setattr(
            run.cases, "make", lambda case, device, dtype, seed=0: real_make(case, "cpu", torch.float32, seed)
        )
        patch.setattr(memory, "cuda_extra", lambda call, inputs: 0)
        patch.setattr(torch.Tensor, "nonzero", self._waits(torch.Tensor.nonzero))
        patch.setattr(torch.Tensor, "item", self._waits(torch.Tensor.item))

    def _waits(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.capturing:
                self.spoilt = True
                raise RuntimeError("operation not permitted when stream is capturing")
            return function(*args, **kwargs)

        return call

    def get_sync_debug_mode(self) -> Any:
        return self.mode

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.mode = mode

    def empty_cache(self) -> None:
        if self.spoilt:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")

    def synchronize(self, *_: object) -> None:
        if self.lost:
            raise RuntimeError(self.lost)

    def __enter__(self) -> None:
        self.empty_cache()
        self.capturing = True

    def __exit__(self, *_: object) -> None:
        self.capturing = False
        if self.spoilt:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def replay(self) -> None:
        self.captured.append("replayed")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def _run(tmp_path: Path, sides: list[peers.Peer], monkeypatch: pytest.MonkeyPatch, **more: Any) -> run.Run:
    able = [dataclasses.replace(side, exact=False) for side in sides]
    monkeypatch.setattr(run, "peers", lambda: able)
    monkeypatch.setattr(peers.Peer, "missing", lambda peer, case, *_: "" if case.operation in peer.builds else "no")
    monkeypatch.setattr(run, "GRAPH_BELOW", float("inf"))  # on a slow machine no call is short
    settings = run.Settings(device="cuda", smoke=True, rounds=1, **more)
    made = run.Run(settings, tmp_path / "ops.json", say=lambda _: None)
    made.all()
    return made


def _waiting(name: str) -> peers.Peer:
    """A side whose call waits for the device."""
    real = peers.by_name("eager")

    def build(inputs: cases.Inputs) -> peers.Call:
        call = real.builds["grpo_loss"](inputs)
        return lambda: (torch.ones(2).nonzero(), call())[1]

    return dataclasses.replace(real, name=name, builds={"grpo_loss": build})


@pytest.mark.slow
def test_what_waits_is_not_captured(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor on a masked case picks its tokens with a nonzero: inside a capture that would end every later one."""
    sides = [peers.by_name("products"), _waiting("waits"), peers.by_name("eager")]
    report = _run(tmp_path, sides, monkeypatch).report
    assert not device.spoilt
    shape = "smoke newly_unmasked"
    assert report.seconds("maskgit_grpo_loss", shape, "products", "forward") is not None
    assert "mask" in (report.reason("maskgit_grpo_loss", shape, "products", "graph") or "")
    assert "synchronizing" in (report.reason("grpo_loss", "smoke", "waits", "graph") or "")
    assert report.seconds("grpo_loss", "smoke", "eager", "forward", "graph") is not None
    assert report.seconds("maskgit_grpo_loss", "smoke", "products", "forward", "graph") is not None


@pytest.mark.slow
def test_a_capture_that_fails_ends_captures_and_nothing_else(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)  # the trial sees nothing
    report = _run(tmp_path, [_waiting("waits"), peers.by_name("eager")], monkeypatch).report
    assert device.spoilt
    for case in cases.suite("cpu", smoke=True):
        assert report.seconds(case.operation, case.shape, "eager", "forward") is not None, "numbers are still taken"
    assert "INTERNAL ASSERT" in (report.reason("grpo_loss", "smoke", "waits", "graph") or "")
    assert "failed before" in (report.reason("grpo_loss", "smoke", "eager", "graph") or "")
    assert Report.load(tmp_path / "ops.json") == report


@pytest.mark.slow
def test_inputs_or_a_side_that_fail_cost_no_other_number(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = peers.by_name("eager"), [0]

    def build(inputs: cases.Inputs) -> peers.Call:
        call = real.builds["grpo_loss"](inputs)

        def sometimes() -> Any:
            count[0] += 1
            if count[0] > 4:  # past the warm-up, while it is timed
                raise ValueError("a shape that a library does not take")
            return call()

        return sometimes

    fails = dataclasses.replace(real, name="fails", builds={"grpo_loss": build})
    make = run.cases.make

    def sometimes(case: cases.Case, *more: Any, **rest: Any) -> cases.Inputs:
        if case.operation == "selected_logprob":
            raise torch.OutOfMemoryError("no room")
        return make(case, *more, **rest)

    monkeypatch.setattr(run.cases, "make", sometimes)
    report = _run(tmp_path, [fails, real], monkeypatch).report
    assert "out of memory" in (report.reason("selected_logprob", "smoke", "eager") or "")
    assert "ValueError" in (report.reason("grpo_loss", "smoke", "fails") or "")
    assert report.seconds("grpo_loss", "smoke", "eager") is not None


@pytest.mark.slow
def test_a_lost_device_ends_the_process_and_the_next_one_goes_on(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access every call fails until the process ends: what is missing is measured by another."""
    real = peers.by_name("eager")

    def build(inputs: cases.Inputs) -> peers.Call:
        def call() -> Any:
            device.lost = "CUDA error: an illegal memory access was encountered"
            raise RuntimeError(device.lost)

        return call

    bad = dataclasses.replace(real, name="bad", builds={"selected_logprob": build})
    first = _run(tmp_path, [bad, real], monkeypatch)
    assert "illegal memory access" in first.lost and len(first.report.cases) == 2
    device.lost = ""
    second = _run(tmp_path, [bad, real], monkeypatch, resume=True)
    assert not second.lost and len(second.report.cases) == len(cases.suite("cpu", smoke=True))
    assert second.report.seconds("maskgit_grpo_loss", "smoke", "eager") == first.report.seconds(
        "maskgit_grpo_loss", "smoke", "eager"
    ), "what was measured is kept"
    assert second.report.seconds("grpo_loss", "smoke", "eager") is not None
    assert "illegal" in (second.report.reason("selected_logprob", "smoke", "bad") or "")


@pytest.mark.slow
def test_what_the_budget_cut_is_measured_when_resumed(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = _run(tmp_path, [peers.by_name("eager")], monkeypatch, budget=1e-9)
    assert not cut.report.measurements
    whole = _run(tmp_path, [peers.by_name("eager")], monkeypatch, resume=True)
    assert len(whole.report.cases) == len(cases.suite("cpu", smoke=True)) and whole.report.measurements
    assert not any(each.reason == run.OVER for each in whole.report.absences)


def test_any_error_of_a_section_of_the_engine_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("")  # without words, as asserts are

    monkeypatch.setattr(engine_gpu.Bench, "images", broken)
    out = tmp_path / "engine.json"
    only = ("images", "small")
    report = engine_gpu.Bench(engine_gpu.SMOKE, "cpu", 500.0, out, True, only).all()
    assert report.absences["images"] == "AssertionError: " and report.find("small image", "eager") is not None
    again = engine_gpu.Bench(engine_gpu.SMOKE, "cpu", 500.0, out, True, (*only, "batched"), resume=True).all()
    assert again.find("images", "batched bfloat16") is not None
    assert [one.work for one in again.numbers].count("small image") == 1, "not measured twice"
    assert EngineReport.load(out) == again


def test_a_lever_that_fails_says_so_and_leaves_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    named = {each.key: each for each in levers.LEVERS}
    some = (dataclasses.replace(named["head"], on=broken), named["gelu"], named["buffers"], named["qkv"])
    monkeypatch.setattr(levers, "LEVERS", some)
    out = tmp_path / "engine-gpu.json"
    report = engine_gpu.Bench(engine_gpu.SMOKE, "cpu", 500.0, out, True, ("levers",)).all()
    said = capsys.readouterr().out
    assert "!!! lever head FAILED: RuntimeError: no kernel image" in said and report.find("lever head", "with") is None
    assert report.absences["lever gelu"].startswith(levers.MISSING)
    for key in ("buffers", "qkv"):
        for side in ("with", "without"):
            found = report.find(f"lever {key}", side)
            assert found is not None and found.amount == engine_gpu.SMOKE.lever_steps and found.seconds > 0
    lines = gpu.lever_lines(tmp_path)
    assert "FAILED" in lines[0] and "no kernel image" in lines[0] and "predicted 4.9 ms less" in lines[0]
    assert all("not measured" in line for line in lines[1:]), "a smoke run measures nothing"
    again = engine_gpu.Bench(engine_gpu.SMOKE, "cpu", 500.0, out, True, ("levers",), resume=True).all()
    assert len(again.numbers) == len(report.numbers), "not measured twice, and what failed is not met again"


def test_each_side_of_a_lever_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over buffers or not, one product or three: seen in what the step calls, not in its time."""
    from pyunictokens.models import adjoining
    from pyunictokens.models.showo.buffers import BufferedAttention

    bench = engine_gpu.Bench(engine_gpu.SMOKE, "cpu", 500.0, None, True, ("levers",))
    bench.model = engine_gpu.random_model(bench.s.config, "cpu", torch.float32)
    monkeypatch.setattr(bench, "note", lambda number: None)
    seen: list[str] = []
    attended, one = BufferedAttention.__call__, adjoining.in_one
    monkeypatch.setattr(BufferedAttention, "__call__", lambda *a: (seen.append("buffers"), attended(*a))[1])
    monkeypatch.setattr(adjoining, "in_one", lambda *a: (seen.append("qkv"), one(*a))[1])
    for lever in levers.LEVERS:
        if lever.key in ("buffers", "qkv"):
            for way, used in ((lever.on, True), (lever.off, False)):
                seen.clear()
                bench.lever(dataclasses.replace(lever, on=way, off=way))
                assert (lever.key in seen) is used


def test_levers_beside_their_predictions(tmp_path: Path) -> None:
    from experiments.cost_tables import lever_predictions

    predicted = {each.key: each for each in lever_predictions()}
    assert set(predicted) <= {each.key for each in levers.LEVERS}, "whatever is predicted is measured"
    report = EngineReport(Machine("a card", "cuda", 1, 1, False), {}, None, "", "", {})
    more = predicted["buffers"].before - predicted["buffers"].after
    for key, saved in (("buffers", 1.01 * more), ("qkv", 0.0001), ("attention cudnn", 0.002)):
        for side, seconds in (("with", 0.1), ("without", 0.1 + saved)):
            report.numbers.append(Number(f"lever {key}", side, 4 * seconds, 3, 4, "steps"))
    report.absences["lever fp8"] = f"{levers.MISSING}: an old card"
    report.absences["lever compiled"] = "OutOfMemoryError: no room"
    report.save(tmp_path / "engine-gpu.json")
    lines = dict(zip((each.key for each in levers.LEVERS), gpu.lever_lines(tmp_path), strict=True))
    assert lines["buffers"].startswith("  met ") and "100.00 ms a step with it, 105.89 without" in lines["buffers"]
    assert lines["qkv"].startswith("  MISSED") and "predicted 1.3 ms less" in lines["qkv"]
    assert lines["attention cudnn"].startswith("  measured") and "1.020 ×" in lines["attention cudnn"]
    assert "not measured" in lines["fp8"] and "an old card" in lines["fp8"]
    assert "FAILED" in lines["compiled"] and "no room" in lines["compiled"]
    assert "not measured" in lines["head"]


@pytest.mark.parametrize("main", [ops_main, engine_gpu.main])
def test_one_of_several_gpus_is_made_the_current_one(main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and graphs are of the current device: a benchmark of another one would time nothing."""

    class Taken(Exception):
        pass

    def take(device: str) -> None:
        raise Taken(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cuda:1", "--smoke"])
    with pytest.raises(Taken, match="cuda:1"):
        main()


def test_without_git_there_is_no_commit_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("UCT_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit() is None
    monkeypatch.setenv("UCT_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"


def _program(file: Path, text: str = "#!/bin/sh\n") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_nvcc_is_found_off_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    toolkit, nothing = tmp_path / "local" / "cuda", str(tmp_path / "empty")
    assert gpu.find_nvcc(nothing, [str(toolkit)]) is None
    versioned = _program(tmp_path / "local" / "cuda-13.0" / "bin" / "nvcc")
    assert gpu.find_nvcc(nothing, [str(toolkit)]) == str(versioned)
    home = _program(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert gpu.find_nvcc(nothing, [str(toolkit)]) == str(home)
    on_path = _program(tmp_path / "path" / "nvcc")
    assert gpu.find_nvcc(str(on_path.parent), [str(toolkit)]) == str(on_path)


def test_a_core_without_cuda_is_said_out_loud(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[tuple[str, dict[str, str]]] = []
    nvcc = _program(tmp_path / "cuda" / "bin" / "nvcc")
    monkeypatch.setattr(gpu, "CARRIED", tmp_path / "none")
    monkeypatch.setattr(gpu, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(gpu, "_install", lambda out, cuda, more: built.append((cuda, more)))
    monkeypatch.setattr(gpu, "_look", lambda: {"version": "0", "cuda": None})
    gpu.core(tmp_path, "cuda")
    said = capsys.readouterr().out
    assert [each[0] for each in built] == ["on", "off"], "asked for CUDA by name, then did without"
    assert built[0][1]["CUDACXX"] == str(nvcc) and "90a-real" in built[0][1]["PYUNICTOKENS_CMAKE_ARGS"]
    assert "!!! THE CORE HAS NO CUDA PART" in said and "built: has no CUDA part" in said
    assert gpu.read(tmp_path, "core")["source"] == "built without CUDA"
    built.clear()
    monkeypatch.setattr(gpu, "_look", lambda: {"version": "0", "cuda": {"device_count": 1}})
    gpu.core(tmp_path, "cuda")
    assert [each[0] for each in built] == ["on"] and not gpu.read(tmp_path, "core")["fell_back"]


def test_the_summary_of_a_folder_where_nothing_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.summary(tmp_path, "cuda")
    said = capsys.readouterr().out
    assert "card: unknown" in said and "tests: no result" in said and "0 goals met, 0 missed" in said
    assert "ops: wrote nothing" in said


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(script), "--dry-run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=3000,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("environment", "core", "smoke", "tests", "ops", "engine", "grpo", "levers"):
        assert f"{name}: begins" in done.stdout and f"{name}: ended well" in done.stdout, done.stdout[-3000:]
    out = tmp_path / "out"
    probes = gpu.read(out, "smoke")["probes"]
    assert len(probes) > 10 and all(said.startswith("ok") for said in probes.values()), probes
    assert gpu.read(out, "core")["source"] == "as installed" and "dry run" in gpu.read(out, "environment")["card"]
    counted = gpu.counted_tests(out)
    assert counted is not None and counted["passed"] > 0 and counted["failed"] == 0
    report = Report.load(out / "ops-gpu.json")
    assert report.machine.smoke and len(report.cases) == len(cases.suite("cpu", smoke=True))
    engine = EngineReport.load(out / "engine-gpu.json")
    parts = {"answers", "images", "reference", "update", "optimizer", "whole step"}
    works = {(one.work, one.side) for one in engine.numbers}
    assert engine.machine.smoke and engine.rates is not None
    assert works >= {
        ("images", "eager"),
        ("images", "batched bfloat16"),
        ("images", "published"),
        ("answers", "engine"),
    }
    assert works >= {(f"grpo T={steps}", part) for steps in engine_gpu.SMOKE.grpo_steps for part in parts}
    able = {f"lever {key}" for key in ("buffers", "head", "qkv", "fp8", "compiled")}
    assert works >= {(work, side) for work in able for side in ("with", "without")}
    of_levers = {work: reason for work, reason in engine.absences.items() if work.startswith("lever ")}
    assert of_levers and all(reason.startswith(levers.MISSING) for reason in of_levers.values()), of_levers
    assert all(one.rate > 0 for one in engine.numbers) and set(engine.checks.values()) == {1.0}
    last = done.stdout[done.stdout.index("card:") :]
    assert "0 goals met, 0 missed" in last and "maskgit_grpo_loss" in last and "answers: 40 ×" in last
    assert "not measured  GELU in the product's epilogue" in last and "predicted 5.2 ms less" in last
    assert (out / "summary.txt").read_text() in done.stdout
    assert subprocess.run(["bash", str(script)], capture_output=True, env=environment).returncode == 2


def test_the_script_refuses_a_machine_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--first"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 1 and "torch finds no GPU here" in done.stdout
