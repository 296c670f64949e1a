"""DreamBooth (Ruiz et al., 2023) on a masked model: its weights learn the photos under "a photo of <name> CLASS".

`<name>` is a rare identifier: a random row that does not learn. Beside the photos stand images that the model itself
drew of the class before anything was learned (prior preservation), under the class word alone. All weights learn, or
LoRA adapters (trainable=lora). It draws; of questions it learns nothing, and none are asked of it.

    DIR/prior.safetensors    codes of the class images
    DIR/final/               weights or adapter, as reinforcement leaves them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..config.limits import at_least, within
from ..config.training import LoraConfig
from ..evaluate.baselines.ours import EngineModel
from ..evaluate.core import Model, Question, Unsupported
from ..evaluate.tasks import Subject
from ..models import ConceptTokens, owning_rows
from ..models.bundle import ModelBundle
from ..models.checkpoint import load_tensors
from ..rollout.engine import RolloutEngine
from ..train.policy import Policy, load_policy
from ..utils.files import save_safetensors_atomic
from .base import Job, Method, PhotoSettings, Plan, Reading
from .loop import batch_of, finished, learn_photos, photos_to_learn
from .masked import drawing_loss, never_said, photos_of, plan_of

if TYPE_CHECKING:
    from PIL.Image import Image

PRIOR = "prior.safetensors"


@dataclass(frozen=True)
class DreamBoothSettings(PhotoSettings):
    """How the weights learn."""

    trainable: Literal["full", "lora"] = "full"
    """All weights, or adapters on the linear layers."""
    lora_rank: int = 16
    """Width of the adapters."""
    pictures: str = ""
    """A folder of further pictures of the concept, learned beside its photos."""
    steps: int = 1000
    """Optimizer steps."""
    batch: int = 1
    """Photos a step, and as many images of the class."""
    lr: float = 5e-6
    """AdamW's learning rate (adapters: about 1e-4)."""
    prior_images: int = 100
    """Images of the class that the model draws first; 0 turns prior preservation off."""
    prior_weight: float = 1.0
    """Weight of their loss."""
    prior_timesteps: int = 50
    """MaskGIT timesteps of those images."""
    prior_guidance: float = 5.0
    """Their guidance scale."""
    dropout: float = 0.1
    """Probability that a prompt is replaced by the empty one."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this length; null leaves them."""
    flip: bool = False
    """Mirror photos at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, batch=self.batch, lora_rank=self.lora_rank, prior_timesteps=self.prior_timesteps)
        at_least(0, prior_images=self.prior_images, prior_weight=self.prior_weight, prior_guidance=self.prior_guidance)
        within(0, 1, dropout=self.dropout)


class ShowoDreamBooth(Method[DreamBoothSettings]):
    """The weights of the masked model."""

    name, title, masked, answers = "showo-dreambooth", "DreamBooth (Show-o)", True, False
    about = "the masked model's weights or adapters, from the photos and its own images of the class; it draws"
    settings = DreamBoothSettings

    def defaults(self, toy: bool) -> DreamBoothSettings:
        if not toy:
            return DreamBoothSettings()
        return DreamBoothSettings(
            steps=60, batch=8, lr=1e-4, prior_images=16, prior_timesteps=12, prior_guidance=3.0, lora_rank=8
        )

    def row(self, settings: DreamBoothSettings) -> str:
        what = "LoRA" if settings.trainable == "lora" else ""
        more = "many pictures" if settings.pictures else ""
        said = ", ".join(["Show-o", *filter(None, (what, more))])
        return f"DreamBooth ({said})"

    def plan(self, job: Job[DreamBoothSettings]) -> Plan:
        settings = job.settings
        images = settings.batch * (2 if settings.prior_images else 1)
        return plan_of(job, settings.steps, images, 0, 0, full=True, drawn=settings.prior_images)

    def train(self, job: Job[DreamBoothSettings]) -> Mapping[str, object]:
        """Draw images of the class, then learn photos and class images together."""
        bundle, settings, data = job.bundle(), job.settings, job.concept
        paths = photos_to_learn(data, pictures=settings.pictures)
        prior = self._prior(job, bundle) if settings.prior_images else None
        model = owning_rows(bundle.model)
        concept = ConceptTokens(data.name, model.width, 0, 0, seed=settings.seed).to(model.device)
        never_said(concept)
        model.attach(concept)
        policy = Policy(
            bundle.model,
            settings.trainable,
            train_concept=False,
            lora=LoraConfig(settings.lora_rank, settings.lora_rank),
            reference_file=job.folder / "start.tensors" if settings.trainable == "full" else None,
            write_reference=False,
            seed=settings.seed,
        )
        tokenizer, photos = bundle.tokenizer.with_concept(concept.tokens), photos_of(bundle, 1.0, settings.flip)
        own, other = f"a photo of {named(concept.sks, data.class_word)}.", f"a photo of a {data.class_word}."

        def losses(step: int, generator: torch.Generator) -> Iterable[Tensor]:
            rows = batch_of(len(paths), settings.batch, settings.seed, step)
            codes = photos.augmented([paths[row] for row in rows], generator)
            yield drawing_loss(bundle, tokenizer, codes, [own] * len(rows), generator, settings.dropout)
            if prior is not None:
                rows = batch_of(len(prior), settings.batch, settings.seed + 1, step)
                kept = drawing_loss(bundle, tokenizer, prior[rows], [other] * len(rows), generator, settings.dropout)
                yield settings.prior_weight * kept

        facts = learn_photos(job, "weights", policy.named_parameters(), losses, len(paths))
        policy.export(job.folder / "final")
        finished(job)
        return facts

    def _prior(self, job: Job[DreamBoothSettings], bundle: ModelBundle) -> Tensor:
        """Codes int64 [M, N] of the class, drawn once."""
        file, settings = job.folder / PRIOR, job.settings
        if file.is_file():
            return load_tensors(file)["codes"].long()

        def step(done: int, wanted: int) -> None:
            job.progress("images of the class", done, wanted)

        drawn = RolloutEngine.of(bundle).generate_images(
            [f"a photo of a {job.concept.class_word}."],
            samples=settings.prior_images,
            steps=settings.prior_timesteps,
            guidance_scale=settings.prior_guidance,
            seed=settings.seed,
            record=False,
            decode=False,
            progress=step,
        )
        codes = drawn.codes.long().cpu()
        save_safetensors_atomic(file, {"codes": codes})
        return codes

    def open(self, reading: Reading, subject: Subject) -> Model:
        bundle = reading.open_bundle()
        load_policy(bundle.model, reading.folder / "final")
        return _Draws(RolloutEngine.of(bundle), _Identifier(subject), subject, reading.sampling)


def named(sks: str, class_word: str) -> str:
    """The identifier and its class: what DreamBooth's prompts name."""
    return f"{sks} {class_word}"


class _Identifier:
    """Prompts with the class word behind every `<name>`."""

    def __init__(self, subject: Subject):
        self.subject = subject

    def expand(self, text: str) -> str:
        return text.replace(self.subject.sks, named(self.subject.sks, self.subject.class_word))


class _Draws(EngineModel):
    """A model that draws and is not asked."""

    def answer(self, images: Sequence[Image], question: str) -> str:
        raise Unsupported("DreamBooth learns to draw and does not answer questions")

    def answers(self, questions: Sequence[Question]) -> list[str]:
        raise Unsupported("DreamBooth learns to draw and does not answer questions")
