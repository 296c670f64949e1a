"""Image steps over buffers: values of one softmax over prompt and own positions, whatever was loaded before, and the
engine's own rollouts."""

from __future__ import annotations

import sys
import types
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pyunictokens.models import PromptKV
from pyunictokens.models.showo import buffers
from pyunictokens.models.showo.buffers import WAY, BufferedAttention, buffers_serve
from pyunictokens.models.showo.kernels import CudaKernel, FlashAttnKernel, LengthsKernel, RowLengths, _package
from pyunictokens.models.showo.padding import padded
from pyunictokens.rollout.cuda_graphs.device_step import GuidedHidden
from pyunictokens.utils import profiling
from tests.models.test_shared_prefix import plain, problem
from tests.rollout.test_captured import same
from tests.rollout.tiny import tiny_engine, tiny_model

LAYERS, HEADS, NEW, WIDTH = 3, 3, 7, 16


def layered(seed, lengths, layers=LAYERS):
    """Prompts with keys and values of their own in each layer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return [torch.randn(HEADS, length, WIDTH, generator=generator, dtype=torch.float64) for _ in range(layers)]

    return PromptKV([draw(n) for n in lengths], [draw(n) for n in lengths], [0] * len(lengths))


def of_layer(prompts, layer):
    return PromptKV(
        [[keys[layer]] for keys in prompts.keys], [[values[layer]] for values in prompts.values], prompts.next_position
    )


def check(attend, prompts, rows, seed):
    """All layers of two steps against the definition; `prompts` are the bare ones."""
    for step in range(2):
        for layer in range(LAYERS):
            q, k, v, _ = problem(seed + 10 * step + layer, [1], rows)
            found = attend(layer, q, k, v)
            assert (found - plain(q, k, v, of_layer(prompts, layer), rows, False)).abs().max() < 1e-12


class Emulated:
    """A kernel that reads as many keys of each row as its length says, and of the others not even whether they are
    numbers."""

    name = "emulated"

    def over_lengths(self, q, keys, values, lengths):
        assert lengths.new_starts.tolist() == [row * q.shape[2] for row in range(len(q) + 1)]
        assert lengths.buffer_starts.tolist() == [row * keys.shape[1] for row in range(len(q) + 1)]
        out = []
        for row, used in enumerate(lengths.used.tolist()):
            mine = (part[row, :used].transpose(0, 1) for part in (keys, values))
            out.append(torch.nn.functional.scaled_dot_product_attention(q[row], *mine))
        return torch.stack(out)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    more=st.sampled_from([None, 0, 5, 30]),
    bare_last=st.booleans(),
    each_layer=st.booleans(),
    emulated=st.booleans(),
    order=st.permutations(range(6)),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_equal_one_softmax_and_see_nothing_of_earlier_prompts(
    lengths, more, bare_last, each_layer, emulated, order, seed
):
    rows = [place % len(lengths) for place in order]

    def room(prompts):
        if more is None:
            return prompts
        last = prompts.select([len(prompts) - 1])
        wide = padded(prompts, max(lengths) + more)
        return wide.select(range(len(prompts) - 1)) + last if bare_last else wide

    prompts = layered(seed, lengths)
    mine = room(prompts)
    mine = mine.with_tensors([tensor.clone() for tensor in mine.tensors()])
    with patch.object(buffers, "lengths_kernel", lambda *_: Emulated() if emulated else None):
        attend = BufferedAttention(mine, rows, NEW, WIDTH, each_layer)
    assert len(attend._buffers) == (LAYERS if each_layer else 1)
    check(attend, prompts, rows, seed % 1000)
    places = [buffer.data_ptr() for pair in attend._buffers for buffer in pair]
    shorter = [1 + (n + seed) % n if more is not None and not (bare_last and i == len(lengths) - 1) else n
               for i, n in enumerate(lengths)]  # fmt: skip
    other = layered(seed + 1, shorter)
    theirs = other if more is None else padded(other, max(lengths) + more)
    if more is not None and bare_last:
        theirs = theirs.select(range(len(lengths) - 1)) + other.select([len(lengths) - 1])
    for tensor, new in zip(mine.tensors(), theirs.tensors(), strict=True):
        tensor.copy_(new)
    attend.refresh()
    check(attend, other, rows, seed % 1000 + 50)
    assert places == [buffer.data_ptr() for pair in attend._buffers for buffer in pair]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_types_are_as_near_to_the_exact_softmax_as_before(dtype):
    rows = [0, 0, 1]
    q, k, v, prompts = problem(1, [4, 11], rows, dtype=dtype)
    exact = plain(q, k, v, prompts, rows, False)
    attend = BufferedAttention(padded(prompts, 64), rows, 7, 16)
    found, before = attend(0, q, k, v), attend._apart(0, q, k, v)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= 1.5 * (before.double() - exact).abs().max() + 1e-7
    for buffer in attend._buffers[0]:
        buffer[:2, 7 + 4 :] = 1e3  # what no row has
    assert torch.equal(attend(0, q, k, v), found)


def test_with_gradients_nothing_is_kept():
    q, k, v, prompts = problem(2, [5], [0, 0])
    with torch.no_grad():
        attend = BufferedAttention(prompts, [0, 0], 7, 16)
    weights = torch.randn(q.shape, dtype=torch.float64)
    leaves = [q, k, v, prompts.keys[0][0], prompts.values[0][0]]
    mine = torch.autograd.grad((attend(0, q, k, v) * weights).sum(), leaves)
    wanted = torch.autograd.grad((plain(q, k, v, prompts, [0, 0], False) * weights).sum(), leaves)
    assert all((one - other).abs().max() < 1e-11 for one, other in zip(mine, wanted, strict=True))
    assert not any(buffer[:, :7].any() for pair in attend._buffers for buffer in pair)


@pytest.mark.parametrize(("free", "pairs"), [(None, 3), (1 << 40, 3), (1 << 16, 1)])
def test_little_memory_makes_one_pair_of_buffers_serve_all_layers(monkeypatch, free, pairs):
    monkeypatch.setattr(buffers, "free_bytes", lambda _: free)
    assert len(BufferedAttention(layered(0, [4]), [0, 0], NEW, WIDTH)._buffers) == pairs


def test_they_serve_where_a_kernel_reads_lengths(monkeypatch):
    assert isinstance(CudaKernel(), LengthsKernel) and isinstance(FlashAttnKernel(), LengthsKernel)
    with FakeTensorMode():
        gpu = torch.device("cuda")
        assert buffers_serve(gpu, torch.bfloat16, 64)
        assert not buffers_serve(gpu, torch.float32, 64) and not buffers_serve(gpu, torch.bfloat16, 60)
        monkeypatch.setenv("PYUNICTOKENS_BUFFERS", "0")
        assert not buffers_serve(gpu, torch.bfloat16, 64)
        monkeypatch.delenv("PYUNICTOKENS_BUFFERS")
    assert buffers_serve(torch.device("cpu"), torch.float64, 60)


def test_a_gpus_kernel_is_called_as_torch_declares_it():
    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(4, 2, 10, 64, dtype=torch.bfloat16, device="cuda")
        keys, values = (torch.empty(4, 138, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        out = CudaKernel().over_lengths(q, keys, values, RowLengths.make(4, 10, 138, q.device))
        assert out.shape == q.shape and out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()


@torch.no_grad()
def test_flash_attn_is_given_the_lengths(monkeypatch):
    def with_kvcache(q, k_cache, v_cache, *, cache_seqlens):
        starts = torch.arange(len(q) + 1, dtype=torch.int32)
        lengths = RowLengths(cache_seqlens, starts * q.shape[1], starts * k_cache.shape[1])
        return Emulated().over_lengths(q.transpose(1, 2), k_cache, v_cache, lengths).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_with_kvcache=with_kvcache))
    _package.cache_clear()
    monkeypatch.setattr(buffers, "lengths_kernel", lambda *_: FlashAttnKernel())
    q, k, v, prompts = problem(3, [5, 2], [0, 1])
    found = BufferedAttention(prompts, [0, 1], 7, 16)(0, q, k, v)
    assert (found - plain(q, k, v, prompts, [0, 1], False)).abs().max() < 1e-12
    _package.cache_clear()


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("free", [None, 0])
@torch.no_grad()
def test_rollouts_are_those_without_buffers(monkeypatch, guidance, free):
    """Captured loops reused for other prompts, in place and with new weights, against slots that the host runs."""
    monkeypatch.setattr(buffers, "free_bytes", lambda _: free)
    model = tiny_model()
    engine, host = tiny_engine(model, capture="eager", max_rows=3), tiny_engine(model, capture="off", max_rows=3)
    turns = ([[1, 2], [3]], [[4, 5, 6], []], [list(range(9))], [[7]], [[1], [2, 3], [4]])
    for turn, prompts in enumerate(turns):
        if turn == 2:
            for parameter in model.parameters():
                parameter.mul_(1.03)
        options = dict(samples=3, steps=4, guidance_scale=guidance, seed=3)
        with profiling.Recorder() as recorder:
            found = engine.generate_images(prompts, **options)
        assert WAY in recorder.report(torch.float64).paths["shared-prefix attention"]
        same(found, host.generate_images(prompts, **options))
    assert engine._captures.made == 1


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@torch.no_grad()
def test_hidden_states_follow_what_is_loaded(guidance):
    model = tiny_model()
    texts = [[1, 2, 3], [4, 5, 6], []] if guidance else [[1, 2, 3], [4, 5, 6]]
    prompts = model.prefill([model.prompt_ids(text) for text in texts])
    codes = torch.randint(-1, 24, (3, 9), generator=torch.Generator().manual_seed(5))
    hidden = GuidedHidden(model, prompts, [0, 1, 0], guidance, 9)
    for order in ([0, 1], [1, 0]):
        chosen = prompts.select([*order, 2] if guidance else order)
        hidden.load(chosen)
        found, wanted = hidden(codes, torch.zeros(3)), model.image_hidden(codes, chosen, [0, 1, 0])
        assert (found.cond_BND - wanted).abs().max() < 1e-12
        if guidance:
            assert (found.uncond_GND - model.image_hidden(codes, chosen, [2] * 3)).abs().max() < 1e-12
