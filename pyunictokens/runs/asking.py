"""What is said to a run's model: prompts and questions in the words it was trained with, sizes, masks, reasoning.

Commands, server and studio share it. Sampling is `rollout`'s business.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..config.settings import from_mapping, load_yaml, with_overrides
from ..data.parse import TextFix
from ..data.wording import text_only_question
from ..models import ConceptTokens, SamplingRule
from ..models.published_form import PublishedForm
from ..utils.errors import UserError, needs

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class SamplingConfig:
    """How images and answers are sampled."""

    timesteps: int = 50
    """MaskGIT timesteps of an image."""
    guidance_scale: float = 5.0
    """Classifier-free guidance, as the model reads it (docs/models.md); 0 turns Show-o's off."""
    temperature: float = 1.0
    """Temperature of the re-masking noise."""
    schedule: str = "cosine"
    """How the number of unknown codes falls: cosine, linear, sigmoid, or pow2 and the like."""
    max_new_tokens: int = 100
    """Longest answer."""
    answer_temperature: float = 0.0
    """Temperature of answers; 0 takes the likeliest token each time."""
    top_k: int = 0
    """Answers are drawn from the k likeliest tokens; 0 takes all."""


def sampling(
    is_toy: bool,
    config: Path | None = None,
    words: Sequence[str] | None = None,
    rule: SamplingRule | None = None,
) -> SamplingConfig:
    """Defaults of the toy or of the model (its `rule`, or Show-o's numbers), then the file, then the words."""
    base = SamplingConfig(timesteps=12, guidance_scale=3.0, max_new_tokens=24) if is_toy else SamplingConfig()
    if rule is not None and not is_toy:
        base = SamplingConfig(rule.steps, rule.guidance_scale, rule.temperature, rule.schedule)
    if config is not None:
        base = from_mapping(SamplingConfig, load_yaml(config), base=base, origin=str(config))
    return with_overrides(base, list(words or []))


def check_prompt(prompt: str, concept: ConceptTokens | None, published: bool = False) -> str:
    """:func:`read_prompt`, with a warning where the prompt names the concept without its token."""
    if concept is not None and names_without_token(prompt, concept):
        warnings.warn(f"{prompt!r} holds no {concept.sks}: did you mean {concept.sks}?", stacklevel=2)
    return read_prompt(prompt, concept, published)


def read_prompt(prompt: str, concept: ConceptTokens | None, published: bool = False) -> str:
    """The prompt with the concept's helper tokens put in, for `published` tokens as UniCTokens does. Raises UserError
    for a `<name>` that is not the concept's."""
    known = set(concept.tokens) if concept is not None else set()
    strange = [token for token in re.findall(r"<[^<>|\s]+>", prompt) if token not in known]
    if strange:
        have = f"this run knows {concept.sks}" if concept is not None else "no concept is attached"
        raise UserError(f"{prompt!r}: {strange[0]} is not a token of this model; {have}")
    return prompt if concept is None else concept.expand(prompt, every=published)


def names_without_token(prompt: str, concept: ConceptTokens) -> bool:
    """Whether the prompt has the concept's name, but not its token: `bo`, `{bo}`, `&lt;bo&gt;`."""
    if concept.sks in prompt:
        return False
    word = rf"(?<![\w<]){re.escape(concept.name)}(?![\w>])"
    return bool(TextFix(concept.name).strange(prompt) or re.search(word, prompt, re.IGNORECASE))


def question_for(question: str, concept: ConceptTokens | None, published: bool) -> tuple[str, bool]:
    """(the question as the model reads it, whether its wording is already around it): published tokens are asked in the
    form they were trained in."""
    if published and concept is not None:
        return PublishedForm(concept).question(question), True
    return concept.expand(question) if concept is not None else question, False


def reasoning_question(
    facts: Sequence[str], prompt: str, concept: ConceptTokens | None, published: bool
) -> tuple[str, bool]:
    """What is asked ahead of drawing, about a black image: which of the facts the prompt means (paper, equation 2)."""
    return question_for(text_only_question(facts, prompt), concept, published)


def grid_of(height: int, width: int, step: int, name: str) -> tuple[int, int]:
    """Codes in height and width of an image of so many pixels, `step` pixels a code. Raises UserError, naming it by
    `name`, for what cannot be cut into codes."""
    if height % step or width % step:
        raise UserError(f"{name}: both must be multiples of {step}, the pixels of one code")
    return height // step, width // step


def painted(image: Image, white: Image, grid: tuple[int, int], step: int, name: str) -> tuple[Tensor, Tensor]:
    """(pixels [3, H, W] cut to the grid, bool [N]: the codes that are painted anew), wherever `white` is not black. A
    code is painted where any of its pixels is. Raises UserError, naming the mask by `name`, for images that do not fit
    together, and for a mask that is black or white all over."""
    with needs("data"):
        from PIL import ImageOps

    from ..data.images import from_pil

    if image.size != white.size:
        sizes = " and ".join(f"{each.width}x{each.height}" for each in (image, white))
        raise UserError(f"image and {name} are {sizes} pixels: must be of one size")
    side = (grid[1] * step, grid[0] * step)
    pixels, mask = (from_pil(ImageOps.fit(each, side)) for each in (image, white))
    unknown = F.max_pool2d((mask.mean(0, keepdim=True) > 0).float()[None], step)[0, 0].flatten() > 0
    if bool(unknown.all()) or not bool(unknown.any()):
        raise UserError(f"{name}: is {'white' if unknown.any() else 'black'} all over: nothing is left to do")
    return pixels, unknown
