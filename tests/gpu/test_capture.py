"""CUDA graphs: capture once, replay with new inputs, the same as without; and nothing waits for the device.

On the CPU the same bodies run with a stand-in: the "replay" is the call again on the same buffers, and the watch for
synchronisation looks for the torch operations that would wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyunictokens as uct
from pyunictokens.ops import reference
from pyunictokens.ops import registry as _dispatch

from . import support
from .support import VARIANTS, Head

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class Recorded:
    """A captured call; calling it replays. On the CPU it calls again and copies into the first result."""

    def __init__(self, device: str, call: Callable[[], list[Tensor]]):
        self.call, self.graph = call, None
        if device == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), uct.ops.capture_warmup():
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = call()
        else:
            self.out = call()

    def __call__(self) -> list[Tensor]:
        if self.graph is not None:
            self.graph.replay()
        else:
            for old, new in zip(self.out, self.call(), strict=True):
                old.detach().copy_(new.detach())
        return [x.detach().clone() for x in self.out]


def _refill(h: Head, other: Head) -> None:
    with torch.no_grad():
        for name, value in h.tensors.items():
            value.copy_(other[name])


def _call(operation: str, h: Head, backend: str) -> list[Tensor]:
    if operation == "selected_logprob":
        result = support.logprob(h, backend)
        return [result, *support.gradients(result, h)]
    loss, logp, stats = support.fused(h, backend)
    return [loss, logp, *(x for x in stats if x is not None), *support.gradients(loss, h)]


def _host_counts(backend: str, variant: str) -> None:
    if backend in ("reference", "cpu") and "mask" in variant:
        pytest.skip(f"the {backend} backend counts the tokens of a mask on the host")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("operation", "variant"),
    [("selected_logprob", "guided"), ("maskgit_grpo_loss", "guided"), ("maskgit_grpo_loss", "masked guided")],
)
def test_replay_with_new_inputs(device: str, backend: str, operation: str, variant: str, dtype: torch.dtype) -> None:
    support.need(operation, backend, device, dtype)
    if device == "cuda":
        _host_counts(backend, variant)
    h = support.head(device, dtype, **VARIANTS[variant])
    recorded = Recorded(device, lambda: _call(operation, h, backend))
    for seed in (1, 2):
        fresh = support.head(device, dtype, seed=seed, **VARIANTS[variant])
        _refill(h, fresh)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        for found, wanted in zip(recorded(), _call(operation, fresh, backend), strict=True):
            # The captured way may be another engine, so equal up to rounding.
            distance = (found.double() - wanted.double()).norm()
            assert distance <= tolerance * wanted.double().norm() + 1e-4


def test_replay_of_grpo_loss(device: str, backend: str) -> None:
    support.need("grpo_loss", backend, device)
    h = support.head(device, torch.float32, **VARIANTS["masked"])
    logp = h["upstream"].requires_grad_()

    def call() -> list[Tensor]:
        loss = support.tokens_loss(logp, h, backend)
        return [loss, *torch.autograd.grad(loss, logp)]

    recorded = Recorded(device, call)
    fresh = support.head(device, torch.float32, seed=1, **VARIANTS["masked"])
    _refill(h, fresh)
    for found, wanted in zip(recorded(), call(), strict=True):
        assert torch.equal(found, wanted)


def test_replay_of_a_step(device: str, backend: str) -> None:
    """Step, mask length and temperature lie on the device: one graph serves every timestep."""
    support.need("maskgit_step", backend, device)
    s = support.step(device, torch.float32)
    recorded = Recorded(device, lambda: list(s(backend)))
    for number in (1, 9):
        fresh = support.step(device, torch.float32, seed=number)
        s.logits.copy_(fresh.logits)
        s.arguments["codes"].copy_(fresh.arguments["codes"])
        for name, value in (("step", number), ("mask_len", 3 + number), ("temperature", 0.5 * number)):
            s.arguments[name].fill_(value)
            fresh.arguments[name].fill_(value)
        for found, wanted in zip(recorded(), fresh(backend), strict=True):
            assert torch.equal(found, wanted)


@contextmanager
def _nothing_waits(device: str) -> Iterator[None]:
    """On a GPU torch raises at a synchronisation; on the CPU the entries' own torch operations are looked at."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            assert name not in WAITS, f"{name} waits for the device"
            return function(*args, **(kwargs or {}))

    with Watch():
        yield


@pytest.mark.parametrize("variant", ["plain", "guided", "masked guided"])
def test_nothing_waits_for_the_device(device: str, backend: str, variant: str) -> None:
    """Without a mask no operation waits, forward or backward; with one, neither does the loss over log-probs."""
    support.need("maskgit_grpo_loss", backend, device)
    h = support.head(device, torch.float32, **VARIANTS[variant])
    masked = "mask" in variant
    if device == "cpu":
        if backend == "triton":
            pytest.skip("the interpreter reads tensors on the host by its nature")
        table = _dispatch._table
        flat = h["hidden"].detach(), h["weight"].detach(), h["target"]
        alpha = torch.tensor(support.ALPHA)
        constants = support.CLIP_LOW, support.CLIP_HIGH, support.BETA
        with _nothing_waits(device):
            if not masked:
                table["selected_logprob"][backend].forward(*flat, None, None, 0.0, 1.0)
            if backend in table["grpo_loss"]:
                logp, mask = h["old"] + 0.1 * h["upstream"], h.get("mask")
                table["grpo_loss"][backend].forward(logp, h["old"], h["ref"], h["advantages"], alpha, mask, *constants)
        return
    support.fused(h, backend)  # compiled before
    if not masked:
        support.gradients(support.logprob(h, backend), h)
    logp = h["upstream"].requires_grad_()
    with_loss = backend in _dispatch._table["grpo_loss"]
    if with_loss:
        support.tokens_loss(logp, h, backend)
    with _nothing_waits(device):
        if not masked:
            loss, _, _ = support.fused(h, backend)
            support.gradients(loss, h)
            support.gradients(support.logprob(h, backend), h)
        if with_loss:
            torch.autograd.grad(support.tokens_loss(logp, h, backend), logp)


def test_a_step_does_not_wait(device: str, backend: str) -> None:
    support.need("maskgit_step", backend, device)
    s = support.step(device, torch.float32)
    if device == "cpu":
        if backend != "reference":
            pytest.skip("runs on the host by its nature")
        a = s.arguments
        with _nothing_waits(device):
            reference.maskgit_step(
                s.logits,
                a["codes"],
                a["mask_len"],
                a["temperature"],
                a["seed"],
                a["sample_ids"],
                a["step"],
                None,
                None,
                0,
            )
        return
    s(backend)
    with _nothing_waits(device):
        s(backend)
