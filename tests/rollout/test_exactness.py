"""A thousand images: the engine with every lever on against the published full-sequence loop.

Guidance, inpainting, odd grids, prompts of many lengths, and few slots, so that refills and previews put rows of
different timesteps into one batch. In fp64 every code of every step is equal. In fp32 the log-probs of the engine's
trajectories are those of the plain loop, and where a trajectory of the plain loop leaves the engine's, the two choices
were nearly tied.
"""

import random
import warnings
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import showo_plain
from pyunictokens import MASK, DsogThreshold
from pyunictokens.models.showo.attention import PromptAttention
from pyunictokens.rollout import Dsog

from .tiny import CONFIG, MAX_TEXT, philox_noise, tiny_engine, tiny_model

IMAGES, BATCHES = 1000, 20
TIE = 1e-4
GRIDS = [(3, 3), (1, 7), (5, 3), (2, 2), (4, 5)]


@dataclass
class Batch:
    """One call's arguments, drawn from a seed."""

    prompts: list[list[int]]
    samples: int
    known: Tensor
    grid: tuple[int, int]
    steps: int
    guidance_scale: float
    temperature: float
    seed: int
    max_rows: int
    previews: bool

    @classmethod
    def drawn(cls, number: int) -> "Batch":
        dice = random.Random(number)
        grid, samples = GRIDS[number % len(GRIDS)], 5
        prompts = [
            [dice.randrange(50) for _ in range(dice.randint(0, 10))] for _ in range(IMAGES // BATCHES // samples)
        ]
        generator = torch.Generator().manual_seed(number)
        codes = torch.randint(0, CONFIG.codebook_size, (len(prompts), grid[0] * grid[1]), generator=generator)
        holes = torch.rand(codes.shape, generator=generator) < torch.tensor([1.0, 0.6])[number % 2]
        return cls(
            prompts,
            samples,
            torch.where(holes, MASK, codes),
            grid,
            dice.randint(2, 8),
            [0.0, 1.5, 5.0][number % 3],
            dice.choice([0.5, 1.0, 2.0]),
            dice.randrange(2**63),
            dice.randint(5, 30),
            number % 4 != 3,
        )

    def options(self) -> dict:
        return dict(steps=self.steps, guidance_scale=self.guidance_scale, temperature=self.temperature)

    def rollout(self, model):
        dice = random.Random(self.seed)

        def scorer(pixels, index):
            return torch.tensor([dice.random() for _ in pixels])

        engine = tiny_engine(model, max_rows=self.max_rows)
        dsog = Dsog(DsogThreshold(), scorer, preview_step=max(1, self.steps // 3)) if self.previews else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return engine.generate_images(
                self.prompts,
                samples=self.samples,
                known_codes=self.known,
                grid=self.grid,
                seed=self.seed,
                dsog=dsog,
                decode=False,
                **self.options(),
            )

    def plain(self, model, rollout):
        """(final codes, inputs, chosen, log-probs) of the published loop with the noise of the rollout's samples."""
        known = self.known.repeat_interleave(self.samples, 0)
        texts = [self.prompts[index] for index in rollout.prompt_index]
        noise = philox_noise(self.seed, rollout.sample_ids.tolist(), known.shape[1], CONFIG.codebook_size)
        return showo_plain.generate_images(model, texts, known, max_text=MAX_TEXT, noise=noise, **self.options())

    def logits(self, model, rollout, inputs: Tensor) -> Tensor:
        """Guided logits [M, N, K] of codes [M, N] that stood in rows `rollout.prompt_index` = M of them."""
        texts = [self.prompts[index] for index in rollout.prompt_index]
        return showo_plain.guided_logits(model, texts, inputs, MAX_TEXT, self.guidance_scale)


def rounds():
    return [Batch.drawn(number) for number in range(BATCHES)]


def calm_model(dtype):
    """Guided logits within about ±10, as a trained model's: at 40, fp32's own rounding in the plain loop is 3e-5."""
    model = tiny_model(dtype=dtype)
    model.showo.lm_head.weight.mul_(0.2)
    return model


def test_fp64_equals_the_plain_loop_code_for_code(monkeypatch):
    model, images, mixed = tiny_model(), 0, 0
    for number, batch in enumerate(rounds()):
        # Every other batch by the attention that a GPU takes: prompts apart, joined by log-sum-exp.
        attention = partial(PromptAttention, joined=bool(number % 2))
        monkeypatch.setattr("pyunictokens.models.showo.prefill.PromptAttention", attention)
        ours = batch.rollout(model)
        final, inputs, chosen, logp = batch.plain(model, ours)
        assert torch.equal(ours.codes, final)
        assert torch.equal(ours.inputs.long(), inputs)
        assert torch.equal(ours.chosen.long(), chosen)
        assert (ours.logp - logp).abs().max() < 1e-5  # recorded in float32
        images += len(ours)
        mixed += ours.dsog is not None and ours.dsog.rejected > 0
    assert images == IMAGES and mixed > BATCHES // 2


@pytest.mark.slow
def test_fp32_log_probs_of_replayed_trajectories_and_only_near_ties_differ():
    model, exact, left = calm_model(torch.float32), calm_model(torch.float64), 0
    for batch in rounds():
        ours = batch.rollout(model)
        for step in range(batch.steps):
            logits = batch.logits(model, ours, ours.inputs[:, step].long())
            replayed = logits.log_softmax(-1).gather(-1, ours.chosen[:, step].long()[..., None])[..., 0]
            assert (replayed - ours.logp[:, step]).abs().max() <= 1e-5
        _, inputs, chosen, _ = batch.plain(model, ours)
        left += gaps(batch, exact, ours, inputs, chosen)
    assert left <= IMAGES // 50


def gaps(batch, exact, ours, inputs, chosen) -> int:
    """How many rows left the plain loop's trajectory; each must have done so at scores closer than TIE."""
    left = 0
    temperature = batch.temperature
    together = torch.ones(len(ours), dtype=torch.bool)
    noise = philox_noise(batch.seed, ours.sample_ids.tolist(), inputs.shape[2], CONFIG.codebook_size)
    for step in range(batch.steps):
        temperature *= 1 - (step + 1) / batch.steps
        last = step + 1 == batch.steps
        other = (chosen[:, step] != ours.chosen[:, step]).any(-1)
        if not last:
            other |= (inputs[:, step + 1] != ours.inputs[:, step + 1]).any(-1)
        rows = (other & together).nonzero()[:, 0].tolist()
        if rows:
            token, rank = noise(step)
            logp = batch.logits(exact, ours, inputs[:, step]).log_softmax(-1)
            scores = logp + token
        for row in rows:
            places = (chosen[row, step] != ours.chosen[row, step]).nonzero()[:, 0]
            for place in places.tolist():
                one, two = (scores[row, place, int(codes[row, step, place])] for codes in (chosen, ours.chosen))
                assert (one - two).abs() < TIE, f"row {row}, step {step}, place {place}: no tie"
            if not len(places):
                confidence = logp[row].gather(-1, chosen[row, step][:, None])[:, 0] + temperature * rank[row]
                swapped = inputs[row, step + 1] != ours.inputs[row, step + 1]
                assert confidence[swapped].max() - confidence[swapped].min() < TIE, f"row {row}, step {step}: no tie"
        left += len(rows)
        together &= ~other
    return left


def test_the_judge_of_ties_sees_a_choice_that_was_none():
    batch, exact = Batch.drawn(1), tiny_model()
    ours = batch.rollout(exact)
    _, inputs, chosen, _ = batch.plain(exact, ours)
    assert gaps(batch, exact, ours, inputs, chosen) == 0
    unknown = (inputs[3, 0] == MASK).nonzero()[0, 0]
    ours.chosen[3, 0, unknown] = (ours.chosen[3, 0, unknown] + 1) % CONFIG.codebook_size
    with pytest.raises(AssertionError, match="row 3, step 0"):
        gaps(batch, exact, ours, inputs, chosen)
    ours.chosen[3, 0, unknown] = chosen[3, 0, unknown]
    masked, open_ = (((ours.inputs[3, 1] == MASK) == flag).nonzero()[0, 0] for flag in (True, False))
    ours.inputs[3, 1, masked], ours.inputs[3, 1, open_] = ours.inputs[3, 1, open_].clone(), MASK
    with pytest.raises(AssertionError, match="row 3, step 0: no tie"):
        gaps(batch, exact, ours, inputs, chosen)
