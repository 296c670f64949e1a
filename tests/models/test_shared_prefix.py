"""Attention in two parts, joined: values and gradients against one softmax over both, by every kernel that can run."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyunictokens.models import PromptKV
from pyunictokens.models.showo.attention import CausalAfterPrompt, PromptAttention
from pyunictokens.models.showo.kernels import TOGETHER, CpuKernel, CudaKernel, kernel_for
from pyunictokens.models.showo.shared_prefix import joined_attention
from pyunictokens.utils import profiling
from pyunictokens.utils.errors import UserError


def problem(seed, lengths, prompt_of_row, heads=3, new=7, width=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 2).to(dtype).requires_grad_()

    q, k, v = (draw(len(prompt_of_row), heads, new, width) for _ in range(3))
    prompts = PromptKV(
        [[draw(heads, length, width)] for length in lengths],
        [[draw(heads, length, width)] for length in lengths],
        [0] * len(lengths),
    )
    return q, k, v, prompts


def plain(q, k, v, prompts, prompt_of_row, causal):
    """One softmax, row by row, in fp64."""
    rows = []
    for row, prompt in enumerate(prompt_of_row):
        keys = torch.cat([prompts.keys[prompt][0], k[row]], 1).double()
        values = torch.cat([prompts.values[prompt][0], v[row]], 1).double()
        scores = q[row].double() @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
        if causal:
            past, new = keys.shape[1] - k.shape[2], k.shape[2]
            hidden = torch.ones(new, new).triu(1).bool()
            scores = scores.masked_fill(torch.cat([torch.zeros(new, past).bool(), hidden], 1), -torch.inf)
        rows.append(scores.softmax(-1) @ values)
    return torch.stack(rows)


ROWS = [[0, 0, 0], [0, 0, 1, 2, 2], [1, 0, 1, 2]]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_values_and_gradients_are_those_of_one_softmax(rows, joined, causal):
    q, k, v, prompts = problem(len(rows), [5, 1, 9], rows)
    leaves = [q, k, v, *(layers[0] for layers in prompts.keys), *(layers[0] for layers in prompts.values)]
    attend = (CausalAfterPrompt if causal else PromptAttention)(prompts, rows, joined=joined)
    ours, theirs = attend(0, q, k, v), plain(q, k, v, prompts, rows, causal)
    assert (ours - theirs).abs().max() < 1e-12
    weights = torch.randn(ours.shape, dtype=torch.float64)
    used = [leaf for leaf in leaves if leaf.shape[1] in (7, *(prompts.lengths[prompt] for prompt in rows))]
    mine = torch.autograd.grad((ours * weights).sum(), used, retain_graph=True)
    wanted = torch.autograd.grad((theirs * weights).sum(), used)
    for one, other in zip(mine, wanted, strict=True):
        assert (one - other).abs().max() < 1e-11
    with torch.no_grad():
        assert (attend(0, q, k, v) - ours).abs().max() < 1e-14


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_narrow_types_stay_near_the_exact_softmax(dtype, bound):
    q, k, v, prompts = problem(1, [4, 11], [0, 0, 1], dtype=dtype)
    exact = plain(q, k, v, prompts, [0, 0, 1], False)
    joined = PromptAttention(prompts, [0, 0, 1], joined=True)(0, q, k, v)
    assert joined.dtype == dtype
    assert (joined.double() - exact).abs().max() < bound * exact.abs().max()


def test_scores_far_apart_do_not_overflow():
    q, k, v, prompts = problem(2, [3], [0, 0])
    with torch.no_grad():
        for scale in (1e-3, 300.0):
            big = q * scale
            ours = PromptAttention(prompts, [0, 0], joined=True)(0, big, k, v)
            assert (ours - plain(big, k, v, prompts, [0, 0], False)).abs().max() < 1e-9


def test_a_gpus_kernel_is_called_as_torch_declares_it():
    """On a machine without a GPU the calls go through torch's shape rules for that device."""
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(4, 2, 10, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        keys = torch.empty(2, 6, 64, dtype=torch.bfloat16, device="cuda")
        kernel = kernel_for(q)
        assert isinstance(kernel, CudaKernel)
        out = joined_attention(q, k, v, [(3, keys, keys), (1, keys, keys)])
        assert out.shape == q.shape and out.dtype == torch.bfloat16
        shared = keys.expand(4, -1, -1, -1)
        out, lse, extra = kernel.forward(q, shared, shared, False)
        assert lse.shape == (4, 2, 10) and lse.dtype == torch.float32
        gradients = kernel.backward(out, q, shared, shared, out, lse, False, extra)
        assert [g.shape for g in gradients] == [q.shape, shared.shape, shared.shape]
        assert kernel_for(q.float()) is None and kernel_for(q[..., :60]) is None


def test_misuse_is_named():
    q, k, v, prompts = problem(4, [5], [0, 0])
    with pytest.raises(ValueError, match=r"runs of \[1\] rows for 2 rows"):
        joined_attention(q, k, v, [(1, prompts.keys[0][0], prompts.values[0][0])])
    meta = q.detach().to("meta")
    with pytest.raises(UserError, match="no kernel here gives its log-sum-exp"):
        joined_attention(meta, meta, meta, [(2, meta[0], meta[0])])


@pytest.mark.parametrize("joined", [True, False])
def test_the_way_taken_is_written_down(joined):
    q, k, v, prompts = problem(5, [5], [0, 0])
    with profiling.Recorder() as recorder, torch.no_grad():
        PromptAttention(prompts, [0, 0], joined=joined)(0, q, k, v)
    paths = recorder.report(torch.float32).paths
    assert paths == {"shared-prefix attention": CpuKernel.name if joined else TOGETHER}
