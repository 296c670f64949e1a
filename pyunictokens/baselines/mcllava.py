"""MC-LLaVA (An et al., 2024): several concepts of a LLaVA learned together, from tokens that begin as what is seen.

As Yo'LLaVA, but the sentences of all concepts stand before every question, and the soft tokens begin as the k-means
centres of the visual tokens inside the concept's masks (`0_mask.png` beside `0.png`; all visual tokens without one),
brought to the mean length of the model's own embeddings; the identifier begins as their mean. AdamW 1e-3, weight decay
1e-6, fifteen epochs.

    DIR/tokens.safetensors      the concept's own tokens first, then those of `others` in their order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..data.concept import Concept
from ..data.folder import load_concept
from ..data.images import read_image, square
from ..evaluate.baselines.vlm import Backbone
from ..train.concept_tokens.token_init import kmeans
from ..utils.errors import UserError
from . import answering
from .base import Job, Settings
from .token_rows import TokenRows
from .yollava import YoLlava, YoLlavaSettings, names_of, sentence


@dataclass(frozen=True)
class McLlavaSettings(YoLlavaSettings):
    """The published recipe."""

    weight_decay: float = 1e-6
    """Weight decay of AdamW."""
    others: tuple[str, ...] = ()
    """Concepts of the same data folder that are learned together with this one."""
    masks: bool = True
    """Whether the tokens start from the visual tokens inside the masks, where there are masks."""


class McLlava(YoLlava):
    """Identifiers and soft tokens of several concepts."""

    name, title = "mcllava", "MC-LLaVA"
    about = (
        "an identifier and sixteen soft tokens a concept of a LLaVA, several together, from visual tokens; it answers"
    )
    settings: ClassVar[type[Settings]] = McLlavaSettings

    def tokens(self, job: Job[YoLlavaSettings]) -> list[str]:
        count = job.settings.tokens
        return [name for place, one in enumerate(_names(job)) for name in names_of(one, count, place * count)]

    def before(self, names: Sequence[str], settings: YoLlavaSettings) -> str:
        size = settings.tokens + 1
        return "".join(sentence(names[start : start + size]) for start in range(0, len(names), size))

    def samples(self, job: Job[YoLlavaSettings]) -> list[answering.Sample]:
        return [sample for concept in _concepts(job) for sample in answering.samples_of(concept)]

    @torch.no_grad()
    def begin(self, job: Job[YoLlavaSettings], backbone: Backbone, rows: TokenRows) -> None:
        """k-means of each concept's visual tokens."""
        settings = job.settings
        assert isinstance(settings, McLlavaSettings)
        length = mean_length(backbone, rows)
        for place, concept in enumerate(_concepts(job)):
            job.progress("visual tokens", place, len(_names(job)), {"note": concept.name})
            points = torch.cat([visual_tokens(backbone, path, settings.masks) for path in concept.train_images])
            start = place * (settings.tokens + 1)
            rows.embed[start : start + settings.tokens + 1] = centres(points, settings.tokens, length, settings.seed)
        job.progress("visual tokens", len(_names(job)), len(_names(job)))


def centres(points_PD: Tensor, count: int, length: float, seed: int) -> Tensor:
    """[1 + count, D]: the mean of k-means centres that have been brought to `length`, then these centres."""
    found = kmeans(points_PD.float().cpu(), count, seed)
    found = found / found.norm(dim=1, keepdim=True).clamp_min(1e-12) * length
    return torch.cat([found.mean(0, keepdim=True), found]).to(points_PD)


def mean_length(backbone: Backbone, rows: TokenRows) -> float:
    """Mean length of the model's own embeddings, without the new rows."""
    weight = backbone.model.get_input_embeddings().weight
    own = torch.ones(len(weight), dtype=torch.bool)
    own[rows.ids] = False
    return float(weight[own].float().norm(dim=1).mean())


def visual_tokens(backbone: Backbone, path: Path, masks: bool = True) -> Tensor:
    """[P, D] projected patch features of an image; inside its mask alone, where there is one and `masks` says so."""
    image, config = read_image(path), backbone.model.config
    ready = backbone.processor.image_processor(images=[square(image, min(image.size))], return_tensors="pt")
    made = backbone.model.get_image_features(
        pixel_values=ready["pixel_values"].to(backbone.device, backbone.model.dtype),
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    features: Tensor = torch.cat(list(made.pooler_output), dim=0)
    features = features.reshape(-1, features.shape[-1])
    mask = _mask_of(path) if masks else None
    if mask is None:
        return features
    grid = round(len(features) ** 0.5)
    if grid * grid != len(features):
        raise UserError(
            f"{path}: {len(features)} visual tokens are no square: masks cannot be laid on it (masks=false)"
        )
    seen = square(read_image(mask), min(read_image(mask).size)).convert("L").resize((grid, grid), 0)
    inside = torch.from_numpy(np.asarray(seen) > 127).flatten().to(features.device)
    return features[inside] if bool(inside.any()) else features


def _mask_of(path: Path) -> Path | None:
    mask = path.with_name(f"{path.stem}_mask.png")
    return mask if mask.is_file() else None


def _names(job: Job[YoLlavaSettings]) -> list[str]:
    settings = job.settings
    assert isinstance(settings, McLlavaSettings)
    names = [job.concept.name, *settings.others]
    if len(set(names)) < len(names):
        raise UserError(f"others={list(settings.others)}: name each concept once, and not {job.concept.name} itself")
    return names


def _concepts(job: Job[YoLlavaSettings]) -> list[Concept]:
    return [job.concept, *(load_concept(job.concept.root, name) for name in _names(job)[1:])]
