"""How much memory a plan may count on: the scratch of captured graphs is nobody else's. No GPU is asked."""

from __future__ import annotations

import pytest
import torch

from pyunictokens.train import microbatch
from pyunictokens.utils import memory

MIB = 1 << 20
CARD = torch.device("cuda", 0)


def _segment(device: int, pool: tuple[int, int], total: int, allocated: int) -> dict[str, object]:
    return {"device": device, "segment_pool_id": pool, "total_size": total * MIB, "allocated_size": allocated * MIB}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 MiB are free; torch keeps 300 for everybody (100 in use) and 4000 for a graph (500 in use)."""
    segments = [
        _segment(0, (0, 0), 300, 100),
        _segment(0, (0, 7), 4000, 500),
        _segment(1, (0, 0), 9000, 0),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda *a, **k: segments)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 4300 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 600 * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1000 * MIB, 80000 * MIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device=None: 1.0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("card")
def test_a_graphs_private_pool_is_not_free() -> None:
    assert memory.cached_bytes(CARD) == memory.cached_bytes(torch.device("cuda")) == 200 * MIB
    assert memory.free_bytes(CARD) == 1200 * MIB
    assert microbatch.free_memory(CARD) == pytest.approx(microbatch.FREE_SHARE * 1200 * MIB)


@pytest.mark.usefixtures("card")
def test_a_limit_set_for_the_process_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device=None: 0.01)
    assert microbatch.free_memory(CARD) == pytest.approx(microbatch.FREE_SHARE * 200 * MIB)
