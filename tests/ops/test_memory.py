"""No operation forms a [tokens, K] tensor: every tensor that torch makes on the way is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyunictokens as uct
from pyunictokens.ops import reference
from pyunictokens.ops import registry as _dispatch

TOKENS, WIDTH, ENTRIES, CHUNK = (4, 3, 64), 8, 512, 1 << 14


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements among all tensors made inside, views of `known` tensors aside."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.elements = 0
        self.known = {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, leaf.numel())
        return result


Watch = Callable[..., Callable[[], int]]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """watch(known tensors…) looks into the implementations from now on; call what it returns for the largest so far.

    A dispatch mode does not see inside a registered operation, so the entries of the table are wrapped.
    """
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", CHUNK)

    def start(*known: torch.Tensor) -> Callable[[], int]:
        modes: list[Largest] = []

        def wrapped(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
            def run(*args: Any) -> Any:
                modes.append(Largest(*known))
                with modes[-1]:
                    return function(*args)

            return run if function else None

        table = {
            name: {"reference": _dispatch.Entry(wrapped(one["reference"].forward), wrapped(one["reference"].backward))}
            for name, one in _dispatch._table.items()
        }
        monkeypatch.setattr(_dispatch, "_table", table)
        return lambda: max(mode.elements for mode in modes)

    return start


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "hidden": torch.randn(*TOKENS, WIDTH, requires_grad=True),
        "uncond": torch.randn(*TOKENS, WIDTH, requires_grad=True),
        "weight": torch.randn(ENTRIES, WIDTH, requires_grad=True),
        "target": torch.randint(0, ENTRIES, TOKENS),
        "logp": -torch.rand(TOKENS),
    }


def test_the_measure_sees_a_plain_log_softmax() -> None:
    t = _tensors()
    with Largest() as largest:
        torch.log_softmax(t["hidden"] @ t["weight"].T, -1).sum().backward()
    assert largest.elements == t["target"].numel() * ENTRIES


def test_selected_logprob_forward_and_backward(watch: Watch) -> None:
    t = _tensors()
    largest = watch()
    logp = uct.ops.selected_logprob(
        t["hidden"], t["weight"], t["target"], hidden_uncond=t["uncond"], guidance_scale=2.0
    )
    assert largest() == CHUNK
    logp.sum().backward()
    assert largest() == CHUNK


def test_maskgit_grpo_loss(watch: Watch) -> None:
    t = _tensors()
    largest = watch()
    uct.ops.maskgit_grpo_loss(
        t["hidden"],
        t["weight"],
        t["target"],
        t["logp"],
        t["logp"],
        torch.randn(TOKENS[0]),
        hidden_uncond=t["uncond"],
        guidance_scale=2.0,
        mask=torch.rand(TOKENS) > 0.1,
    )[0].backward()
    assert largest() == CHUNK


def test_maskgit_step_noise_is_never_whole(watch: Watch) -> None:
    logits = torch.randn(4, 192, ENTRIES)
    largest = watch(logits)
    uct.ops.maskgit_step(
        logits,
        torch.full((4, 192), -1),
        mask_len=3,
        temperature=1.0,
        seed=0,
        sample_ids=torch.arange(4),
        step=0,
        backend="reference",
    )
    assert largest() == CHUNK // 4


@pytest.mark.parametrize("operation", ["grpo_loss", "maskgit_grpo_loss", "selected_logprob"])
def test_the_way_back_makes_nothing_but_the_gradients(operation: str) -> None:
    """Outputs without a gradient cost no zeros of their size: those of the loss's gradients are as large as these."""
    t = _tensors()
    logp, advantages = t["logp"].requires_grad_(), torch.randn(TOKENS[0])
    old = logp.detach()
    if operation == "grpo_loss":
        result, leaves = uct.ops.grpo_loss(logp, old, old, advantages)[0], [logp]
    elif operation == "maskgit_grpo_loss":
        leaves = [t["hidden"], t["weight"]]
        result = uct.ops.maskgit_grpo_loss(*leaves, t["target"], old, old, advantages)[0]
    else:
        leaves = [t["hidden"], t["weight"]]
        result = uct.ops.selected_logprob(*leaves, t["target"]).sum()
    sizes = {t["target"].numel(), *(leaf.numel() for leaf in leaves)}
    made: list[str] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            made.extend(str(function) for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.numel() in sizes)
            return out

    with Made():
        result.backward()
    assert all(leaf.grad is not None for leaf in leaves)
    assert made and not [name for name in made if "zero" in name], made
