"""The rollout workloads under pytest-benchmark: engine and published loop side by side in one process.

    pytest benchmarks/test_rollout.py --benchmark-group-by=group

The length is small by default; UCT_BENCH_STEPS and UCT_BENCH_TOKENS set it. The figures of the README come from
``python -m benchmarks.run_cpu``, which alternates the two sides round by round.
"""

import os

import pytest

from benchmarks.rollout_cases import CONTEXT, GROUP, build_model, images_case, text_case

STEPS = int(os.environ.get("UCT_BENCH_STEPS", "2"))
TOKENS = int(os.environ.get("UCT_BENCH_TOKENS", "2"))
ROUNDS = int(os.environ.get("UCT_BENCH_ROUNDS", "1"))


@pytest.fixture(scope="module")
def cases():
    model = build_model()
    return {"images": images_case(model, STEPS), "text": text_case(model, TOKENS)}


@pytest.mark.parametrize("side", ["ours", "plain"])
@pytest.mark.parametrize("name", ["images", "text"])
def test_rollout(benchmark, cases, name, side):
    benchmark.group = name
    case = cases[name]
    benchmark.extra_info.update(case.settings, peer=case.peer)
    out = benchmark.pedantic(getattr(case, side), rounds=ROUNDS, iterations=1, warmup_rounds=1)
    if name == "images":
        codes = out.codes if side == "ours" else out[0]
        assert codes.shape == (GROUP, 256) and int(codes.min()) >= 0
    else:
        tokens = out.tokens if side == "ours" else out[0]
        assert tokens.shape == (GROUP, TOKENS) and CONTEXT == 290
