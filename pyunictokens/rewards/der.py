"""DER, the DINOv2 evaluation reward (paper, equation 20): is the drawn subject the concept's subject?

``DER = 1 − cosine distance``, that is the cosine similarity of the drawing's and the photos' features, averaged over
the photos. Knows one image encoder (DINOv2 in the paper). That encoder must look at the subject: pooled over a whole
picture, mostly background, the scores of a group hardly differ and teach nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .base import ImageEncoder, RewardBatch, as_rows, cosine
from .cache import PhotoCache


class Der:
    """Scores drawings against the reference photos; the photos are embedded once."""

    name = "der"

    def __init__(self, encoder: ImageEncoder):
        self._encoder = encoder
        self._photos = PhotoCache(lambda pixels: as_rows(encoder.encode_image(pixels), len(pixels), "encode_image"))

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [-1, 1]."""
        if batch.references.shape[0] == 0:
            raise UserError("no reference photos: DER needs references [M, 3, H, W]")
        photos_MD = self._photos(batch.references)
        images_RD = as_rows(self._encoder.encode_image(batch.images), len(batch), "encode_image")
        return cosine(images_RD[:, None], photos_MD.to(images_RD.device)[None]).mean(dim=1)
