"""Padded prompts: values of one softmax over the prompt's own positions, in every kernel and precision, nothing of what
lies in the padding, and a length that is the same for many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pyunictokens.models.showo.attention import PromptAttention
from pyunictokens.models.showo.kernels import CudaKernel
from pyunictokens.models.showo.padding import FEATURES, GRAIN, padded, padded_length
from pyunictokens.models.showo.shared_prefix import joined_attention
from tests.models.test_shared_prefix import plain, problem
from tests.rollout.tiny import tiny_model


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    more=st.integers(0, 40),
    joined=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_equal_one_softmax_over_a_prompts_own_positions(lengths, more, joined, scale, seed):
    rows = [row % len(lengths) for row in range(5)] if not joined else sorted(row % len(lengths) for row in range(5))
    q, k, v, prompts = problem(seed, lengths, rows)
    q = q * scale
    room = padded(prompts, max(lengths) + more)
    assert room.lengths == [max(lengths) + more] * len(lengths)
    assert all(part[0].shape == (3, max(lengths) + more, 16 + FEATURES) for part in room.parts)
    found = PromptAttention(room, rows, joined=joined)(0, q, k, v)
    assert (found - plain(q, k, v, prompts, rows, False)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("joined", [True, False])
@torch.no_grad()
def test_padding_adds_nothing_in_any_precision(dtype, joined):
    rows = [0, 0, 1]
    q, k, v, prompts = problem(1, [4, 11], rows, dtype=dtype)
    bare = PromptAttention(prompts, rows, joined=joined)(0, q, k, v)
    room = PromptAttention(padded(prompts, 64), rows, joined=joined)(0, q, k, v)
    exact = plain(q, k, v, prompts, rows, False)
    assert (room.double() - exact).abs().max() <= 1.5 * (bare.double() - exact).abs().max() + 1e-7
    spoiled = padded(prompts, 64)
    for part, length in zip(spoiled.parts, prompts.lengths, strict=True):
        part[0][:, length:, :16] = 3.0  # what lies there has no weight
        part[1][:, length:, :16] = 1e3
    assert torch.equal(PromptAttention(spoiled, rows, joined=joined)(0, q, k, v), room)


@torch.no_grad()
def test_padded_and_bare_prompts_stand_side_by_side():
    """As with guidance: the empty prompt needs no room."""
    rows = [0, 1, 2, 2]
    q, k, v, prompts = problem(2, [3, 5, 8], rows)
    mixed = padded(prompts.select([0, 1]), 8) + prompts.select([2])
    for joined in (True, False):
        found = PromptAttention(mixed, rows, joined=joined)(0, q, k, v)
        assert (found - plain(q, k, v, prompts, rows, False)).abs().max() < 1e-12


def test_a_gpus_kernel_is_called_as_torch_declares_it():
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(4, 2, 10, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        keys = torch.empty(2, 128, 64 + FEATURES, dtype=torch.bfloat16, device="cuda")
        out = joined_attention(q, k, v, [(3, keys, keys), (1, keys[..., :64], keys[..., :64])])
        assert out.shape == q.shape and out.dtype == torch.bfloat16
        out, lse, _ = CudaKernel().forward(q, k, v, False, 0.1)
        assert out.shape == q.shape and lse.shape == (4, 2, 10)


def test_gradients_are_refused():
    q, k, v, prompts = problem(3, [3], [0])
    with pytest.raises(ValueError, match="padded prompts have no gradients"):
        PromptAttention(padded(prompts, 8), [0], joined=True)(0, q, k, v)


@pytest.mark.parametrize(
    ("length", "longest", "found"),
    [(3, 49, 49), (49, 49, 49), (3, 129, GRAIN), (129, 129, 129), (129, 513, 2 * GRAIN)],
)
def test_few_lengths(length, longest, found):
    assert padded_length(length, longest) == found


@torch.no_grad()
def test_an_image_step_over_padded_prompts_is_the_step():
    model = tiny_model()
    prompts = model.prefill([model.prompt_ids(text) for text in ([1, 2, 3], [4], list(range(9)))])
    room = model.padded(prompts)
    assert room.lengths == [13] * 3 and room.next_position == prompts.next_position
    codes = torch.randint(-1, 24, (4, 9), generator=torch.Generator().manual_seed(5))
    for rows in ([0, 1, 2, 2], [2, 0, 1, 0]):
        wanted = model.image_hidden(codes, prompts, rows)
        assert (model.image_hidden(codes, room, rows) - wanted).abs().max() < 1e-12
