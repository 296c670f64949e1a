"""The rollout workloads under pytest-benchmark: engine and published loop side by side in one process.

    UCT_BENCH_STEPS=18 UCT_BENCH_TOKENS=50 pytest benchmarks/test_rollout.py --benchmark-group-by=group

By default the length is tiny, which proves that both sides run and times nothing; UCT_BENCH_STEPS and UCT_BENCH_TOKENS
set it. The figures of the README come from
``python -m benchmarks.run_cpu``, which alternates the two sides round by round.
"""

import os

import pytest

from benchmarks.rollout_cases import CONTEXT, GROUP, build_model, images_case, text_case

STEPS = int(os.environ.get("UCT_BENCH_STEPS", "2"))
TOKENS = int(os.environ.get("UCT_BENCH_TOKENS", "2"))
ROUNDS = int(os.environ.get("UCT_BENCH_ROUNDS", "5"))
SMOKE = "UCT_BENCH_STEPS" not in os.environ and "UCT_BENCH_TOKENS" not in os.environ


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
    if SMOKE:
        benchmark.disabled = True
    out = benchmark.pedantic(getattr(case, side), rounds=ROUNDS, iterations=1, warmup_rounds=1)
    if name == "images":
        codes = out.codes if side == "ours" else out[0]
        assert codes.shape == (GROUP, 256) and int(codes.min()) >= 0
    else:
        tokens = out.tokens if side == "ours" else out[0]
        assert tokens.shape == (GROUP, TOKENS) and CONTEXT == 290
