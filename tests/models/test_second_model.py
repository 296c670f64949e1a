"""A model that is no Show-o (second_model.py) goes through engine, previews, log-probs, update and evaluation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyunictokens import MASK, ConceptTokens, DsogThreshold, RolloutEngine, ops
from pyunictokens.data import load_concept
from pyunictokens.evaluate import unifybench
from pyunictokens.rollout import Dsog
from pyunictokens.rollout.types import ImageRollout
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.train.trajectories import ImageTrajectories, choose_timesteps
from pyunictokens.train.update import LossSettings, image_logprobs, streamed_backward
from pyunictokens.utils.errors import UserError

from ..rollout.tiny import philox_noise
from ..train.naive import objective
from .second_model import CODES, GRID, START, WORDS, Pixels, SecondModel, Words

PROMPTS = [[3, 7, 1], [], [5], [2, 9, 4, 11, 6, 8, 1, 20, 21]]
"""The last has more ids than the model reads."""


def guided(model: SecondModel, prompt: list[int], codes_N: Tensor, done: float, scale: float) -> Tensor:
    """Logits [N, K] of one image, by u + g·(c − u)."""
    logits = []
    for ids in ([START, *prompt[: model.max_text]], [START]):
        prefix, at = model.prefill([ids]), torch.tensor([done])
        logits.append(F.linear(model.image_hidden(codes_N[None].long(), prefix, [0], at)[0], model.head.weight))
    cond, uncond = logits
    return uncond + scale * (cond - uncond)


def plain_loop(
    model: SecondModel, prompt: list[int], known_N: Tensor, steps: int, scale: float, heat: float, noise
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(final codes [N], inputs, chosen, log-probs [T, N]) of one image, without the engine."""
    codes, count, records = known_N.clone(), len(known_N), []
    for step in range(steps):
        logp = guided(model, prompt, codes, step / steps, scale).log_softmax(-1)
        token, rank = noise(step)
        unknown = codes == MASK
        chosen = torch.where(unknown, (logp + token[0]).argmax(-1), codes)
        picked = logp.gather(-1, chosen[:, None])[:, 0]
        records.append((codes.clone(), chosen, picked))
        left = 1 - (step + 1) / steps
        again = max(1, min(int(unknown.sum()) - 1, int(count * left)))
        sure = torch.where(unknown, picked + heat * left * rank[0], torch.inf)
        codes = chosen.clone()
        codes[sure.argsort()[:again]] = MASK
    inputs, chosen, picked = (torch.stack(part) for part in zip(*records, strict=True))
    return chosen[-1], inputs, chosen, picked


def engine(model: SecondModel | None = None, **options) -> RolloutEngine:
    return RolloutEngine(model or SecondModel.random(), Pixels(), **options)


def drawn(model: SecondModel, **options) -> ImageRollout:
    with pytest.warns(UserWarning, match=r"prompts\[3\] has 9 ids: only the first 7 are read"):
        return engine(model).generate_images(PROMPTS, samples=2, steps=7, seed=5, **options)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("rows", [2, 64])
def test_draws_what_a_plain_loop_draws(scale: float, rows: int) -> None:
    model, grid = SecondModel.random(), (2, 5)
    known = torch.full((4, 10), MASK)
    known[1, :4] = torch.tensor([0, 12, 3, 3])
    with pytest.warns(UserWarning, match="only the first 7"):
        rollout = engine(model, max_rows=rows).generate_images(
            PROMPTS, samples=2, steps=7, seed=11, guidance_scale=scale, temperature=1.7, known_codes=known, grid=grid
        )
    assert rollout.inputs is not None and rollout.chosen is not None and rollout.logp is not None
    for row, prompt in enumerate(rollout.prompt_index.tolist()):
        noise = philox_noise(11, [row], 10, CODES)
        codes, inputs, chosen, logp = plain_loop(model, PROMPTS[prompt], known[prompt], 7, scale, 1.7, noise)
        assert torch.equal(rollout.codes[row], codes)
        assert torch.equal(rollout.inputs[row].long(), inputs) and torch.equal(rollout.chosen[row].long(), chosen)
        assert (rollout.logp[row] - logp).abs().max() < 1e-5  # recorded in float32


def test_prompt_time_and_neighbours_matter() -> None:
    """Otherwise the other tests would prove little."""
    model = SecondModel.random()
    codes = torch.full((15,), MASK)
    base = guided(model, [3], codes, 0.0, 3.0)
    near = codes.clone()
    near[14] = 4
    for other in (guided(model, [4], codes, 0.0, 3.0), guided(model, [3], codes, 0.5, 3.0)):
        assert (other - base).abs().max() > 0.1
    assert (guided(model, [3], near, 0.0, 3.0) - base).abs().max() > 0.1


def test_defaults_and_limits_are_the_models_own() -> None:
    model = SecondModel.random()
    rollout = engine(model).generate_images([[3]])
    assert (rollout.steps, rollout.guidance_scale, rollout.temperature, rollout.grid) == (6, 3.0, 1.5, GRID)
    assert rollout.pixels is not None and rollout.pixels.shape == (1, 3, *GRID)
    with pytest.raises(UserError, match=r"guidance_scale=0.5: must be a finite number ≥ 1 \(1 turns guidance off\)"):
        engine(model).generate_images([[3]], guidance_scale=0.5)
    with pytest.raises(UserError, match="this model draws 5 columns"):
        engine(model).generate_images([[3]], grid=(4, 4))
    with pytest.raises(UserError, match=f"text ids of this model are 0…{WORDS - 1}"):
        engine(model).generate_images([[WORDS]])
    with pytest.raises(UserError, match="second cannot be captured; use auto or off"):
        engine(model, capture="replay")


def test_what_it_cannot_do_it_says() -> None:
    model = SecondModel.random()
    with pytest.raises(UserError, match="second draws but does not answer: it has no text head"):
        engine(model).generate_text(torch.zeros(1, 15, dtype=torch.int64), [[1]])
    with pytest.raises(UserError, match="second has no rows that a concept may own"):
        engine(model).add_concept(ConceptTokens("bo", 24))
    with pytest.raises(UserError, match="second has no rows"), model.using(ConceptTokens("bo", 24)):
        pass


def test_previews_refill_and_change_no_image() -> None:
    model = SecondModel.random()

    def bright(pixels: Tensor, index: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3)) * 0.5 + 0.5

    dsog = Dsog(DsogThreshold(initial=0.5), bright, preview_step=2, max_candidates=6)
    rollout = engine(model).generate_images([[3], [5]], samples=3, steps=7, seed=2, dsog=dsog)
    assert rollout.dsog is not None and rollout.dsog.rejected > 0 and rollout.dsog.accepted > 0
    for row, prompt in enumerate(rollout.prompt_index.tolist()):
        noise = philox_noise(2, [int(rollout.sample_ids[row])], 15, CODES)
        codes, *_ = plain_loop(model, [[3], [5]][prompt], torch.full((15,), MASK), 7, 3.0, 1.5, noise)
        assert torch.equal(rollout.codes[row], codes)


def test_log_probs_of_recorded_steps() -> None:
    model = SecondModel.random()
    rollout = drawn(model)
    images = ImageTrajectories.of(model, rollout)
    assert images.guidance_scale == 2.0 and images.old_logp_RTN.shape == (8, 7, 15)
    assert (image_logprobs(model, images, micro_rows=3, micro_timesteps=2) - images.old_logp_RTN).abs().max() < 1e-5
    row, step = 5, 4
    prefix = model.prefill([model.prompt_ids(PROMPTS[2]), model.prompt_ids([])])
    codes, at = images.inputs_RTN[row, step].long().expand(2, -1), torch.full((2,), step / 7)
    hidden, uncond = model.image_hidden(codes, prefix, [0, 1], at)
    found = ops.selected_logprob(
        hidden, *model.image_head()[:1], images.chosen_RTN[row, step].long(), hidden_uncond=uncond, guidance_scale=2.0
    )
    assert (found - images.old_logp_RTN[row, step]).abs().max() < 1e-5


@pytest.mark.parametrize(("scale", "choice"), [(3.0, "all"), (1.0, "all"), (3.0, "largest_change")])
def test_the_streamed_update_is_the_gradient_of_the_whole(scale: float, choice: str) -> None:
    model = SecondModel.random()
    rollout = drawn(model, guidance_scale=scale)
    assert rollout.inputs is not None
    images = ImageTrajectories.of(model, rollout, ops.token_mask(rollout.inputs, "masked"))
    images.old_logp_RTN = images.old_logp_RTN.double() + 0.2 * torch.randn(8, 7, 15, dtype=torch.float64)
    images.ref_logp_RTN = images.old_logp_RTN + 0.2 * torch.randn(8, 7, 15, dtype=torch.float64)
    images = choose_timesteps(images, choice, 0.5, seed=0, embedding_KD=model.head.weight)
    assert images.timestep_RT is not None and images.mask_RTN is not None
    model.requires_grad_(True)
    advantages = torch.tensor([0.7, -0.4, 0.1, -0.9, 0.5, 0.3, -0.2, -0.1], dtype=torch.float64)
    settings = LossSettings(beta=0.05, micro_rows=3, micro_timesteps=2)
    rows = []
    for row, prompt in enumerate(images.prompt_of_row):
        steps = []
        for step in range(images.inputs_RTN.shape[1]):
            text, done = images.prompts[prompt][1:], float(images.timestep_RT[row, step])
            logp = guided(model, text, images.inputs_RTN[row, step], done, scale).log_softmax(-1)
            steps.append(logp.gather(-1, images.chosen_RTN[row, step].long()[:, None])[:, 0])
        rows.append(torch.stack(steps))
    alpha = settings.alpha_image * images.weight
    logp, ref = torch.stack(rows), images.ref_logp_RTN
    wanted = objective(logp, images.old_logp_RTN, ref, advantages, alpha, settings, images.mask_RTN)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(wanted, list(named.values()), allow_unused=True)
    stats = streamed_backward(model, advantages, settings, images)
    assert stats.loss == pytest.approx(float(wanted.detach()), rel=1e-6) and stats.microbatches > 5
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        assert gradient is not None and gradient.abs().max() > 0, name
        assert parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_pieces_find_their_size_by_the_models_costs() -> None:
    model = SecondModel.random().requires_grad_(True)
    images = ImageTrajectories.of(model, drawn(model))
    stats = streamed_backward(model, torch.ones(8), LossSettings(beta=0.0, micro_rows=0, micro_timesteps=0), images)
    assert stats.microbatches >= 1 and stats.packed_rows >= 1 and model.costs.activation_bytes(4, 15, True, "full") > 0


class Grey:
    """An encoder whose embedding of an image is its mean colours, and of a text its length."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(torch.cat([pixels.mean((2, 3)), torch.ones(len(pixels), 1)], 1), dim=-1)

    def encode_text(self, texts) -> Tensor:
        return F.normalize(torch.tensor([[len(text) % 7, 1.0, 2.0, 3.0] for text in texts]), dim=-1)


def test_evaluation_draws_and_scores(tmp_path) -> None:
    concept = load_concept(write_toy_concept(tmp_path, seed=3, kind="animal", name="bo"), "bo")
    drawer = RolloutEngine(SecondModel.random(dtype=torch.float32), Pixels(), Words())  # type: ignore[arg-type]
    settings = {"splits": ["pure"], "samples": 2, "steps": 4, "guidance_scale": 2.0, "image_text": Grey()}
    result = unifybench(drawer, concept, None, **settings)
    records = result.records["pure"]
    assert records and all(len(record["scores"]["clip_t"]) == 2 for record in records)
    assert unifybench(drawer, concept, None, **settings).records == result.records
    assert unifybench(drawer, concept, None, **{**settings, "seed": 1}).records != result.records
    with pytest.raises(UserError, match="does not answer"):
        unifybench(drawer, concept, None, splits=["vqa"])


def test_saved_and_loaded(tmp_path) -> None:
    model = SecondModel.random(3)
    model.save_pretrained(tmp_path)
    again = SecondModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.identity() == model.identity() and again.max_text == 7
    one, two = (engine(each).generate_images([[3, 4]], seed=1) for each in (model, again))
    assert torch.equal(one.codes, two.codes)
