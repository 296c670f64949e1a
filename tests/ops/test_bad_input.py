"""Every refusal of the operations, with the message a user reads. Nothing wrong may reach a pointer or a gather."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import pyunictokens as uct
from pyunictokens.utils.errors import UserError

META = torch.device("meta")
NAN, INF = float("nan"), float("inf")


def _step(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.randn(2, 4, 6),
        "codes": torch.tensor([[-1, 3, -1, -1], [5, 0, -1, -1]]),
        "mask_len": torch.tensor([1, 2]),
        "temperature": 1.0,
        "seed": 3,
        "sample_ids": torch.tensor([7, 8]),
        "step": 0,
    }
    arguments.update(changes)
    uct.ops.maskgit_step(arguments.pop("logits"), arguments.pop("codes"), **arguments)


def _logits_with(value: float) -> torch.Tensor:
    logits = torch.randn(2, 4, 6)
    logits[1, 2, 3] = value
    return logits


STEP = [
    ({"logits": [[1.0]]}, "logits: must be a tensor, got list"),
    ({"logits": torch.zeros(2, 4, 6, dtype=torch.int64)}, "logits: dtype int64, must be float32"),
    ({"logits": torch.zeros(4, 6)}, "logits: shape (4, 6), must be [B, N, K]"),
    ({"logits": torch.zeros(2, 4, 0)}, "every dimension ≥ 1"),
    ({"logits": torch.zeros(1, 1, 6).expand(1, 65537, 6), "codes": torch.zeros(1, 65537).long()}, "N must be ≤ 65536"),
    ({"logits": _logits_with(NAN)}, "logits: NaN, +inf or only -inf at sample 1, position 2"),
    ({"logits": _logits_with(INF)}, "logits: NaN, +inf or only -inf at sample 1, position 2"),
    ({"logits": torch.full((2, 4, 6), -INF)}, "only -inf at sample 0, position 0"),
    ({"codes": torch.zeros(2, 4)}, "codes: dtype float32, must be int64"),
    ({"codes": torch.zeros(2, 4, dtype=torch.bool)}, "codes: dtype bool, must be int64"),
    ({"codes": torch.zeros(2, 5, dtype=torch.int64)}, "codes: shape (2, 5), must be [B, N] = (2, 4)"),
    ({"codes": torch.full((2, 4), 6)}, "codes: holds 6, must be in -1 … 5 (-1 is MASK)"),
    ({"codes": torch.full((2, 4), -2)}, "codes: holds -2, must be in -1 … 5"),
    ({"codes": torch.zeros(2, 4, dtype=torch.int64, device=META)}, "codes: on meta, but the other tensors are on cpu"),
    ({"mask_len": -1}, "mask_len=-1: must be in 0 …"),
    ({"mask_len": 1.5}, "mask_len=1.5: must be an integer"),
    ({"mask_len": torch.tensor([1, -3])}, "mask_len: holds -3"),
    ({"mask_len": torch.tensor([1.0, 2.0])}, "mask_len: dtype float32, must be int64"),
    ({"mask_len": torch.tensor([1, 2, 3])}, "mask_len: shape (3,), must be [B] (or a single number) = (2,)"),
    ({"temperature": -0.1}, "temperature=-0.1: must be finite and ≥ 0 (0 turns the re-masking noise off)"),
    ({"temperature": NAN}, "temperature=nan: must be finite"),
    ({"temperature": INF}, "temperature=inf: must be finite"),
    ({"temperature": "hot"}, "temperature='hot': must be a number"),
    ({"temperature": torch.tensor([1.0, NAN])}, "temperature: holds nan"),
    ({"temperature": torch.tensor([1.0, -2.0])}, "temperature: holds -2.0"),
    ({"temperature": torch.ones(2, 1)}, "temperature: shape (2, 1), must be [B]"),
    ({"temperature": torch.tensor([1, 2])}, "temperature: dtype int64"),
    ({"seed": -1}, "seed=-1: must be in 0 …"),
    ({"seed": 2**63}, "seed=9223372036854775808"),
    ({"seed": 1.0}, "seed=1.0: must be an integer"),
    ({"seed": True}, "seed=True: must be an integer"),
    ({"sample_ids": 3}, "sample_ids: must be a tensor, got int"),
    ({"sample_ids": torch.tensor([1])}, "sample_ids: shape (1,), must be [B] = (2,)"),
    ({"sample_ids": torch.tensor([1, -1])}, "sample_ids: holds -1"),
    ({"sample_ids": torch.tensor([1.0, 2.0])}, "sample_ids: dtype float32"),
    ({"step": -1}, "step=-1: must be in 0 … 65535"),
    ({"step": 65536}, "step=65536"),
    ({"step": torch.tensor([0, 65536])}, "step: holds 65536"),
    ({"token_gumbel": torch.zeros(2, 4)}, "token_gumbel: shape (2, 4), must be [B, N, K] = (2, 4, 6)"),
    ({"token_gumbel": torch.full((2, 4, 6), NAN)}, "token_gumbel: holds NaN"),
    ({"rank_gumbel": torch.zeros(2, 4, 6)}, "rank_gumbel: shape (2, 4, 6), must be [B, N] = (2, 4)"),
    ({"rank_gumbel": torch.full((2, 4), NAN)}, "rank_gumbel: holds NaN"),
    ({"backend": "gpu"}, "backend='gpu': must be None"),
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("changes", "message"), STEP)
def test_maskgit_step(changes: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        _step(**{"backend": backend, **changes})


def test_the_unchanged_arguments_are_good() -> None:
    _step()


def _logprob(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.randn(3, 4, 8),
        "weight": torch.randn(5, 8),
        "target": torch.zeros(3, 4, dtype=torch.int64),
        "bias": torch.randn(5),
    }
    arguments.update(changes)
    uct.ops.selected_logprob(**arguments)


HEAD = [
    ({"hidden": None}, "hidden: must be a tensor, got NoneType"),
    ({"hidden": torch.zeros(3, 4, 8, dtype=torch.int64)}, "hidden: dtype int64"),
    ({"hidden": torch.tensor(1.0), "target": torch.tensor(0)}, "hidden: a 0-d tensor"),
    ({"weight": torch.randn(5, 7)}, "weight: shape (5, 7), must be [K, D] with K ≥ 1 and D = 8"),
    ({"weight": torch.randn(8)}, "weight: shape (8,), must be [K, D]"),
    ({"weight": torch.randn(0, 8)}, "K ≥ 1"),
    ({"weight": torch.randn(5, 8, device=META)}, "weight: on meta, but the other tensors are on cpu"),
    ({"target": torch.zeros(3, 4)}, "target: dtype float32, must be int64"),
    ({"target": torch.zeros(3, 5, dtype=torch.int64)}, "target: shape (3, 5), must be the leading shape of hidden"),
    ({"target": torch.full((3, 4), 5)}, "target: holds 5, must be in 0 … 4"),
    ({"target": torch.full((3, 4), -1)}, "target: holds -1, must be in 0 … 4"),
    ({"bias": torch.randn(6)}, "bias: shape (6,), must be [K] = (5,)"),
    ({"bias": torch.zeros(5, dtype=torch.int64)}, "bias: dtype int64"),
    ({"guidance_scale": -1.0}, "guidance_scale=-1.0: must be finite and ≥ 0 (0 turns guidance off)"),
    ({"guidance_scale": NAN}, "guidance_scale=nan"),
    ({"guidance_scale": 2.0}, "guidance_scale=2.0: needs hidden_uncond (or guidance_scale=0)"),
    ({"guidance_scale": 2.0, "hidden_uncond": torch.randn(4, 8)}, "hidden_uncond: shape (4, 8), must be the shape"),
    ({"temperature": 0.0}, "temperature=0.0: must be finite and > 0"),
    ({"temperature": None}, "temperature=None: must be a number"),
    ({"backend": "cuda"}, "backend 'cuda' "),  # not offered for it, or no GPU
]


@pytest.mark.parametrize(("changes", "message"), HEAD)
def test_selected_logprob(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        _logprob(**changes)


@pytest.mark.parametrize(("changes", "message"), HEAD)
def test_maskgit_grpo_loss_checks_its_head(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        _fused(**changes)


def _loss(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "logp": torch.randn(3, 4),
        "old_logp": torch.randn(3, 4),
        "ref_logp": torch.randn(3, 4),
        "advantages": torch.randn(3),
    }
    arguments.update(changes)
    uct.ops.grpo_loss(**arguments)


def _fused(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.randn(3, 4, 8),
        "weight": torch.randn(5, 8),
        "target": torch.zeros(3, 4, dtype=torch.int64),
        "bias": torch.randn(5),
        "old_logp": torch.randn(3, 4),
        "ref_logp": torch.randn(3, 4),
        "advantages": torch.randn(3),
    }
    arguments.update(changes)
    uct.ops.maskgit_grpo_loss(**arguments)


LOSS = [
    ({"old_logp": torch.randn(3, 5)}, "old_logp: shape (3, 5), must be the shape of"),
    ({"old_logp": None}, "old_logp: must be a tensor, got NoneType"),
    ({"ref_logp": torch.randn(4)}, "ref_logp: shape (4,)"),
    ({"ref_logp": None}, "beta=0.01: needs ref_logp (or beta=0)"),
    ({"advantages": torch.randn(4)}, "advantages: shape (4,), must be [R], one per rollout = (3,)"),
    ({"advantages": torch.randn(3, 4)}, "advantages: shape (3, 4)"),
    ({"advantages": torch.tensor([1, 2, 3])}, "advantages: dtype int64"),
    ({"alpha": -0.5}, "alpha=-0.5"),
    ({"alpha": NAN}, "alpha=nan"),
    ({"alpha": torch.ones(2)}, "alpha: shape (2,) does not broadcast to"),
    ({"alpha": torch.ones(2, 3, 4)}, "alpha: shape (2, 3, 4) does not broadcast to"),
    ({"clip_low": -0.1}, "clip_low=-0.1"),
    ({"clip_low": 1.2}, "clip_low=1.2: must be ≤ 1"),
    ({"clip_high": INF}, "clip_high=inf"),
    ({"beta": -1}, "beta=-1: must be finite and ≥ 0 (0 turns the KL penalty off)"),
    ({"mask": torch.ones(3, 4)}, "mask: dtype torch.float32: must be bool or integer; use alpha for weights"),
    ({"mask": torch.ones(3, 3, dtype=torch.bool)}, "mask: shape (3, 3) does not broadcast to"),
    ({"mask": [True]}, "mask: must be a tensor, got list"),
    ({"backend": "cuda"}, "backend 'cuda' "),
]


@pytest.mark.parametrize(("changes", "message"), LOSS)
def test_losses(changes: dict[str, Any], message: str) -> None:
    for call in (_loss, _fused):
        with pytest.raises(UserError, match=re.escape(message)):
            call(**changes)


def test_a_loss_needs_rollouts() -> None:
    one, none = torch.tensor(1.0), torch.zeros(0, 4)
    with pytest.raises(UserError, match="needs a leading dimension R ≥ 1"):
        uct.ops.grpo_loss(one, one, one, torch.zeros(1))
    with pytest.raises(UserError, match="needs a leading dimension R ≥ 1"):
        uct.ops.grpo_loss(none, none, none, torch.zeros(0))
    with pytest.raises(UserError, match="target: a 0-d tensor"):
        uct.ops.maskgit_grpo_loss(torch.ones(4), torch.ones(3, 4), torch.tensor(0), one, one, torch.zeros(1))


CATEGORICAL = [
    ({"logits": torch.zeros(3)}, "logits: shape (3,), must be [B, V]"),
    ({"logits": torch.full((2, 3), NAN)}, "logits: NaN"),
    ({"temperature": -1.0}, "temperature=-1.0: must be finite and ≥ 0"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_k": 2.5}, "top_k=2.5: must be an integer"),
    ({"sample_ids": torch.tensor([1])}, "sample_ids: shape (1,)"),
    ({"seed": "x"}, "seed='x'"),
    ({"step": 70000}, "step=70000"),
]


@pytest.mark.parametrize(("changes", "message"), CATEGORICAL)
def test_sample_categorical(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.randn(2, 3), "seed": 1, "sample_ids": torch.arange(2), "step": 0}
    arguments.update(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        uct.ops.sample_categorical(arguments.pop("logits"), **arguments)
