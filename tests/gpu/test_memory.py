"""Memory that really runs out on a GPU: pieces of the update are halved, measured, recomputed, with exact gradients.

On the CPU the same bodies run without a limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pyunictokens.models import Showo
from pyunictokens.models.showo import prompting
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import LossSettings, MicrobatchSizes, image_logprobs, streamed_backward
from tests.train.world import tiny_model

SIZES = {"cpu": (3, 2, 32), "cuda": (32, 16, 512)}
"""Rollouts, timesteps, width: on a GPU the largest piece holds about 1.7 GB."""


def learner(device: str) -> tuple[Showo, ImageTrajectories, Tensor]:
    rows, steps, width = SIZES[device]
    model = tiny_model(layers=4, width=width).to(device).requires_grad_(True)
    generator = torch.Generator().manual_seed(3)
    ids, config = prompting.SpecialIds.of(model), model.config
    chosen = torch.randint(0, config.codebook_size, (rows, steps, config.num_vq_tokens), generator=generator)
    unknown = torch.rand(chosen.shape, generator=generator) < 0.5
    images = ImageTrajectories(
        prompts=[prompting.t2i_text([5, 9, 7], ids, 12)],
        prompt_of_row=[0] * rows,
        inputs_RTN=torch.where(unknown, -1, chosen),
        chosen_RTN=chosen,
        old_logp_RTN=torch.empty(0),
        empty_prompt=prompting.t2i_text([], ids, 12),
        guidance_scale=1.0,
    )
    images.old_logp_RTN = image_logprobs(model, images)
    return model, images, torch.linspace(-1, 1, rows, device=device)


def gradients(model: Showo) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-6, name


def update(model: Showo, images: ImageTrajectories, advantages: Tensor, rows: int, steps: int) -> MicrobatchSizes:
    sizes = MicrobatchSizes()
    settings = LossSettings(beta=0.0, micro_rows=rows, micro_timesteps=steps)
    streamed_backward(model, advantages, settings, images, sizes=sizes)
    return sizes


@contextmanager
def at_most(device: str, taken: int) -> Iterator[None]:
    """Inside, this process gets no more than `taken` bytes of the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(taken / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak(device: str) -> int:
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


def test_pieces_that_do_not_fit_are_halved_with_exact_gradients(device: str) -> None:
    model, images, advantages = learner(device)
    rows, steps, _ = SIZES[device]
    peak(device)
    update(model, images, advantages, 1, 1)
    wanted, least = gradients(model), peak(device)
    update(model, images, advantages, rows, steps)
    equal(gradients(model), wanted)
    most = peak(device)
    assert device == "cpu" or most > 3 * least
    with at_most(device, (2 * least + most) // 3):
        sizes = update(model, images, advantages, rows, steps)
    assert sizes.images is not None and (sizes.images.splits > 0) == (device == "cuda")
    equal(gradients(model), wanted)


def test_automatic_sizes_are_measured_and_fit(device: str) -> None:
    model, images, advantages = learner(device)
    update(model, images, advantages, 1, 1)
    wanted = gradients(model)
    peak(device)
    with at_most(device, 1 << 30):
        sizes = update(model, images, advantages, 0, 0)
    assert sizes.images is not None and sizes.images.tried and sizes.images.planned_bytes > 0
    assert (sizes.images.measured_bytes > 0) == (device == "cuda")
    if device == "cuda":
        assert sizes.images.measured_bytes == pytest.approx(sizes.images.planned_bytes, rel=1.0)
        assert peak(device) <= 1 << 30
    equal(gradients(model), wanted)


def test_recomputed_layers_give_the_same_gradients(device: str) -> None:
    model, images, advantages = learner(device)
    update(model, images, advantages, 2, 2)
    wanted = gradients(model)
    for layers in (1, 3, True):
        model.checkpoint_layers = layers
        update(model, images, advantages, 2, 2)
        equal(gradients(model), wanted)
