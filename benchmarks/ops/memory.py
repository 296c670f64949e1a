"""Peak memory of one forward and backward, beyond the inputs, the result and the gradients of the inputs.

On a GPU: `torch.cuda.max_memory_allocated`. On a CPU each peer runs in a process of its own, and two numbers are taken
from two calls after a first one: the peak of torch's allocator, from the memory events of its profiler, and the growth
of the resident set's high-water mark (VmHWM after resetting it), which also counts what compiled code allocates by
itself. The gradients lie in the memory before the call starts in neither: they are subtracted.

    python -m benchmarks.ops.memory PEER OPERATION SHAPE [OPERATION SHAPE]...      # a line of JSON each
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import cases, check
from .cases import Case, Inputs
from .peers import by_name
from .schema import Memory


def training_call(call: Callable[[], object], inputs: Inputs) -> Callable[[], object]:
    """Forward and backward where there is a gradient, else forward."""

    def run() -> object:
        result = call()
        if inputs.case.operation != "maskgit_step":
            assert isinstance(result, Tensor | tuple)
            check.backward(inputs, result)
        return result

    return run


def forget(inputs: Inputs) -> None:
    for leaf in inputs.leaves if inputs.case.operation != "maskgit_step" else ():
        leaf.grad = None


def kept_bytes(result: object, inputs: Inputs) -> int:
    """What must be there afterwards: the result and the gradients."""
    results = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]
    leaves = inputs.leaves if inputs.case.operation != "maskgit_step" else ()
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return sum(x.numel() * x.element_size() for x in (*results, *grads))


def cuda_extra(call: Callable[[], object], inputs: Inputs) -> int:
    """In this process, from the statistics of torch's allocator."""
    run = training_call(call, inputs)
    forget(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - kept_bytes(result, inputs))


def allocator_peak(run: Callable[[], object]) -> tuple[int, object]:
    """(most bytes that torch's CPU allocator held at once during `run`, what it returned)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = [each for each in json.loads(file.read_text())["traceEvents"] if each.get("name") == "[memory]"]
    held = top = 0
    for event in sorted(events, key=lambda each: each["ts"]):
        held += event["args"]["Bytes"]
        top = max(top, held)
    return top, result


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def resident_growth(run: Callable[[], object]) -> tuple[int, object] | None:
    """(growth of the high-water mark during `run`, what it returned); None where the system keeps no such mark."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, KeyError):
        return None
    result = run()
    return _status("VmHWM") - before, result


def measure_here(peer: str, case: Case, dtype: torch.dtype = torch.float32) -> Memory:
    """Both numbers of a CPU side, in this process."""
    inputs = cases.make(case, "cpu", dtype)
    call = by_name(peer).builds[case.operation](inputs)
    run = training_call(call, inputs)
    run()
    forget(inputs)
    resident = resident_growth(run)
    growth = None if resident is None else max(0, resident[0] - kept_bytes(resident[1], inputs))
    del resident
    forget(inputs)
    peak, result = allocator_peak(run)
    return Memory(case.operation, case.shape, peer, max(0, peak - kept_bytes(result, inputs)), growth)


def measure_apart(peer: str, wanted: list[Case], smoke: bool) -> list[Memory]:
    """`measure_here` for several cases in a process of the peer's own.

    Raises:
        RuntimeError: the process failed; its last line says why.
    """
    names = [word for case in wanted for word in (case.operation, case.shape)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ops.memory", *["--smoke"] * smoke, peer, *names],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return [Memory(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    smoke = sys.argv[1] == "--smoke"
    peer, *names = sys.argv[1 + smoke :]
    known = {(case.operation, case.shape): case for case in cases.suite("cpu", smoke)}
    for key in zip(names[::2], names[1::2], strict=True):
        if key not in known:
            raise SystemExit(f"{' '.join(key)}: no such case")
        print(json.dumps(measure_here(peer, known[key]).__dict__), flush=True)
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
