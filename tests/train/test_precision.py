"""Half precision through all 24 layers: how far log-probs drift from float32, and a ratio of 1 at the first update.

Weights and activations are of the dtype that is asked for; guidance, heads, softmax and loss stay in float32. The model
is as deep as Show-o and narrow, with weights drawn so that the scale of its hidden states stays level over the depth.
Guidance multiplies what rounding does: (1 + s)·cond − s·uncond has 1 + 2 s times the error of either half.
"""

from __future__ import annotations

import functools

import pytest
import torch

from pyunictokens import RolloutEngine
from pyunictokens.models import Showo, fp8
from pyunictokens.rollout.types import ImageRollout, TextRollout
from pyunictokens.train.trajectories import AnswerTrajectories, ImageTrajectories
from pyunictokens.train.update import LossSettings, answer_logprobs, image_logprobs, streamed_backward
from pyunictokens.utils.errors import UserError

from .world import grpo_config, tiny_model

LAYERS, WIDTH = 24, 64
ROOT_MEAN_SQUARE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.0025}
"""Of the difference of one half's log-probs from float32, per unit of 1 + 2 s. About twice what was found."""
FP8 = {0.0: 0.15, 5.0: 0.7}
"""Root mean square of what fp8 products move a log-prob by, for a guidance scale. About twice what was found."""
LARGEST = 5.0
"""The largest difference, in root mean squares: log-probs have no outliers."""


@functools.lru_cache(maxsize=4)
def deep(dtype: torch.dtype) -> Showo:
    model = tiny_model(layers=LAYERS, width=WIDTH)
    generator = torch.Generator().manual_seed(0)
    for name, value in sorted(model.named_parameters()):
        scale = 0.5 if "embed" in name else 0.15 if "lm_head" in name else value.shape[-1] ** -0.5
        if "dense" in name or "fc2" in name:
            scale *= (2 * LAYERS) ** -0.5
        if value.ndim == 2:
            value.copy_(torch.randn(value.shape, generator=generator) * scale)
        elif "norm" not in name:
            value.mul_(0.1)
    return model.to(dtype)


def drawn(dtype: torch.dtype, scale: float, head: str = "auto") -> ImageRollout:
    engine = RolloutEngine(deep(dtype), head=head)
    prompts = [[5, 6], [7, 8, 9]]
    return engine.generate_images(prompts, samples=3, steps=4, guidance_scale=scale, seed=1, decode=False)


def recorded(rollout: ImageRollout, model: Showo) -> ImageTrajectories:
    return ImageTrajectories.of(model, rollout)


def answered(dtype: torch.dtype) -> TextRollout:
    model = deep(dtype)
    codes = torch.arange(model.config.num_vq_tokens)[None] % model.config.codebook_size
    return RolloutEngine(model).generate_text(codes, [[4, 8, 12]], samples=4, max_new_tokens=6, seed=2)


def as_trajectories(rollout: TextRollout) -> AnswerTrajectories:
    assert rollout.image_codes is not None
    return AnswerTrajectories(rollout.image_codes[0], rollout.question_ids[0], rollout.tokens, rollout.logp)


@pytest.mark.parametrize("scale", [0.0, 5.0])
@pytest.mark.parametrize("dtype", list(ROOT_MEAN_SQUARE), ids=str)
def test_drift_of_image_log_probs(dtype, scale):
    truth = drawn(torch.float32, scale)
    assert truth.logp.std() > 0.5, "log-probs far from flat"
    off = image_logprobs(deep(dtype), recorded(truth, deep(dtype))) - truth.logp
    spread, bound = off.pow(2).mean().sqrt(), ROOT_MEAN_SQUARE[dtype] * (1 + 2 * scale)
    assert spread < bound and off.abs().max() < LARGEST * bound
    assert dtype == torch.float32 or spread > 0.02 * bound, "the precision is the one asked for"
    assert abs(off.mean()) < 0.3 * bound, "no side is favoured"


@pytest.mark.parametrize("dtype", list(ROOT_MEAN_SQUARE), ids=str)
def test_drift_of_answer_log_probs(dtype):
    truth = answered(torch.float32)
    off = answer_logprobs(deep(dtype), as_trajectories(truth)) - truth.logp
    assert off.pow(2).mean().sqrt() < ROOT_MEAN_SQUARE[dtype] and off.abs().max() < LARGEST * ROOT_MEAN_SQUARE[dtype]


@pytest.mark.parametrize(
    ("dtype", "head"),
    [*((dtype, "auto") for dtype in ROOT_MEAN_SQUARE), (torch.bfloat16, "16bit"), (torch.float16, "16bit")],
    ids=str,
)
def test_the_first_update_has_ratio_one(dtype, head):
    """Sampling and update run the same blocks, so in one dtype they agree far better than two dtypes do; with the
    rollout's head as two 16-bit products, which a GPU takes, as well."""
    images, answers = drawn(dtype, 5.0, head), answered(dtype)
    model = deep(dtype).requires_grad_(True)
    try:
        stats = streamed_backward(
            model,
            torch.linspace(-1, 1, len(images)),
            LossSettings(beta=0.0, micro_rows=2, micro_timesteps=2),
            recorded(images, model),
        )
        tolerance = 1e-4 if dtype == torch.float32 else ROOT_MEAN_SQUARE[dtype] * 11
        assert stats.ratio_max == pytest.approx(1, abs=tolerance) and stats.clip_fraction == 0
        assert stats.ratio_mean == pytest.approx(1, abs=0.1 * tolerance)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        off = answer_logprobs(model, as_trajectories(answers)) - answers.logp
        bound = max(1e-5, ROOT_MEAN_SQUARE[dtype])
        assert off.pow(2).mean().sqrt() < bound and off.abs().max() < LARGEST * bound
    finally:
        model.requires_grad_(False).zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_point_the_same_way(dtype):
    truth = recorded(drawn(torch.float32, 5.0), deep(torch.float32))
    found = {}
    for kind in (torch.float32, dtype):
        model = deep(kind).requires_grad_(True)
        try:
            streamed_backward(
                model, torch.linspace(-1, 1, len(truth)), LossSettings(beta=0.0, micro_rows=6, micro_timesteps=2), truth
            )
            found[kind] = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        finally:
            model.requires_grad_(False).zero_grad()
    likeness = torch.cosine_similarity(found[dtype], found[torch.float32], dim=0)
    assert likeness > (0.97 if dtype == torch.bfloat16 else 0.998)


def test_a_product_in_e4m3_is_as_near_as_its_rounding():
    """Against float64; rows of very different size keep their own scale, and a row of zeros stays zero."""
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(7, 3, 96, generator=generator), torch.randn(33, 96, generator=generator)
    x[0], x[1, 0] = x[0] * 1e-6, 0.0
    weight[4] *= 1e4
    bias = torch.randn(33, generator=generator)
    x8, scale = fp8.quantised(x)
    assert x8.dtype == torch.float8_e4m3fn and scale.shape == (7, 3, 1)
    assert ((x8.float() * scale - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) * 2**-17).all()
    wanted = x.double() @ weight.double().T
    found = fp8.product(x, fp8.quantised(weight), bias).double() - bias
    size = x.double().norm(dim=-1)[..., None] * weight.double().norm(dim=-1)
    assert ((found - wanted).abs() <= 0.03 * size + 1e-6 * bias.abs()).all()
    assert (found - wanted).abs().max() > 0, "eight bits are not enough to be exact"
    assert torch.equal(found[1, 0] + bias, bias.double())


def drawn_in_fp8(dtype: torch.dtype, scale: float) -> ImageRollout:
    engine = RolloutEngine(deep(dtype), products="fp8")
    return engine.generate_images([[5, 6], [7, 8, 9]], samples=8, steps=4, guidance_scale=scale, seed=1, decode=False)


@pytest.mark.slow
@pytest.mark.parametrize("scale", list(FP8))
def test_drift_of_log_probs_in_fp8_and_the_ratio_that_corrects_it(scale):
    """A rollout in fp8 records the log-probs of the policy that drew. The update scores its tokens in the model's own
    precision and takes the recorded ones as old: its ratio is the importance weight between the two policies."""
    model = deep(torch.bfloat16)
    rollout = drawn_in_fp8(torch.bfloat16, scale)
    images = recorded(rollout, model)
    assert torch.equal(images.old_logp_RTN, rollout.logp)
    off = image_logprobs(model, images) - rollout.logp
    spread = off.pow(2).mean().sqrt()
    assert ROOT_MEAN_SQUARE[torch.bfloat16] < spread < FP8[scale], "another policy, and near the model's"
    assert abs(off.mean()) < 0.3 * FP8[scale] and off.abs().max() < LARGEST * FP8[scale]
    ratio = off.exp()
    assert ratio.mean() == pytest.approx(1, abs=0.1), "the mean of an importance weight under who drew is 1"
    model.requires_grad_(True)
    try:
        settings = LossSettings(beta=0.0, micro_rows=4, micro_timesteps=2)
        stats = streamed_backward(model, torch.linspace(-1, 1, len(images)), settings, images)
        assert stats.ratio_mean == pytest.approx(float(ratio.mean()), abs=0.005)
        assert stats.ratio_max == pytest.approx(float(ratio.max()), rel=0.3) and stats.ratio_max > 1.1
    finally:
        model.requires_grad_(False).zero_grad()


def test_fp8_follows_the_weights_and_leaves_the_model_as_it_was():
    model = tiny_model()
    codes = torch.arange(model.config.num_vq_tokens)[None] % model.config.codebook_size
    engine = RolloutEngine(model, products="fp8")

    def logp(of: RolloutEngine) -> torch.Tensor:
        options = {"steps": 2, "seed": 3, "guidance_scale": 0.0, "decode": False}
        images = of.generate_images([[5, 6]], samples=2, **options).logp
        return torch.cat([images.flatten(), of.generate_text(codes, [[4, 8]], max_new_tokens=3).logp.flatten()])

    plain, first = logp(RolloutEngine(model)), logp(engine)
    assert not torch.equal(plain, first) and torch.equal(plain, logp(RolloutEngine(model)))
    layer = model.showo.model.layers[0].self_attn.q_proj
    assert "forward" not in layer.__dict__
    layer.weight.mul_(-2.0)
    again = logp(engine)
    assert not torch.equal(first, again) and torch.equal(again, logp(RolloutEngine(model, products="fp8")))


def test_fp8_says_what_it_cannot_do():
    with pytest.raises(UserError, match="products='int4': must be same or fp8"):
        RolloutEngine(tiny_model(), products="int4")
    with pytest.raises(UserError, match="shard=full: fp8 products need whole weights"):
        grpo_config(rollout_products="fp8", shard="full")
    model = tiny_model()
    model.showo.model.layers[1].mlp.fc2.weight.data = torch.zeros(4, 4, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.fc2: fp8 products need its whole weight.*uint8"):
        RolloutEngine(model, products="fp8").generate_images([[5]], steps=1, decode=False)
    assert "forward" not in model.showo.model.layers[0].mlp.fc1.__dict__, "nothing stays behind"
