"""Runs the suite: checks every side against float64, times it beside the others, takes its memory, writes the report.

What a side cannot do is written down by name with the reason. A time budget cuts the tail of the list of cases, and
says so. The report is saved after every case, so an interrupted run leaves what it has.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import commit, cores, processor, results
from pyunictokens import __version__, ops

from . import cases, check, clock, memory
from .cases import Case, Inputs
from .peers import Peer, peers
from .schema import Absence, CaseInfo, Machine, Measurement, Report

PACKAGES = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "pyunictokens")
OVER = "time budget spent"
GRAPH_BELOW = 2e-3
"""A forward call shorter than this is also timed as the replay of a captured graph, without the launches of Python."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked for."""

    device: str = "cpu"
    smoke: bool = False
    operations: tuple[str, ...] = cases.OPERATIONS
    only_peers: tuple[str, ...] = ()
    rounds: int = 20
    share: float = 5.0
    """Seconds that one side may take of one phase, past its first rounds."""
    budget: float = float("inf")
    """Seconds of the whole run."""
    with_memory: bool = True
    shapes: tuple[Case, ...] = ()
    """Cases of the caller's own, instead of the suite's."""
    resume: bool = False
    """Go on where the report that lies in the result file ended: in another process after one that was lost."""

    @property
    def dtype(self) -> torch.dtype:
        """float32 on a CPU, bfloat16 on a GPU."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def machine(settings: Settings) -> Machine:
    """This machine."""
    name = processor() if settings.device == "cpu" else torch.cuda.get_device_name(settings.device)
    return Machine(name, settings.device.partition(":")[0], cores(), torch.get_num_threads(), settings.smoke)


def versions() -> dict[str, str]:
    """Of everything that was compared; "not installed" where it was not."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "torch": torch.__version__, "pyunictokens": __version__}


def default_file(about: Machine) -> Path:
    """ops-<machine>.json among the results; a smoke run's own folder, outside of what tables are made from."""
    name = "".join(letter if letter.isalnum() else "-" for letter in about.name.lower()).strip("-")
    if about.device == "cpu":
        name = f"cpu-{about.cores}core"
    return results() / ("smoke" if about.smoke else "") / f"ops-{name}.json"


class Run:
    """One run of the suite into one report."""

    def __init__(self, settings: Settings, out: Path | None = None, say: Callable[[str], None] = print):
        self.settings, self.say = settings, say
        about = machine(settings)
        self.report = Report(
            machine=about,
            versions=versions(),
            commit=commit(),
            command=shlex.join(["python", "-m", "benchmarks.ops", *sys.argv[1:]]),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        self.out = out or default_file(about)
        self.sides = [p for p in peers() if not settings.only_peers or p.name in settings.only_peers]
        self.report.peers = {peer.name: peer.title for peer in self.sides}
        self.wrong: dict[tuple[str, str, str, float], str] = {}
        self.no_graphs = ""
        """Why nothing is captured any more."""
        self.lost = ""
        """Why nothing can be measured any more: an error that a GPU keeps until its process ends."""
        self.start = time.monotonic()
        if settings.resume and self.out.exists():
            before = Report.load(self.out)
            cut = {(each.operation, each.shape) for each in before.absences if each.reason == OVER}
            before.cases = [info for info in before.cases if (info.operation, info.shape) not in cut]
            before.absences = [each for each in before.absences if each.reason != OVER]
            self.report.cases, self.report.checks = before.cases, before.checks
            self.report.measurements, self.report.memory = before.measurements, before.memory
            self.report.absences, self.report.rates = before.absences, before.rates

    def left(self) -> float:
        return self.settings.budget - (time.monotonic() - self.start)

    def absent(self, case: Case, peer: Peer, reason: str, what: str = "time") -> None:
        self.report.absences.append(Absence(case.operation, case.shape, peer.name, reason, what))

    def all(self) -> Report:
        """Every case, the ceilings before and after."""
        settings = self.settings
        first = clock.ceilings(settings.device, settings.dtype, settings.smoke)
        self.report.rates = clock.rates(first, first, settings.dtype)
        known = list(settings.shapes) or cases.suite(self.report.machine.device, settings.smoke)
        done = {(info.operation, info.shape) for info in self.report.cases}
        wanted = [case for case in known if case.operation in settings.operations]
        wanted = [case for case in wanted if (case.operation, case.shape) not in done]
        for number, case in enumerate(wanted, 1):
            self.say(f"[{number}/{len(wanted)}] {case.operation} {case.shape}")
            if self.left() <= 0:
                self.report.cases.append(self.info(case))
                for peer in self.sides:
                    self.absent(case, peer, OVER)
                continue
            self.report.cases.append(self.info(case))
            self.report.save(self.out)  # who resumes does not meet this case again, whatever it does to the process
            self.one(case)
            gc.collect()
            self.fill_fractions()
            self.report.save(self.out)
            if self.lost:
                self.say(f"the device is lost to this process ({self.lost}): run again with --resume")
                return self.report
        if settings.device == "cpu" and settings.with_memory:
            self.memory_apart(wanted)
        last = clock.ceilings(settings.device, settings.dtype, settings.smoke)
        self.report.rates = clock.rates(first, last, settings.dtype)
        self.fill_fractions()
        self.report.save(self.out)
        return self.report

    def info(self, case: Case) -> CaseInfo:
        sizes: dict[str, float] = {**case.sizes, "kept": case.kept(), "guidance": case.guidance, "spread": case.spread}
        dtype = self.settings.dtype
        return CaseInfo(
            case.operation,
            case.shape,
            sizes,
            "float32" if case.operation == "grpo_loss" else str(dtype).removeprefix("torch."),
            case.bound,
            case.flops(),
            case.bytes(dtype),
        )

    def able(self, case: Case) -> list[Peer]:
        """The sides that can run the case and compute what they should."""
        found = []
        for peer in self.sides:
            reason = peer.missing(case, self.settings.device, self.settings.dtype)
            kind = ("", 0.0) if peer.name == "compile" else (case.scope, case.guidance)  # each kind would compile anew
            key = (case.operation, peer.name, *kind)
            if not reason and peer.exact and key not in self.wrong:
                try:
                    self.report.checks.append(check.check(peer, case, self.settings.device, self.settings.dtype))
                    self.wrong[key] = ""
                except Exception as error:
                    self.wrong[key] = _brief(error)
                torch._dynamo.reset()
            reason = reason or self.wrong.get(key, "")
            if reason:
                self.absent(case, peer, reason)
            else:
                found.append(peer)
        return found

    def one(self, case: Case) -> None:
        """All sides of one case. A side that fails is noted with its reason; the others go on."""
        able = self.able(case)
        try:
            inputs = cases.make(case, self.settings.device, self.settings.dtype)
        except Exception as error:
            for peer in able:
                self.absent(case, peer, f"inputs: {_brief(error)}")
            self.tidy()
            return
        calls: dict[str, Callable[[], object]] = {}
        for peer in able:
            try:
                call = peer.builds[case.operation](inputs)
                self.warm_up(call, inputs)
                calls[peer.name] = call
            except Exception as error:
                self.absent(case, peer, _brief(error))
            self.tidy()
        turns = {(name, phase): _turn(call, inputs, phase) for name, call in calls.items() for phase in case.phases}
        clock.rounds(list(turns.values()), self.settings.device, self.settings.rounds, self.settings.share)
        for (name, phase), turn in turns.items():
            if turn.error is not None:
                self.absent(case, next(peer for peer in able if peer.name == name), f"{phase}: {_brief(turn.error)}")
                calls.pop(name, None)
            if turn.samples:
                self.note(case, name, phase, "call", turn)
        memory.forget(inputs)
        if self.settings.device != "cpu":
            self.graphs(case, calls)
            if self.settings.with_memory:
                self.cuda_memory(case, [peer for peer in able if peer.name in calls], calls, inputs)
        calls.clear()
        turns.clear()
        torch._dynamo.reset()
        self.tidy()

    def warm_up(self, call: Callable[[], object], inputs: Inputs) -> None:
        """Every way the call will be timed, each once more where it is fast. Compiles, loads and fills caches."""
        run = memory.training_call(call, inputs)
        for again in range(2):
            start = time.monotonic()
            if "both" in inputs.case.phases:
                run()
                memory.forget(inputs)
            with torch.no_grad():
                call()
            clock.synchronize(self.settings.device)
            if not again and time.monotonic() - start > self.settings.share:
                return

    def note(self, case: Case, name: str, phase: str, launch: str, turn: clock.Turn) -> None:
        middle, low, high = turn.summary()
        count = len(turn.samples)
        self.report.measurements.append(
            Measurement(case.operation, case.shape, name, phase, launch, middle, low, high, count)
        )
        self.say(f"    {name:14} {phase:9} {launch:5} {middle * 1e3:10.3f} ms  (n = {count})")

    def graphs(self, case: Case, calls: dict[str, Callable[[], object]]) -> None:
        """Short forward calls again, as replays of a captured graph.

        A capture that fails midway leaves torch's allocator unusable for every later capture of the process, and for
        `empty_cache`. So what is captured has first shown in a usual call that it does not wait for the device; masked
        cases are left out, because the sides count their tokens on the host; and after one failure nothing is captured.
        """
        for peer in self.sides:
            timed = self.report.seconds(case.operation, case.shape, peer.name, "forward")
            if peer.name not in calls or timed is None or timed > GRAPH_BELOW:
                continue
            reason = self.no_graphs or ("" if case.scope == "all" else "its mask is counted on the host")
            if not reason:
                try:
                    with torch.no_grad(), ops.capture_warmup(), _no_waiting():
                        calls[peer.name]()
                except Exception as error:
                    reason = f"not captured: {_brief(error)}"
            if reason:
                self.absent(case, peer, reason, "graph")
                continue
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.no_grad():
                    torch.cuda.synchronize()
                    with torch.cuda.graph(graph):
                        kept = calls[peer.name]()
            except Exception as error:
                self.no_graphs = f"a capture of {peer.name} failed before: {_brief(error)}"
                self.absent(case, peer, _brief(error), "graph")
                continue
            turn = clock.Turn(_replay(graph))
            clock.rounds([turn], self.settings.device, self.settings.rounds, self.settings.share)
            if turn.error is None:
                self.note(case, peer.name, "forward", "graph", turn)
            else:
                self.absent(case, peer, _brief(turn.error), "graph")
            del kept

    def cuda_memory(self, case: Case, able: list[Peer], calls: dict[str, Callable[[], object]], inputs: Inputs) -> None:
        """Of every side of a case, in this process."""
        for peer in able:
            try:
                extra = memory.cuda_extra(calls[peer.name], inputs)
                self.report.memory.append(memory.Memory(case.operation, case.shape, peer.name, extra))
                memory.forget(inputs)
            except Exception as error:
                self.absent(case, peer, _brief(error), "memory")
        self.tidy()

    def memory_apart(self, wanted: list[Case]) -> None:
        """Of every side that was timed, a process for each peer; those of a smoke run share this process."""
        timed = {(each.operation, each.shape, each.peer) for each in self.report.measurements}
        for peer in self.sides:
            mine = [case for case in wanted if (case.operation, case.shape, peer.name) in timed]
            if not mine:
                continue
            self.say(f"memory of {peer.name}")
            try:
                if self.settings.smoke or self.settings.shapes:
                    self.report.memory += [memory.measure_here(peer.name, case) for case in mine]
                else:
                    self.report.memory += memory.measure_apart(peer.name, mine, self.settings.smoke)
            except Exception as error:
                for case in mine:
                    self.absent(case, peer, _brief(error), "memory")

    def fill_fractions(self) -> None:
        """The share of the ceiling, now that both ends of the run are known."""
        rates = self.report.rates
        infos = {(info.operation, info.shape): info for info in self.report.cases}
        filled = []
        for one in self.report.measurements:
            info = infos[one.operation, one.shape]
            need = (info.flops if info.bound == "matrix" else info.bytes).get(one.phase)
            fraction = None
            if need and rates is not None:
                ceiling = rates.matrix_flops_per_second if info.bound == "matrix" else rates.copy_bytes_per_second
                fraction = need / one.seconds / ceiling
            filled.append(Measurement(**{**one.__dict__, "fraction": fraction}))
        self.report.measurements = filled

    def tidy(self) -> None:
        """Give cached memory back, and find out whether the device still answers."""
        if self.settings.device == "cpu":
            return
        gc.collect()
        try:
            torch.cuda.empty_cache()
        except Exception as error:  # torch's allocator after a failed capture: numbers can still be taken
            self.no_graphs = self.no_graphs or _brief(error)
        try:
            clock.synchronize(self.settings.device)
        except Exception as error:
            self.lost = self.lost or _brief(error)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, a call that waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _turn(call: Callable[[], object], inputs: Inputs, phase: str) -> clock.Turn:
    if phase == "forward":

        def forward(_: object) -> object:
            with torch.no_grad():
                return call()

        return clock.Turn(forward, lambda: memory.forget(inputs))
    run = memory.training_call(call, inputs)
    if phase == "both":
        return clock.Turn(lambda _: run(), lambda: memory.forget(inputs))

    def ready() -> object:
        memory.forget(inputs)
        return call()

    def back(result: object) -> object:
        assert isinstance(result, Tensor | tuple)
        check.backward(inputs, result)
        return None

    return clock.Turn(back, ready)


def _replay(graph: torch.cuda.CUDAGraph) -> Callable[[object], object]:
    return lambda _: graph.replay()


def _brief(error: Exception) -> str:
    """An error as a reason in a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = (str(error).strip().splitlines() or [""])[0][:160]
    return text if isinstance(error, AssertionError) and text.startswith("wrong") else f"{type(error).__name__}: {text}"
