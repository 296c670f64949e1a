"""Two hundred steps of training on the toy: every backend's losses are the reference's within 1e-3.

On a GPU the shipped toy, all weights learning; on the CPU a tiny random model of its kind.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from pyunictokens.models import Showo
from pyunictokens.models.showo import prompting
from pyunictokens.ops import registry as _dispatch
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import LossSettings, image_logprobs, streamed_backward

from . import support

STEPS = 200
RATE = 2e-5


def _model(device: str) -> Showo:
    if device == "cuda":
        from pyunictokens.toy.model import load_toy

        return load_toy(device=device).model
    from tests.tiny import tiny_toy

    return tiny_toy().model


def _trajectories(model: Showo, device: str) -> ImageTrajectories:
    generator = torch.Generator().manual_seed(3)
    rows, steps, positions = (4, 4, model.config.num_vq_tokens) if device == "cuda" else (2, 2, 16)
    ids, entries = prompting.SpecialIds.of(model), model.config.codebook_size
    chosen = torch.randint(0, entries, (rows, steps, positions), generator=generator)
    share = torch.linspace(1, 0.3, steps)[None, :, None]
    unknown = torch.rand(rows, 1, positions, generator=generator) < share
    images = ImageTrajectories(
        prompts=[prompting.t2i_text(list(range(5, 11)), ids, 24)],
        prompt_of_row=[0] * rows,
        inputs_RTN=torch.where(unknown, -1, chosen),
        chosen_RTN=chosen,
        old_logp_RTN=torch.empty(0),
        empty_prompt=prompting.t2i_text([], ids, 24),
        guidance_scale=2.0,
        mask_RTN=unknown,
    )
    images.old_logp_RTN = images.ref_logp_RTN = image_logprobs(model, images)
    return images


@functools.lru_cache(maxsize=4)
def _losses(device: str, backend: str) -> tuple[float, ...]:
    before = _dispatch.BACKENDS
    _dispatch.BACKENDS = {"reference": (), backend: ("cpu", "cuda")}
    try:
        model = _model(device).requires_grad_(True)
        images = _trajectories(model, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        advantages = torch.linspace(-1, 1, len(images), device=device)
        settings = LossSettings(micro_rows=2, micro_timesteps=2, beta=0.05)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            losses.append(streamed_backward(model, advantages, settings, images).loss)
            optimizer.step()
        return tuple(losses)
    finally:
        _dispatch.BACKENDS = before


def test_losses_of_training_are_those_of_the_reference(device: str, backend: str) -> None:
    support.need("maskgit_grpo_loss", backend, device)
    if backend == "reference":
        pytest.skip("the others are held against it")
    if backend == "triton" and device == "cpu":
        pytest.skip("two hundred steps take the interpreter too long")
    wanted: Any = torch.tensor(_losses(device, "reference"))
    found = torch.tensor(_losses(device, backend))
    assert wanted.abs().max() > 1e-2 and not torch.equal(wanted[0], wanted[-1]), "the losses must move"
    assert (found - wanted).abs().max() <= 1e-3
