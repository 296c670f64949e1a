"""The head of the codes by two 16-bit products or one in float32: both against float64, and what the ratio becomes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyunictokens import RolloutEngine, ops
from pyunictokens.models import Showo
from pyunictokens.rollout.head import CodeHead, GuidedStates
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import image_logprobs
from pyunictokens.utils.errors import UserError

from .tiny import tiny_model

NARROW = [torch.bfloat16, torch.float16]
EPS = 2.0**-24
SHAPES = [(3, 7, 37, 29), (1, 1, 5, 2), (4, 9, 129, 65)]


class Only:
    """A model that is nothing but a head."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.parts, self.dtype, self.codebook_size = (weight, bias), weight.dtype, len(weight)

    def image_head(self) -> tuple[Tensor, Tensor | None]:
        return self.parts


def case(dtype: torch.dtype, shape: tuple[int, ...], seed: int, bias: bool = True) -> tuple[Only, Tensor, Tensor]:
    """(head, states with the prompt, states without), which differ little, as a model's do."""
    rows, count, width, entries = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    cond = draw(rows, count, width)
    uncond, weight = cond + 0.1 * draw(rows, count, width), 4 * draw(entries, width) / width**0.5
    model = Only(weight.to(dtype), draw(entries).to(dtype) if bias else None)
    return model, cond.to(dtype), uncond.to(dtype)


def truth(model: Only, cond: Tensor, uncond: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64, and the largest error that the sums of head.py may have. s: [B]."""
    weight, bias = (None if part is None else part.double() for part in model.parts)
    assert weight is not None
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    cond, uncond, s = cond.double(), uncond.double(), s.double()[:, None, None]
    logits = F.linear((1 + s) * cond - s * uncond, weight, bias)
    size = (1 + s) * F.linear(cond.abs(), weight.abs()) + s * F.linear(uncond.abs(), weight.abs()) + bias.abs()
    return logits, (cond.shape[-1] + 4) * EPS * size


@pytest.mark.parametrize("kind", ["16bit", "float32"])
@pytest.mark.parametrize("scale", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_either_form_is_within_its_bound_of_float64(dtype, shape, scale, kind):
    for seed, bias in ((0, True), (1, False)):
        model, cond, uncond = case(dtype, shape, seed, bias)
        states = GuidedStates(cond, uncond, scale) if scale else GuidedStates(cond)
        found = CodeHead(model, kind)(states)
        wanted, bound = truth(model, cond, uncond, torch.full((len(cond),), scale))
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        assert ((found - wanted).abs() <= bound).all()
        rounded = found.to(dtype).double()  # what a product with a 16-bit result would give at best
        assert shape[-1] < 10 or ((rounded - wanted).abs() > bound).any(), "the bound tells float32 sums from 16 bits"


@pytest.mark.parametrize("kind", ["16bit", "float32"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rows_with_guidance_of_their_own_and_rows_without(dtype, kind):
    """As a server has them: the first rows are guided, each by its own number. Parts are the whole, cut."""
    model, cond, uncond = case(dtype, (5, 7, 37, 29), 3)
    s = torch.tensor([5.0, 0.3, 2.0, 0.0, 0.0], dtype=torch.float64)
    states, head = GuidedStates(cond, uncond[:3], s[:3]), CodeHead(model, kind)
    wanted, bound = truth(model, cond, uncond, s)
    found = head(states)
    assert ((found - wanted).abs() <= bound).all()
    for size in (1, 2, 4):
        parts = torch.cat([head(states.part(at, at + size)) for at in range(0, 5, size)])
        assert ((parts - wanted).abs() <= bound).all()
    assert head(states.part(3, 5)).equal(head(GuidedStates(cond[3:])))


def test_float32_is_what_it_was_and_new_weights_are_read():
    """The form of float32 and float64 models, bit for bit: guided hidden states, then one product."""
    for dtype in (torch.float32, torch.float64):
        model, cond, uncond = case(dtype, (3, 7, 37, 29), 5)
        guided = (1 + 2.5) * cond - 2.5 * uncond
        kept, fresh = CodeHead(model, keep=True), CodeHead(model)
        states = GuidedStates(cond, uncond, 2.5)
        assert kept(states).equal(F.linear(guided, *model.parts)) and fresh(states).equal(kept(states))
    narrow, cond, _ = case(torch.bfloat16, (3, 7, 37, 29), 5)
    for kind in ("16bit", "float32"):
        kept, fresh = CodeHead(narrow, kind, keep=True), CodeHead(narrow, kind)
        before = kept(GuidedStates(cond))
        narrow.parts[0].mul_(2.0)
        assert kept(GuidedStates(cond)).equal(before) and not fresh(GuidedStates(cond)).equal(before)


def log_probs(logits: Tensor, target: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(-1, target[..., None])[..., 0]


@pytest.mark.parametrize("scale", [0.0, 5.0])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_recorded_log_probs_are_those_that_the_update_computes(dtype, scale):
    """Of the same hidden states, so that nothing but the head is compared: the ratio of the first update is 1 within
    twice the bounds of both sides' logits. The update guides hidden states: in float32 on a CPU; its kernels on a GPU
    hold them in the model's precision, which adds half a unit of that to each guided number."""
    model, cond, uncond = case(dtype, (4, 9, 129, 65), 7)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 65, (4, 9), generator=generator)
    states = GuidedStates(cond, uncond, scale) if scale else GuidedStates(cond)
    recorded = log_probs(CodeHead(model, "16bit")(states), target)
    weight, bias = model.parts
    assert bias is not None
    guidance = {"hidden_uncond": uncond, "guidance_scale": scale} if scale else {}
    _, bound = truth(model, cond, uncond, torch.full((4,), scale))
    allowed = 4 * bound.amax(-1)  # of each side's logits: the one that was chosen, and the largest of the sum
    off = ops.selected_logprob(cond, weight, target, bias, **guidance).double() - recorded
    assert (off.abs() <= allowed + 1e-6 * recorded.abs()).all() and off.exp().sub(1).abs().max() < 1e-3
    guided = ((1 + scale) * cond.float() - scale * uncond.float()).to(dtype)
    on_gpu = log_probs(F.linear(guided.double(), weight.double(), bias.double()), target) - recorded
    unit = torch.finfo(dtype).eps / 2
    rounding = 2 * unit * F.linear(guided.double().abs(), weight.double().abs()).amax(-1)
    assert (on_gpu.abs() <= allowed + rounding).all()
    assert on_gpu.square().mean().sqrt() < 2.5 * unit * 4 / 3**0.5, "it is that of logits with a deviation of 4"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_rollout_records_the_same_by_either_form(dtype):
    """Code for code and to float32 rounding; by captured steps (here run by the host) as well. The update agrees."""
    model = tiny_model().to(dtype)
    options = {"samples": 3, "steps": 4, "guidance_scale": 5.0, "seed": 2, "decode": False}
    drawn = {
        (kind, capture): RolloutEngine(model, head=kind, capture=capture).generate_images([[5, 6], [7]], **options)
        for kind in ("16bit", "float32")
        for capture in ("off", "eager")
    }
    first = drawn["16bit", "off"]
    for (kind, capture), images in drawn.items():
        assert torch.equal(images.inputs, first.inputs) and torch.equal(images.chosen, first.chosen)
        spread = (images.logp - first.logp).abs().max()
        same_step = capture == "off"
        float32 = 11 * 32 * 2**-23  # guidance at 5 multiplies by eleven what is lost of logits below 32
        assert spread < (float32 if same_step else 0.02 * 11), (kind, capture)
    off = image_logprobs(model, ImageTrajectories.of(model, first)) - first.logp
    assert off.abs().max() < 2e-2 * 11


def test_what_is_asked_for_is_used_or_refused(monkeypatch):
    narrow, wide = tiny_model().to(torch.bfloat16), tiny_model(dtype=torch.float32)
    assert not CodeHead(narrow).narrow, "a CPU multiplies float32 faster"
    assert CodeHead(narrow, "16bit").narrow and not CodeHead(wide).narrow
    with pytest.raises(UserError, match=r"head='int8': must be one of auto, float32, 16bit"):
        RolloutEngine(wide, head="int8")
    with pytest.raises(UserError, match=r"head=16bit: this model computes in float32; load it in bfloat16, or use"):
        RolloutEngine(wide, head="16bit")
    used: list[str] = []
    init = CodeHead.__init__

    def watched(self: CodeHead, model: Showo, kind: str = "auto", *, keep: bool = False) -> None:
        used.append(kind)
        init(self, model, kind, keep=keep)

    monkeypatch.setattr(CodeHead, "__init__", watched)
    for capture in ("off", "eager"):
        RolloutEngine(narrow, head="16bit", capture=capture).generate_images([[5]], steps=1, decode=False)
    assert len(used) == 3 and set(used) == {"16bit"}, "slots, and with captured steps their own head too"
