"""The engine on a GPU against the CPU: images and answers in fp64, attention over shared prompts in its own dtype."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from pyunictokens import DsogThreshold, RolloutEngine
from pyunictokens.models import PromptKV
from pyunictokens.models.showo.attention import CausalAfterPrompt, PromptAttention
from pyunictokens.models.showo.buffers import BufferedAttention
from pyunictokens.models.showo.padding import padded
from pyunictokens.rollout import Dsog
from pyunictokens.rollout.text import WORTH_A_CAPTURE

from ..models.test_shared_prefix import plain, problem
from ..rollout.tiny import CodesAsPixels, tiny_model


def engine(device: str) -> RolloutEngine:
    return RolloutEngine(tiny_model().to(device), CodesAsPixels().to(device), max_rows=4)


@pytest.mark.parametrize("overlap", [False, True])
def test_images_are_those_of_the_cpu(device: str, overlap: bool) -> None:
    def draw(place: str) -> tuple[Tensor, Tensor, Tensor]:
        def scorer(pixels: Tensor, prompt_index: Tensor) -> Tensor:
            return (pixels.double().mean((1, 2, 3)) % 1.0).float()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rollout = engine(place).generate_images(
                [[1, 2], [3], [4, 5, 6]],
                samples=3,
                steps=6,
                guidance_scale=2.0,
                dsog=Dsog(DsogThreshold(), scorer, overlap=overlap),
            )
        assert rollout.inputs is not None
        return rollout.codes.cpu(), rollout.inputs.cpu(), rollout.sample_ids

    for ours, cpu in zip(draw(device), draw("cpu"), strict=True):
        assert torch.equal(ours, cpu)


@pytest.mark.parametrize("tokens", [WORTH_A_CAPTURE // 2, WORTH_A_CAPTURE + 4])
def test_answers_are_those_of_the_cpu(device: str, tokens: int) -> None:
    """Short ones, whose steps the host runs, and those long enough for a captured step."""
    codes = torch.randint(0, 24, (3, 9), generator=torch.Generator().manual_seed(0))
    options = dict(samples=2, max_new_tokens=tokens, seed=3)
    ours, cpu = (engine(place).generate_text(codes, [[1], [2, 3], [4]], **options) for place in (device, "cpu"))
    assert torch.equal(ours.tokens.cpu(), cpu.tokens)
    assert (ours.logp.cpu() - cpu.logp).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_shared_prompts(device: str, causal: bool) -> None:
    """Values and gradients of the device's flash kernel, joined, against one softmax in fp64."""
    dtype, bound = (torch.bfloat16, 3e-2) if device == "cuda" else (torch.float32, 1e-5)
    torch.manual_seed(0)
    rows, heads, new, width = [0, 0, 1, 2], 3, 70, 64

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype).requires_grad_()

    q, k, v = (draw(len(rows), heads, new, width) for _ in range(3))
    keys, values = ([[draw(heads, length, width)] for length in (9, 1, 33)] for _ in range(2))
    leaves = [q, k, v, *(layers[0] for layers in keys + values)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    prompts = PromptKV(keys, values, [0] * 3)
    twin = PromptKV([[leaf] for leaf in exact[3:6]], [[leaf] for leaf in exact[6:]], [0] * 3)
    attend = CausalAfterPrompt if causal else PromptAttention
    ours = attend(prompts, rows, joined=True)(0, q, k, v)
    truth = attend(twin, rows, joined=False)(0, *exact[:3])
    upstream = torch.randn_like(truth)
    mine = torch.autograd.grad((ours * upstream.to(dtype)).sum(), leaves)
    wanted = torch.autograd.grad((truth * upstream).sum(), exact)
    for one, other in zip((ours, *mine), (truth, *wanted), strict=True):
        assert (one.double() - other).abs().max() <= bound * other.abs().max()


@torch.no_grad()
def test_attention_over_padded_prompts(device: str) -> None:
    """The kernel of the device reads keys of one more feature than it was made for, and padding has no weight."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = [0, 0, 1, 2, 2]
    q, k, v, prompts = problem(6, [5, 70, 129], rows, heads=2, new=66, width=64, dtype=dtype)
    q, k, v = (each.detach().to(device) for each in (q, k, v))
    prompts = prompts.with_tensors([each.detach().to(device) for each in prompts.tensors()])
    bare = PromptAttention(prompts, rows, joined=True)(0, q, k, v)
    room = PromptAttention(padded(prompts, 256), rows, joined=True)(0, q, k, v)
    exact = plain(q, k, v, prompts, rows, False)
    assert (room.double() - exact).abs().max() <= 1.5 * (bare.double() - exact).abs().max() + 1e-6


@pytest.mark.parametrize("room", [0, 256])
@pytest.mark.parametrize("each_layer", [True, False])
@torch.no_grad()
def test_attention_over_buffers(device: str, room: int, each_layer: bool) -> None:
    """The kernel of the device reads as many keys of a row as its length says, after other prompts were loaded too."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = [0, 0, 1, 2, 2]
    q, k, v, prompts = problem(6, [5, 70, 129], rows, heads=2, new=66, width=64, dtype=dtype)
    q, k, v = (each.detach().to(device) for each in (q, k, v))
    prompts = prompts.with_tensors([each.detach().to(device) for each in prompts.tensors()])
    mine = padded(prompts, room) if room else prompts
    mine = mine.with_tensors([each.clone() for each in mine.tensors()])
    attend = BufferedAttention(mine, rows, 66, 64, each_layer)
    for turn in range(2):
        exact = plain(q, k, v, prompts, rows, False)
        apart = PromptAttention(mine, rows)(0, q, k, v)
        found = attend(0, q, k, v)
        assert (found.double() - exact).abs().max() <= 1.5 * (apart.double() - exact).abs().max() + 1e-6
        if not turn:
            prompts = prompts.select([1, 0, 2]) if room else prompts.with_tensors([-each for each in prompts.tensors()])
            for tensor, other in zip(
                mine.tensors(), (padded(prompts, room) if room else prompts).tensors(), strict=True
            ):
                tensor.copy_(other)
            attend.refresh()


@pytest.mark.gpu
@pytest.mark.parametrize("room", [0, 256])
@torch.no_grad()
def test_flash_attn_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """The package's own kernel against one softmax in fp64, over prompts as they are and padded ones."""
    pytest.importorskip("flash_attn", reason="needs the extra `flash`")
    from pyunictokens.models.showo.kernels import CudaKernel, FlashAttnKernel, kernel_for

    rows = [0, 0, 1, 2, 2]
    q, k, v, prompts = problem(7, [5, 70, 129], rows, heads=2, new=66, width=64, dtype=torch.bfloat16)
    q, k, v = (each.detach().cuda() for each in (q, k, v))
    prompts = prompts.with_tensors([each.detach().cuda() for each in prompts.tensors()])
    monkeypatch.setenv("PYUNICTOKENS_ATTENTION", "flash2")
    assert type(kernel_for(q)) is FlashAttnKernel
    found = PromptAttention(padded(prompts, room) if room else prompts, rows, joined=True)(0, q, k, v)
    exact = plain(q, k, v, prompts, rows, False)
    assert (found.double() - exact).abs().max() <= 3e-2 * exact.abs().max()
    for causal in (False, True):
        ours, theirs = FlashAttnKernel().forward(q, k, v, causal), CudaKernel().forward(q, k, v, causal)
        assert (ours[1] - theirs[1]).abs().max() < 1e-3
        assert (ours[0].double() - theirs[0].double()).abs().max() < 3e-2 * theirs[0].abs().max()


@pytest.mark.gpu
@torch.no_grad()
def test_compiled_blocks() -> None:
    """Hidden states of a step as of eager blocks, and captured rollouts that compile once."""
    from torch._dynamo.utils import counters

    model = tiny_model(dtype=torch.bfloat16, num_hidden_layers=3).to("cuda")
    prompts = model.prefill([model.prompt_ids(text) for text in ([1, 2], [3])])
    codes = torch.randint(-1, 24, (2, 9), device="cuda")
    eager = model.image_hidden(codes, prompts, [0, 1])
    with model.compiled_blocks():
        found = model.image_hidden(codes, prompts, [0, 1])
    assert (found.double() - eager.double()).norm() < 2e-2 * eager.double().norm()
    drawing, before = RolloutEngine(model, repeats=True, blocks="compiled"), counters["stats"]["unique_graphs"]
    for prompt in ([1, 2], [4, 5, 6]):
        images = drawing.generate_images([prompt], samples=3, steps=4, decode=False)
        assert images.logp is not None and bool(torch.isfinite(images.logp).all())
    assert counters["stats"]["unique_graphs"] - before == 3
