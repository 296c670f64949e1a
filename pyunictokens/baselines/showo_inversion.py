"""Textual inversion (Gal et al., 2022) on a masked model: one embedding a concept, learned from its photos alone.

The token `<name>` starts as its class word and is the only thing that learns, by the loss of the masked codes of the
photos under short neutral prompts. Questions name the same token: it was never asked about anything.

    DIR/concept/     the token (with `tokens` > 1, helpers stand before it)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config.limits import at_least, within
from ..models import ConceptTokens, owning_rows
from ..train.concept_tokens.token_init import from_class_word
from .base import Job, Method, PhotoSettings, Plan, Trained
from .loop import batch_of, finished, learn_photos, photos_to_learn
from .masked import drawing_loss, never_said, photos_of, plan_of

PROMPTS = (
    "a photo of {}.",
    "a picture of {}.",
    "an image of {}.",
    "a close photo of {}.",
    "a good photo of {}.",
    "a photo of one {}.",
)
"""Neutral prompts, one of which each image of a step is drawn from; {} is the token."""


@dataclass(frozen=True)
class InversionSettings(PhotoSettings):
    """How the embedding is learned."""

    tokens: int = 1
    """Embeddings of the concept; all start as the class word."""
    batch: int = 4
    """Photos a step."""
    dropout: float = 0.1
    """Probability that a prompt is replaced by the empty one."""
    crop: float = 1.0
    """Photos are enlarged by this factor and cropped at random; 1 turns it off."""
    flip: bool = True
    """Mirror photos at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, tokens=self.tokens, batch=self.batch, crop=self.crop)
        within(0, 1, dropout=self.dropout)


class ShowoInversion(Method[InversionSettings]):
    """One embedding on the masked model."""

    name, title, masked, reasons = "showo-textual-inversion", "Textual inversion (Show-o)", True, True
    about = "one embedding of the concept, from its photos alone, on the masked model"
    settings = InversionSettings

    def defaults(self, toy: bool) -> InversionSettings:
        return InversionSettings(tokens=4, steps=100, batch=8, lr=5e-3, flip=False) if toy else InversionSettings()

    def plan(self, job: Job[InversionSettings]) -> Plan:
        settings = job.settings
        return plan_of(job, settings.steps, settings.batch, 0, settings.tokens)

    def train(self, job: Job[InversionSettings]) -> Mapping[str, object]:
        """Learn the rows of the embedding."""
        bundle, settings, data = job.bundle(), job.settings, job.concept
        paths = photos_to_learn(data)
        model = owning_rows(bundle.model)
        model.requires_grad_(False)
        concept = ConceptTokens(data.name, model.width, 0, settings.tokens - 1, seed=settings.seed).to(model.device)
        from_class_word(concept, model, bundle.tokenizer, data.class_word)
        with torch.no_grad():
            concept.embed[:] = concept.embed[concept.rows("sks")].clone()
        never_said(concept)
        concept.requires_grad_(False).embed.requires_grad_(True)
        model.attach(concept)
        tokenizer = bundle.tokenizer.with_concept(concept.tokens)
        photos = photos_of(bundle, settings.crop, settings.flip)

        def losses(step: int, generator: torch.Generator) -> Iterable[Tensor]:
            rows = batch_of(len(paths), settings.batch, settings.seed, step)
            codes = photos.augmented([paths[row] for row in rows], generator)
            chosen = torch.randint(0, len(PROMPTS), (len(rows),), generator=generator).tolist()
            prompts = [concept.expand(PROMPTS[place].format(concept.sks)) for place in chosen]
            yield drawing_loss(bundle, tokenizer, codes, prompts, generator, settings.dropout)

        facts = learn_photos(job, "embedding", {"embed": concept.embed}, losses, len(paths))
        concept.save(job.folder / "concept")
        finished(job)
        return facts

    def words(self, folder: Path, trained: Trained) -> str:
        return f"ours:{folder}"
