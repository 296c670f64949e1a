"""Stable Diffusion as textual inversion and DreamBooth train it: the parts of a pipeline of diffusers, and its loss.

    noisy = scheduler.add_noise(latents, noise, t)      t uniform over the training timesteps
    loss  = mean (unet(noisy, t, text) − target)²       target: the noise, or v where the pipeline predicts that

The library's own classes do all of it; here is what is put into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import load_batch
from ..models.checkpoint import read_config, resolve
from ..utils.errors import UserError, require
from ..utils.files import unreadable
from .planning import bytes_of, lacking, numbers_of, operations

FILES = ("*.json", "*.safetensors", "*.bin", "*.txt")


class Parts:
    """The parts of a pipeline, frozen, with a training scheduler of its settings."""

    def __init__(self, place: str, device: torch.device, dtype: torch.dtype):
        diffusers = require("diffusers", "diffusers")
        try:
            pipe = diffusers.StableDiffusionPipeline.from_pretrained(place, safety_checker=None)
        except Exception as error:  # diffusers and torch raise many kinds for files that they cannot read
            why = unreadable(place, error)
            raise UserError(f"{place}: cannot be loaded as a Stable Diffusion pipeline: {why}") from error
        self.pipe: Any = pipe.to(device, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.device, self.dtype = device, dtype
        self.unet, self.vae, self.text, self.tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
        for part in (self.unet, self.vae, self.text):
            part.requires_grad_(False)
        self.scheduler: Any = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)

    @property
    def size(self) -> int:
        """Pixels along one side that the pipeline draws."""
        return int(self.unet.config.sample_size * self.pipe.vae_scale_factor)

    @torch.no_grad()
    def latents(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """[B, 4, h, w] drawn from what the encoder makes of pixels [B, 3, H, W] in [-1, 1]."""
        found = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        noise = torch.randn(found.mean.shape, generator=generator, dtype=torch.float64).to(found.mean)
        return (found.mean + found.std * noise) * float(self.vae.config.scaling_factor)

    def states(self, prompts: Sequence[str]) -> Tensor:
        """What the text encoder makes of prompts, [B, L, D]; differentiable."""
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        states: Tensor = self.text(ids.to(self.device))[0]
        return states

    def loss(self, latents: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the denoiser on latents under text states; noise and timesteps from the generator."""
        noise = torch.randn(latents.shape, generator=generator, dtype=torch.float64).to(latents)
        steps = int(self.scheduler.config.num_train_timesteps)
        at = torch.randint(0, steps, (len(latents),), generator=generator).to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, at)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            target = noise
        elif kind == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, at)
        else:
            raise UserError(f"this pipeline predicts {kind!r}: must be epsilon or v_prediction")
        made = self.unet(noisy, at, states, return_dict=False)[0]
        return F.mse_loss(made, target)


def photos(paths: Sequence[Path], size: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Pixels [B, 3, size, size] of photos, cut to the middle, mirrored at random with `flip`."""
    pixels = load_batch(paths, size)
    if flip:
        mirrored = torch.rand(len(paths), generator=generator) < 0.5
        pixels[mirrored] = pixels[mirrored].flip(-1)
    return pixels


def costs_of(model: str, batch: int, dtype: torch.dtype, learned: int, backward: float) -> tuple[float, int]:
    """(operations of a step, bytes) of a pipeline on this machine, from its config files alone; (0, 0) where it is not
    here. `backward`: what the gradient takes, in forward passes. learned: numbers that learn, −1 for the denoiser's."""
    if lacking([model]):
        return 0.0, 0
    diffusers, folder = require("diffusers", "diffusers"), resolve(model, offline=True, only=FILES)
    place = folder / "unet"

    def unet() -> torch.nn.Module:
        return diffusers.UNet2DConditionModel.from_config(dict(read_config(place)))

    with torch.device("meta"):
        net, config = unet(), read_config(place)
        side = int(config["sample_size"])
        sample = torch.empty(batch, int(config["in_channels"]), side, side)
        states = torch.empty(batch, 77, int(config["cross_attention_dim"]))
        one = operations(lambda: net(sample, torch.zeros(batch, dtype=torch.int64), states))
    held = numbers_of(unet)
    return one * (1 + backward), bytes_of(held, held if learned < 0 else learned, dtype)
