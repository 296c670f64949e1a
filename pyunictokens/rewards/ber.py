"""BER, the BLIP evaluation reward (paper, equations 18 and 19): does the drawing show what the prompt says?

``BER = 1 − s`` with s the cosine *distance* of image and prompt, that is their cosine similarity, in [-1, 1]. It also
judges DSOG's previews. Knows one image–text encoder (BLIP-2 in the paper) and no reference photos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .base import ImageTextEncoder, RewardBatch, as_rows, check_pixels, cosine
from .cache import TextCache


class Ber:
    """Scores drawings against their prompts. Prompts are embedded once; give them in plain words (`plain_text`)."""

    name = "ber"

    def __init__(self, encoder: ImageTextEncoder):
        self._encoder = encoder
        self._texts = TextCache(encoder.encode_text)

    @torch.no_grad()
    def similarity(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine similarities [B] of pixels [B, 3, H, W] in [-1, 1] and B prompts."""
        image_BD = as_rows(self._encoder.encode_image(pixels), pixels.shape[0], "encode_image")
        return cosine(image_BD, self._texts(prompts).to(image_BD.device))

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [-1, 1]."""
        return self.similarity(batch.images, batch.prompts)

    def preview_scorer(self, prompts: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
        """The judge DSOG asks: ``scorer(pixels [P, 3, H, W], prompt_index [P]) -> [P]`` for this rollout's prompts."""
        prompts = list(prompts)

        def scorer(pixels: Tensor, prompt_index: Tensor) -> Tensor:
            pixels = pixels.clamp(-1.0, 1.0)  # a decoder overshoots a little
            check_pixels(pixels, "preview")
            chosen = [int(index) for index in prompt_index]
            if any(not 0 <= index < len(prompts) for index in chosen):
                raise UserError(f"prompt_index={chosen}: must be indices into the {len(prompts)} prompts")
            return self.similarity(pixels, [prompts[index] for index in chosen])

        return scorer
