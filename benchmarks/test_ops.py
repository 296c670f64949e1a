"""The operations and their peers under pytest-benchmark: the cases of `benchmarks/ops`, one side and phase a test.

    pytest benchmarks/test_ops.py                            # tiny shapes: proves that every side runs, times nothing
    UCT_BENCH_OPS=full pytest benchmarks/test_ops.py -k "maskgit_step and eager" --benchmark-group-by=group

The figures of the README come from ``pyunictokens bench ops``, where the sides take turns round by round. A side that
cannot run is skipped with its reason; one that is far from float64 fails.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks.ops import cases, check, memory
from benchmarks.ops.cases import Case
from benchmarks.ops.peers import Peer, peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
FULL = os.environ.get("UCT_BENCH_OPS") == "full"
ROUNDS = int(os.environ.get("UCT_BENCH_ROUNDS", "5"))
SUITE = cases.suite(DEVICE, smoke=not FULL)


def _name(value: object) -> str:
    return f"{value.operation}-{value.shape}" if isinstance(value, Case) else getattr(value, "name", str(value))


@pytest.mark.parametrize(("case", "phase"), [(c, phase) for c in SUITE for phase in c.phases], ids=_name)
@pytest.mark.parametrize("peer", peers(), ids=_name)
def test_ops(benchmark: Any, case: Case, phase: str, peer: Peer) -> None:
    reason = peer.missing(case, DEVICE, DTYPE)
    if reason:
        pytest.skip(f"{peer.title}: {reason}")
    if peer.exact:
        check.check(peer, case, DEVICE, DTYPE)
    torch._dynamo.reset()
    inputs = cases.make(case, DEVICE, DTYPE)
    call = peer.builds[case.operation](inputs)
    benchmark.group = f"{case.operation} {case.shape} {phase}"
    benchmark.extra_info.update(case.sizes, peer=peer.title, dtype=str(DTYPE), threads=torch.get_num_threads())

    def setup() -> tuple[tuple[object, ...], dict[str, object]]:
        memory.forget(inputs)
        return (call() if phase == "backward" else None,), {}

    def timed(ready: Any) -> object:
        if phase == "backward":
            result = check.backward(inputs, ready)
        elif phase == "both":
            result = memory.training_call(call, inputs)()
        else:
            with torch.no_grad():
                result = call()
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        return result

    if not FULL:  # what tiny shapes take says nothing, so nothing is printed that could be quoted
        benchmark.disabled = True
    benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, iterations=1, warmup_rounds=1)
