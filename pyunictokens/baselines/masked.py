"""What the rivals on a masked model share: the two losses over a concept's photos and questions, and their sizes.

The losses are those of the concept stages (train/concept_tokens/losses.py); here is what is put into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..models import AnsweringModel, ConceptTokens, TextTokenizer
from ..models.bundle import ModelBundle
from ..models.showo.costs import ShowoCosts, parameters
from ..train.concept_tokens.losses import TextRow, generation_loss, random_mask, understanding_loss
from ..train.costs import PROMPT, QUESTION, sizes_of
from ..train.images import ReferenceImages
from .base import Job, Plan, Settings
from .planning import bytes_of, parts_lacking


def drawing_loss(
    bundle: ModelBundle,
    tokenizer: TextTokenizer,
    codes_BN: Tensor,
    prompts: Sequence[str],
    generator: torch.Generator,
    dropout: float = 0.1,
) -> Tensor:
    """Mean cross-entropy of the masked codes of images under their prompts; a prompt is replaced by the empty one with
    probability `dropout`, so that guidance keeps working."""
    ids = []
    for prompt in prompts:
        dropped = bool(torch.rand((), generator=generator) < dropout)
        ids.append(bundle.model.prompt_ids([] if dropped else tokenizer.encode(prompt)))
    mask_BN, timestep_B = random_mask(len(ids), codes_BN.shape[1], "cosine", generator)
    return generation_loss(bundle.model, codes_BN, mask_BN, ids, timestep_B)


def answering_loss(
    model: AnsweringModel, images: ReferenceImages, paths: Sequence[Path | None], rows: Sequence[TextRow]
) -> Tensor:
    """Mean cross-entropy of the answers' tokens about images."""
    prefixes = [images.prefix(path) for path in paths]
    joined = prefixes[0]
    for prefix in prefixes[1:]:
        joined = joined + prefix
    return understanding_loss(model, joined, rows)


def never_said(concept: ConceptTokens) -> None:
    """Make the concept's tokens ones that are read and never written: their head is no part of the method."""
    with torch.no_grad():
        concept.head_weight.zero_()
        concept.head_bias.fill_(-1e4)


def photos_of(bundle: ModelBundle, crop: float, flip: bool) -> ReferenceImages:
    """The reader of a concept's photos as codes."""
    return ReferenceImages(bundle.model, bundle.vq, crop=crop, flip=flip)


def plan_of(
    job: Job[Settings], steps: int, images: int, questions: int, rows: int, *, full: bool = False, drawn: int = 0
) -> Plan:
    """The plan of `steps` steps over so many images and questions each, of which the numbers of `rows` tokens learn.

    full: the gradient reaches every weight. drawn: images that the model draws first, of 50 timesteps with guidance.
    """
    costs: ShowoCosts = job.costs or sizes_of(job.sources.model)
    one = costs.update(images, 1, PROMPT, costs.count, False, "full" if full else "concept").flops if images else 0.0
    if questions:
        words, answer = QUESTION
        asked = costs.count + 3 + words
        answered = costs.answers(asked, [answer]).flops - costs.prefill(asked).flops
        one += questions * 2 * (costs.prefill(words).flops + answered)
    first = costs.image_step(1, PROMPT, costs.count, True).flops * 50 * drawn
    held = parameters(costs.config)
    memory = bytes_of(held, held if full else rows * (2 * costs.config.hidden_size + 1), job.dtype)
    return Plan(steps, steps * one + first, memory, parts_lacking(job.sources))
