"""DreamBooth (Ruiz et al., 2023) on Stable Diffusion: the denoiser learns "a photo of sks CLASS" from the photos.

    DIR/prior/           images of the class, drawn by the pipeline before it learned (prior preservation)
    DIR/pipeline/        the whole pipeline (trainable=full), or
    DIR/lora/            adapters, as diffusers' `load_lora_weights` reads them (trainable=lora)

With `photos=10` the first ten photos are learned from, with `pictures=DIR` many more pictures beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..config.limits import at_least
from ..data.images import save_image
from ..utils.errors import needs, require
from .base import Job, Method, PhotoSettings, Plan, Trained
from .loop import batch_of, finished, learn_photos, photos_to_learn
from .planning import lacking
from .stable_diffusion import Parts, costs_of, photos

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class StableDreamBoothSettings(PhotoSettings):
    """How the denoiser learns."""

    trainable: Literal["full", "lora"] = "full"
    """All weights of the denoiser, or adapters on its attention."""
    lora_rank: int = 4
    """Width of the adapters."""
    photos: int = 0
    """Photos of the concept that are learned from, the first ones; 0 takes all."""
    pictures: str = ""
    """A folder of further pictures of the concept, learned beside its photos."""
    steps: int = 800
    """Optimizer steps."""
    batch: int = 1
    """Photos a step, and as many images of the class."""
    lr: float = 0.0
    """AdamW's learning rate; 0 takes 5e-6 for all weights, 1e-4 for adapters."""
    prior_images: int = 100
    """Images of the class that the pipeline draws first; 0 turns prior preservation off."""
    prior_weight: float = 1.0
    """Weight of their loss."""
    prior_steps: int = 50
    """Denoising steps of those images."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this length; null leaves them."""
    size: int = 0
    """Pixels along one side of the photos; 0 takes the pipeline's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, batch=self.batch, lora_rank=self.lora_rank, prior_steps=self.prior_steps)
        at_least(0, photos=self.photos, prior_images=self.prior_images, prior_weight=self.prior_weight)
        at_least(0, size=self.size)

    @property
    def rate(self) -> float:
        """The learning rate that is meant."""
        return self.lr or (5e-6 if self.trainable == "full" else 1e-4)


class DreamBooth(Method[StableDreamBoothSettings]):
    """The denoiser of Stable Diffusion."""

    name, title, answers = "dreambooth", "DreamBooth (SD)", False
    about = "Stable Diffusion's denoiser or adapters on it, from the photos and its own images of the class; it draws"
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    settings = StableDreamBoothSettings

    def row(self, settings: StableDreamBoothSettings) -> str:
        many = f"{settings.photos or 'all'} photos" if settings.photos or settings.pictures else ""
        many += " and more" if settings.pictures else ""
        said = ", ".join(["SD", *filter(None, ("LoRA" if settings.trainable == "lora" else "", many))])
        return f"DreamBooth ({said})"

    def plan(self, job: Job[StableDreamBoothSettings]) -> Plan:
        settings, model = job.settings, job.sources.model or self.model
        images = settings.batch * (2 if settings.prior_images else 1)
        one, memory = costs_of(model, images, job.dtype, -1 if settings.trainable == "full" else 0, 2.0)
        drawn = one / 3 / images * 2 * settings.prior_steps * settings.prior_images
        return Plan(settings.steps, one * settings.steps + drawn, memory, lacking([model]))

    def train(self, job: Job[StableDreamBoothSettings]) -> Mapping[str, object]:
        """Draw images of the class, then learn photos and class images together."""
        settings, data, model = job.settings, job.concept, job.sources.model or self.model
        paths = photos_to_learn(data, settings.photos, settings.pictures)
        parts = Parts(model, job.device, job.dtype)
        prior = self._prior(job, parts) if settings.prior_images else []
        size = settings.size or parts.size
        with torch.no_grad():
            mine, other = parts.states([f"a photo of sks {data.class_word}", f"a photo of {data.class_word}"]).split(1)
        if settings.trainable == "lora":
            with needs("train"):
                from peft import LoraConfig

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                parts.unet.add_adapter(
                    LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=list(TARGETS))
                )
        else:
            parts.unet.requires_grad_(True)
        named = {name: value for name, value in parts.unet.named_parameters() if value.requires_grad}

        def losses(step: int, generator: torch.Generator) -> Iterable[Tensor]:
            for files, states, weight, seed in ((paths, mine, 1.0, 0), (prior, other, settings.prior_weight, 1)):
                if files:
                    places = batch_of(len(files), settings.batch, settings.seed + seed, step)
                    pixels = photos([files[place] for place in places], size, False, generator)
                    latents = parts.latents(pixels, generator)
                    yield weight * parts.loss(latents, states.expand(len(places), -1, -1), generator)

        facts = learn_photos(job, "denoiser", named, losses, len(paths))
        self._save(job.folder, parts, settings)
        finished(job)
        return facts

    def _prior(self, job: Job[StableDreamBoothSettings], parts: Parts) -> list[Path]:
        """Files of images of the class; those that are there are not drawn again."""
        settings, folder = job.settings, job.folder / "prior"
        files = [folder / f"{number:04d}.png" for number in range(settings.prior_images)]
        for number, file in enumerate(files):
            if not file.is_file():
                generator = torch.Generator("cpu").manual_seed(settings.seed * 100_000 + number)
                made = parts.pipe(
                    f"a photo of {job.concept.class_word}",
                    num_inference_steps=settings.prior_steps,
                    generator=generator,
                ).images[0]
                folder.mkdir(exist_ok=True)
                save_image(made, file)
            job.progress("images of the class", number + 1, len(files))
        return files

    def _save(self, folder: Path, parts: Parts, settings: StableDreamBoothSettings) -> None:
        """The whole pipeline, or its adapters, as the library writes them."""
        if settings.trainable == "full":
            parts.unet.requires_grad_(False)
            parts.pipe.save_pretrained(folder / "pipeline")
            return
        with needs("train"):
            from peft.utils import get_peft_model_state_dict

        convert = require("diffusers.utils", "diffusers").convert_state_dict_to_diffusers
        layers = convert(get_peft_model_state_dict(parts.unet))
        type(parts.pipe).save_lora_weights(folder / "lora", unet_lora_layers=layers)

    def words(self, folder: Path, trained: Trained) -> str:
        if trained.settings["trainable"] == "full":
            return f"diffusers:{folder / 'pipeline'}"
        return f"diffusers:{trained.model or self.model},lora={folder / 'lora'}"
