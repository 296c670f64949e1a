"""How calls are cut up: memory limits, sizes of pieces, and the choice between chunks and tiles."""

from __future__ import annotations

import pytest

from pyunictokens.kernels import plan

FULL = 9 * 50 * 1024, 2048, 8192  # R·T·N, D, K of Show-o at 512²


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("gradient", [False, True])
def test_extra_memory_of_the_full_size(size: int, gradient: bool) -> None:
    chosen = plan.choose(*FULL, size, gradient=gradient)
    assert plan.extra_bytes(chosen, *FULL, size, gradient=gradient) <= 1 << 30
    if gradient and size == 2:
        assert chosen == plan.Plan("chunked", 16384, 4096)


@pytest.mark.parametrize("width", [1, 100, 2048, 16384])
@pytest.mark.parametrize("entries", [2, 1000, 8192, 58523, 262144])
@pytest.mark.parametrize("size", [2, 4])
def test_pieces_fit_into_chunks_whatever_the_shape(width: int, entries: int, size: int) -> None:
    for tokens in (0, 1, 511, 1000, 10**6):
        chosen = plan.choose(tokens, width, entries, size, gradient=True)
        assert 1 <= chosen.inner <= chosen.rows
        assert chosen.rows % chosen.inner == 0 or chosen.rows == tokens
        assert chosen.inner <= max(plan.LEAST_ROWS, plan.LOGITS_BYTES // (4 * entries))
        assert chosen.rows * max(entries, 3 * width) * size <= max(
            plan.GRADIENT_BYTES, plan.LEAST_ROWS * max(entries, 3 * width) * size
        )


def test_a_gradient_takes_chunks_and_narrow_heads_take_tiles() -> None:
    assert plan.choose(4096, 64, 8192, 2, gradient=True, engine="fused").engine == "chunked"
    assert plan.choose(1 << 20, 256, 8192, 2, gradient=False).engine == "fused"
    assert plan.choose(1 << 20, 4096, 8192, 2, gradient=False).engine == "chunked"
    assert plan.choose(1 << 20, 4096, 8192, 2, gradient=False, engine="fused").engine == "fused"
    assert plan.choose(1 << 20, 2048, 8192, 4, gradient=False).engine == "chunked"


def test_costs_grow_with_the_work() -> None:
    for engine in ("chunked", "fused"):
        small, large = (plan.costs(tokens, 512, 8192, 2)[engine] for tokens in (10**4, 10**6))
        assert 50 < large / small < 105
