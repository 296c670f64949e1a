"""torch.library registration: opcheck, torch.compile(fullgraph=True), fake tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyunictokens as uct
from pyunictokens.ops import philox
from pyunictokens.utils.errors import UserError

OPS = torch.ops.pyunictokens
R, T, N, D, K = 2, 2, 3, 5, 7


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def _head() -> dict[str, Tensor]:
    return {
        "hidden": _leaf(R, T, N, D),
        "weight": _leaf(K, D),
        "target": torch.randint(0, K, (R, T, N)),
        "bias": _leaf(K),
        "uncond": _leaf(R, T, N, D),
    }


def _step(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = torch.tensor([1, 2])
    return torch.randn(R, N, K, dtype=dtype), torch.full((R, N), -1), numbers, torch.rand(R), 5, numbers, numbers


def _offers(operation: str) -> list[str]:
    """The backends that take CPU tensors here."""
    report = uct.ops.capabilities()
    return [name for name in ("reference", "cpu", "triton") if operation in report[name]["ops"]]


@pytest.mark.parametrize("backend", _offers("selected_logprob"))
def test_opcheck_selected_logprob(backend: str) -> None:
    h = _head()
    for bias, uncond, scale in ((h["bias"], h["uncond"], 2.0), (None, None, 0.0), (h["bias"].detach(), None, 0.0)):
        arguments = (h["hidden"], h["weight"], h["target"], bias, uncond, scale, 0.9, backend)
        torch.library.opcheck(OPS.selected_logprob, arguments)
    with torch.no_grad():
        logp, lse = OPS.selected_logprob(*arguments)
    for needs in (0, 1, 4, 15):
        arguments = (logp, lse, h["hidden"], h["weight"], h["target"], h["bias"], h["uncond"], 2.0, 0.9, needs)
        detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        torch.library.opcheck(OPS.selected_logprob_backward, (*detached, backend))


@pytest.mark.parametrize("backend", _offers("maskgit_grpo_loss"))
def test_opcheck_losses(backend: str) -> None:
    h = _head()
    shape, advantages = (R, T, N), torch.randn(R)
    old, ref = torch.randn(shape), torch.randn(shape)
    for mask, reference, beta in ((torch.rand(shape) > 0.5, ref, 0.1), (None, None, 0.0)):
        for logp, wanted in ((_leaf(*shape), True), (torch.randn(shape), False)):
            torch.library.opcheck(
                OPS.grpo_loss,
                (logp, old, reference, advantages, torch.tensor(0.6), mask, 0.2, 0.2, beta, wanted, backend),
            )
        for bias, uncond, scale, needs in ((h["bias"], h["uncond"], 1.5, 15), (None, None, 0.0, 5)):
            torch.library.opcheck(
                OPS.maskgit_grpo_loss,
                (
                    h["hidden"],
                    h["weight"],
                    h["target"],
                    old,
                    reference,
                    advantages,
                    torch.rand(N),
                    bias,
                    uncond,
                    mask,
                    scale,
                    1.1,
                    0.2,
                    0.2,
                    beta,
                    needs,
                    bool(needs & 8),
                    backend,
                ),
            )


@pytest.mark.parametrize("backend", _offers("maskgit_step"))
def test_opcheck_maskgit_step(backend: str) -> None:
    for dtype in (torch.float32, torch.float64 if backend == "reference" else torch.bfloat16):
        for noise in ((None, None), (torch.rand(R, N, K), torch.rand(R, N))):
            torch.library.opcheck(OPS.maskgit_step, (*_step(dtype), *noise, philox.STREAM_TOKEN, backend))


def _logprob_call(h: dict[str, Tensor]) -> Tensor:
    return uct.ops.selected_logprob(
        h["hidden"], h["weight"], h["target"], h["bias"], hidden_uncond=h["uncond"], guidance_scale=3.0
    ).sum()


def _loss_call(h: dict[str, Tensor]) -> Tensor:
    logp = (h["hidden"] * h["uncond"]).sum(-1)
    mask = h["target"] > 1
    return uct.ops.grpo_loss(logp, logp.detach() + 0.1, None, h["bias"][:R].detach(), beta=0.0, mask=mask)[0]


def _fused_call(h: dict[str, Tensor]) -> Tensor:
    old = h["hidden"].detach().sum(-1) - 2
    loss, logp, stats = uct.ops.maskgit_grpo_loss(
        h["hidden"],
        h["weight"],
        h["target"],
        old,
        old + 0.1,
        h["bias"][:R].detach(),
        h["bias"],
        hidden_uncond=h["uncond"],
        guidance_scale=3.0,
        mask=h["target"] > 1,
    )
    return loss + 0 * (logp.sum() + stats.kl)


@pytest.mark.parametrize(
    ("call", "compiler"),
    [
        (_logprob_call, "aot_eager"),
        (_loss_call, "aot_eager"),
        (_fused_call, "aot_eager"),
        pytest.param(_fused_call, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_fullgraph_equals_eager(call: Callable[[dict[str, Tensor]], Tensor], compiler: str) -> None:
    torch.compiler.reset()
    h = _head()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    wanted = torch.autograd.grad(call(h), [x for x in h.values() if x.requires_grad], allow_unused=True)
    found = torch.autograd.grad(compiled(h), [x for x in h.values() if x.requires_grad], allow_unused=True)
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_compiled_step_with_changing_numbers_and_sizes() -> None:
    torch.compiler.reset()

    def call(logits: Tensor, codes: Tensor, ids: Tensor, step: int, seed: int) -> tuple[Tensor, ...]:
        out = uct.ops.maskgit_step(logits * 2, codes, mask_len=2, temperature=0.7, seed=seed, sample_ids=ids, step=step)
        return out.codes, out.chosen, out.logp, out.masked

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for batch, positions, step in ((2, 4, 0), (2, 4, 1), (3, 6, 2), (3, 6, 3)):
        arguments = torch.randn(batch, positions, 11), torch.full((batch, positions), -1), torch.arange(batch), step
        for got, want in zip(compiled(*arguments, 9), call(*arguments, 9), strict=True):
            assert torch.equal(got, want)


def test_fake_tensors_give_shapes_without_computing() -> None:
    with FakeTensorMode():
        hidden, weight = torch.empty(3, 5, 7, 64, dtype=torch.bfloat16), torch.empty(8192, 64, dtype=torch.bfloat16)
        target, logp = torch.zeros(3, 5, 7, dtype=torch.int64), torch.zeros(3, 5, 7)
        found = uct.ops.selected_logprob(hidden, weight, target)
        assert (found.shape, found.dtype) == ((3, 5, 7), torch.float32)
        loss, fused, stats = uct.ops.maskgit_grpo_loss(hidden, weight, target, logp, logp, torch.zeros(3))
        assert (loss.shape, fused.shape, stats.entropy.shape) == ((), (3, 5, 7), ())
        out = uct.ops.maskgit_step(
            torch.empty(3, 9, 100, dtype=torch.bfloat16),
            torch.zeros(3, 9, dtype=torch.int64),
            mask_len=3,
            temperature=1.0,
            seed=0,
            sample_ids=torch.arange(3),
            step=0,
        )
        assert [x.dtype for x in out] == [torch.int64, torch.int64, torch.float32, torch.bool]
        assert all(x.shape == (3, 9) for x in out)


# --- torch.ops called directly: behind it addresses cross into compiled code ------------------------------------------


def _good(backend: str) -> dict[str, list[Any]]:
    """Arguments of every registered operation, by its schema."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(R, T, N, D), torch.randn(K, D), torch.randn(K)
    target, logp, rollouts = torch.randint(0, K, (R, T, N)), torch.randn(R, T, N), torch.randn(R)
    head = [bias, torch.randn(R, T, N, D), 2.0, 0.9]
    each = torch.tensor([1, 2])
    step = [torch.randn(R, N, K), torch.full((R, N), -1), each, torch.rand(R), 5, each, each]
    return {
        "selected_logprob": [hidden, weight, target, *head, backend],
        "selected_logprob_backward": [logp, logp, hidden, weight, target, *head, 15, backend],
        "grpo_loss": [logp, logp, logp, rollouts, torch.rand(R, T, N), logp > 0, 0.2, 0.2, 0.01, True, backend],
        "maskgit_grpo_loss": [
            hidden, weight, target, logp, logp, rollouts, torch.rand(()), *head[:2], target > 1, *head[2:],
            0.2, 0.2, 0.01, 15, True, backend,
        ],
        "maskgit_step": [*step, torch.rand(R, N, K), torch.rand(R, N), 0, backend],
    }  # fmt: skip


def _bent(value: Tensor) -> list[Tensor]:
    """Shapes and types that do not fit where `value` does."""
    bent = [value.new_empty(0), value[None, None], value[None]]
    if value.dim():
        bent += [value[:0], value[:1]] if len(value) > 1 else []
        bent += [value[..., :0], value[..., :1], value.flatten()[:1], value.sum()]
    if value.dtype == torch.int64:
        bent += [value + 2**40, value - 2**40]
    return [*bent, value.to(torch.complex64)]


@pytest.mark.parametrize("operation", _good(""))
def test_short_and_empty_tensors_are_errors_in_words(operation: str) -> None:
    """Every tensor of every operation in every wrong shape: an error, or (where it broadcasts) a result; no crash."""
    op = getattr(OPS, operation)
    name = operation.removesuffix("_backward")
    for backend in _offers(name):
        good = _good(backend)[operation]
        op(*good)
        refused = 0
        for place, value in enumerate(good):
            if not isinstance(value, Tensor):
                continue
            for wrong in _bent(value):
                arguments = [*good[:place], wrong, *good[place + 1 :]]
                try:
                    op(*arguments)
                except (UserError, RuntimeError):  # of ours, or of the dispatcher, which reads the schema
                    refused += 1
        assert refused >= 20, (operation, backend, refused)
        with pytest.raises(UserError, match="backend='nonsense'"):
            op(*good[:-1], "nonsense")


def test_a_head_without_width_is_an_error() -> None:
    for backend in _offers("selected_logprob"):
        arguments = torch.zeros(3, 0), torch.zeros(K, 0), torch.zeros(3, dtype=torch.int64)
        with pytest.raises(UserError, match=r"hidden: shape \(3, 0\), must be \[\.\.\., D\] with D ≥ 1"):
            uct.ops.selected_logprob(*arguments, backend=backend)
        with pytest.raises(UserError, match="D ≥ 1"):
            OPS.selected_logprob(*arguments, None, None, 0.0, 1.0, backend)
        with pytest.raises(UserError, match="needs=16"):
            OPS.selected_logprob_backward(*_good(backend)["selected_logprob_backward"][:-2], 16, backend)


def test_the_compiled_core_refuses_sizes_without_a_meaning() -> None:
    core = importlib.import_module("pyunictokens._core")
    buffer = torch.zeros(64)
    address = buffer.data_ptr()
    for width, entries, block in ((0, 4, 4), (4, 0, 4), (4, 4, 0)):
        head = (address, 1, width, address, 0, entries, 0, 1.0, address, block, address, address)
        with pytest.raises(ValueError, match="must be at least 1"):
            core.head_logprob(head, address, address, 0, 1, "")
    with pytest.raises(ValueError, match="an address is 0"):
        core.head_logprob((0, 1, 4, address, 0, 4, 0, 1.0, address, 4, address, address), address, address, 0, 1, "")
    with pytest.raises(ValueError, match="out of range"):
        core.grpo_loss(*[address, 0] * 3, 4, 0, address, address, 0, 0, 1.0, 0.2, 0.2, 0.0, address, address, 1, "")
    step = (address, 0, 0, 3, 7, 21, 7, address, address, address, 5, address, address, 0, 0, 0, *[address] * 4)
    with pytest.raises(ValueError, match="must be at least 1"):
        core.maskgit_step(step, 1, "")
