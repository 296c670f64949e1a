"""DER, the DINOv2 evaluation reward (paper, equation 20): is the drawn subject the concept's subject?

``DER = 1 − cosine distance``, that is the cosine similarity of the drawing's and the photos' features, averaged over
the photos. The paper speaks of patch-level features and of one cosine of two pictures, and leaves open how many vectors
become one number. Two readings, by `match`:

    mean (default)   the patches' vectors are averaged, and one cosine is taken: equation 20 to the letter
    best             each patch looks for the most similar patch of the other picture; the mean of these cosines, over
                     the patches of both pictures

`best` does not mind where in the picture the subject is and differs more inside a group; use it where the report shows
that the scores of `mean`, pooled over much background, hardly differ. `Der` has the formulas and asks any image
encoder; `Dinov2` is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.errors import UserError
from ..base import ImageEncoder, PatchEncoder, RewardBatch, WithNetwork, as_rows, cosine
from ..cache import PhotoCache
from ..networks import ImageNetwork, NetworkConfig, from_transformers


def best_match(a_APD: Tensor, b_BPD: Tensor) -> Tensor:
    """Similarities [A, B] of pictures by their patches' vectors, [A, P, D] and [B, P', D]; see `best` above.

    Symmetric, 1 for a picture with itself, in [-1, 1]. Takes A·P·P' numbers of memory at a time.
    """
    a, b = F.normalize(a_APD.float(), dim=-1), F.normalize(b_BPD.float(), dim=-1)
    columns = []
    for photo_PD in b:
        cosine_APP = torch.einsum("apd,qd->apq", a, photo_PD)
        columns.append((cosine_APP.amax(2).mean(1) + cosine_APP.amax(1).mean(1)) / 2)
    return torch.stack(columns, dim=1).clamp(-1.0, 1.0)


class Der(WithNetwork):
    """Scores drawings against the reference photos; the photos are embedded once.

    match: "mean" asks the network for one vector a picture (`encode_image`), "best" for one a patch (`encode_patches`).
    """

    name = "der"

    def __init__(self, encoder: ImageEncoder | PatchEncoder, match: str = "mean"):
        super().__init__(encoder)
        wanted = {"mean": "encode_image", "best": "encode_patches"}
        if match not in wanted:
            raise UserError(f"match={match!r}: must be mean or best")
        if not callable(getattr(encoder, wanted[match], None)):
            raise UserError(f"match={match!r}: a {type(encoder).__name__} has no {wanted[match]}")
        self.match = match
        self._photos = PhotoCache(self._features)

    def _features(self, pixels: Tensor) -> Tensor:
        """[B, D] of mean, [B, P, D] of best."""
        if self.match == "mean":
            return as_rows(self._encoder.encode_image(pixels), len(pixels), "encode_image")
        patches = self._encoder.encode_patches(pixels)
        if not isinstance(patches, Tensor) or patches.ndim != 3 or len(patches) != len(pixels):
            found = tuple(patches.shape) if isinstance(patches, Tensor) else type(patches).__name__
            raise UserError(f"encode_patches returned {found} for {len(pixels)} inputs: must be [{len(pixels)}, P, D]")
        return patches

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [-1, 1]."""
        if batch.references.shape[0] == 0:
            raise UserError("no reference photos: DER needs references [M, 3, H, W]")
        photos = self._photos(batch.references)
        images = self._features(batch.images)
        photos = photos.to(images.device)
        if self.match == "best":
            return best_match(images, photos).mean(dim=1)
        return cosine(images[:, None], photos[None]).mean(dim=1)


@dataclass(frozen=True)
class DerConfig(NetworkConfig):
    """DINOv2."""

    match: str = "mean"
    """mean or best; see above."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("match", "mean", "best")


class Dinov2(ImageNetwork):
    """DINOv2's patch features (transformers), with or without register tokens; the class token is not used."""

    expert = "der"

    def _build(self, folder: Path) -> tuple[nn.Module, ...]:
        net = from_transformers("AutoModel", folder, self.dtype, kinds=("dinov2", "dinov2_with_registers"))
        self._read_processor(folder)
        return (net,)

    @torch.no_grad()
    def encode_patches(self, pixels: Tensor) -> Tensor:
        """[B, P, D], float32: the last layer's normalised states of the patches."""

        def encode(pixels: Tensor) -> Tensor:
            (net,) = self.load()
            states = net(pixel_values=self.prepare(pixels).to(self.dtype)).last_hidden_state
            first = 1 + int(getattr(net.config, "num_register_tokens", 0))
            return states[:, first:].float()

        return self.batched(encode, pixels)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, D], float32: the mean over the patches."""
        return self.encode_patches(pixels).mean(dim=1)
