"""maskgit_step under pytest-benchmark: the CPU core beside the eager torch sequence and the reference backend.

    pytest benchmarks/test_ops.py --benchmark-group-by=group

The eager side is what one writes first: log-softmax, Gumbel noise from torch.rand, argmax, gather, sort. It draws
other noise than the two backends, so the results differ; the work is the same. Logits are spread like those of a
trained model under guidance ("peaked") or of a random one ("flat"): the core skips what cannot win.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyunictokens as uct

SHAPES = {"B18-N256-K4096": (18, 256, 4096), "B9-N1024-K8192": (9, 1024, 8192), "B18-N64-K512": (18, 64, 512)}
SPREAD = {"flat": 1.0, "peaked": 8.0}
UNKNOWN = 0.7


def eager(logits: Tensor, codes: Tensor, mask_len: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, chosen, logp, masked) by whole-tensor torch operations."""
    tiny = torch.finfo(torch.float32).tiny
    logp = torch.log_softmax(logits, -1)
    noise = -torch.log((-torch.log(torch.rand_like(logits).clamp_min_(tiny))).clamp_min_(tiny))
    chosen = torch.where(codes < 0, (logp + noise).argmax(-1), codes)
    selected = logp.gather(-1, chosen[..., None])[..., 0]
    rank = -torch.log((-torch.log(torch.rand_like(selected).clamp_min_(tiny))).clamp_min_(tiny))
    confidence = torch.where(codes < 0, selected + temperature * rank, torch.inf)
    cut = confidence.sort(-1).values.gather(-1, mask_len[:, None])
    masked = confidence < cut
    return torch.where(masked, uct.MASK, chosen), chosen, selected, masked


@pytest.mark.parametrize("side", ["cpu", "reference", "eager"])
@pytest.mark.parametrize("spread", list(SPREAD))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_maskgit_step(benchmark: Any, shape: str, spread: str, side: str) -> None:
    batch, positions, entries = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    logits = SPREAD[spread] * torch.randn(batch, positions, entries, generator=generator)
    given = torch.randint(0, entries, (batch, positions), generator=generator)
    codes = torch.where(torch.rand(batch, positions, generator=generator) < UNKNOWN, uct.MASK, given)
    wanted = torch.full((batch,), positions // 3)
    ids = torch.arange(batch)

    def backend() -> tuple[Tensor, ...]:
        return uct.ops.maskgit_step(
            logits, codes, mask_len=wanted, temperature=1.0, seed=1, sample_ids=ids, step=3, backend=side
        )

    call: Callable[[], tuple[Tensor, ...]] = backend
    if side == "eager":
        call = lambda: eager(logits, codes, wanted, 1.0)  # noqa: E731
    benchmark.group = f"maskgit_step {shape} {spread}"
    benchmark.extra_info.update(threads=torch.get_num_threads(), dtype="float32")
    out = benchmark.pedantic(call, rounds=5, iterations=1, warmup_rounds=1)
    assert out[3].sum(-1).tolist() == [positions // 3] * batch
