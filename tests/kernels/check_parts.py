"""The pieces of the kernels on their own, interpreted: compaction, column sums, products, what the operations say."""

from __future__ import annotations

import pytest
import torch

import pyunictokens as uct
from pyunictokens.kernels import head, rows
from pyunictokens.ops import logprob as _logprob


@pytest.mark.parametrize("tokens", [1, 7, 1024, 1500])
def test_compaction_keeps_order(tokens: int) -> None:
    mask = torch.rand(tokens) > 0.5
    index, count = rows.compact(mask)
    assert torch.equal(index[: int(count)], mask.nonzero()[:, 0].int())


def test_column_sums_with_a_count() -> None:
    values, factor, sums = torch.randn(300, 90), torch.rand(300), torch.randn(3, 90)
    values[267:] = torch.nan
    wanted = sums.sum(0) + (values[:267] * factor[:267, None]).sum(0)
    rows.add_column_sums(values, sums, torch.tensor([277], dtype=torch.int32), 10, factor)
    assert torch.allclose(sums.sum(0), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("atomic", [False, True])
def test_a_product_reads_its_count(dtype: torch.dtype, atomic: bool) -> None:
    a, b = torch.randn(300, 70).to(dtype), torch.randn(70, 33).to(dtype)
    out = torch.full((300, 33), 5.0)
    head.product(a, b, out, torch.tensor([210], dtype=torch.int32), 10)
    assert torch.allclose(out[:200], a[:200].float() @ b.float(), rtol=1e-4, atol=1e-4)
    # Rows of the last tile that do not exist, and tiles that do not exist, are left alone.
    assert (out[200:] == 5.0).all()
    c = torch.randn(300, 21).to(dtype)
    a[200:] = torch.nan
    total = torch.ones(70, 21)
    count = torch.tensor([210], dtype=torch.int32)
    head.product(a.T, c, total, count, 10, counts_k=True, add=True, atomic=atomic)
    assert torch.allclose(total, 1.0 + a[:200].float().T @ c[:200].float(), rtol=1e-4, atol=1e-3)


def test_the_backend_says_what_it_does() -> None:
    report = uct.ops.capabilities()["triton"]
    ops = ["grpo_loss", "maskgit_grpo_loss", "qk_norm_rotary", "selected_logprob"]
    assert report == {"available": True, "ops": ops, "reason": ""}


def test_opcheck() -> None:
    hidden, weight = torch.randn(2, 3, 8).requires_grad_(), torch.randn(11, 8).requires_grad_()
    arguments = hidden, weight, torch.randint(0, 11, (2, 3)), None, None, 0.0, 1.0, "triton"
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_logprob._selected_logprob, arguments, test_utils=checks)
