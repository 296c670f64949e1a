"""DER, the DINOv2 evaluation reward (paper, equation 20): is the generated subject the concept's subject?

``DER = 1 − cosine distance``, that is the cosine similarity of the image's and the references' features, averaged over
the references. The paper speaks of patch-level features and of one cosine of two images, and leaves open how many
vectors become one number. Two readings, by `match`:

    mean (default)   the patches' vectors are averaged, and one cosine is taken: equation 20 to the letter
    best             each patch looks for the most similar patch of the other image; the mean of these cosines, over
                     the patches of both images

`best` does not mind where in the image the subject is and differs more inside a group; use it where the report shows
that the scores of `mean`, pooled over much background, hardly differ. `Der` has the formulas and asks any image
encoder; `Dinov2` is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.weight_files import PROCESSOR, WEIGHTS, WeightFiles
from ...utils.errors import UserError
from ..base import Device, ImageEncoder, PatchEncoder, RewardBatch, WithNetwork, as_rows, cosine, shape_of
from ..cache import ReferenceCache
from ..networks import ImageNetwork, NetworkConfig, from_transformers
from ..registry import register


def best_match(a_APD: Tensor, b_BPD: Tensor) -> Tensor:
    """Similarities [A, B] of images by their patches' vectors, [A, P, D] and [B, P', D]; see `best` above.

    Symmetric, 1 for an image with itself, in [-1, 1]. Takes A·P·P' numbers of memory at a time.
    """
    a, b = F.normalize(a_APD.float(), dim=-1), F.normalize(b_BPD.float(), dim=-1)
    columns = []
    for reference_PD in b:
        cosine_APP = torch.einsum("apd,qd->apq", a, reference_PD)
        columns.append((cosine_APP.amax(2).mean(1) + cosine_APP.amax(1).mean(1)) / 2)
    return torch.stack(columns, dim=1).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class DerConfig(NetworkConfig):
    """DINOv2."""

    match: str = "mean"
    """mean or best; see above."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("match", "mean", "best")


_WANTED = (("config.json",), WEIGHTS, PROCESSOR)
FILES = WeightFiles("DINOv2", "facebook/dinov2-base", _WANTED, "Apache-2.0", gigabytes=0.35)


@register("der", label="DER: the subject", settings=DerConfig, files=FILES)
class Der(WithNetwork[ImageEncoder | PatchEncoder]):
    """Scores images against the reference images; the references are embedded once.

    match: "mean" asks the network for one vector an image (`encode_image`), "best" for one a patch (`encode_patches`).
    """

    name = "der"

    def __init__(self, encoder: ImageEncoder | PatchEncoder, match: str = "mean"):
        super().__init__(encoder)
        if match not in {"mean", "best"}:
            raise UserError(f"match={match!r}: must be mean or best")
        if match == "mean" and not isinstance(encoder, ImageEncoder):
            raise UserError(f"match={match!r}: a {type(encoder).__name__} has no encode_image")
        if match == "best" and not isinstance(encoder, PatchEncoder):
            raise UserError(f"match={match!r}: a {type(encoder).__name__} has no encode_patches")
        self.match = match
        self._references = ReferenceCache(self._features)

    @classmethod
    def from_settings(cls, settings: DerConfig, device: Device) -> Der:
        return cls(Dinov2.located(settings, device), settings.match)

    def _features(self, pixels: Tensor) -> Tensor:
        """[B, D] of mean, [B, P, D] of best."""
        if self.match == "mean":
            assert isinstance(self._encoder, ImageEncoder)
            return as_rows(self._encoder.encode_image(pixels), len(pixels), "encode_image")
        assert isinstance(self._encoder, PatchEncoder)
        patches, rows = self._encoder.encode_patches(pixels), len(pixels)
        if not isinstance(patches, Tensor) or patches.ndim != 3 or len(patches) != rows:
            raise UserError(f"encode_patches returned {shape_of(patches)} for {rows} inputs: must be [{rows}, P, D]")
        return patches

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [-1, 1]."""
        if batch.references.shape[0] == 0:
            raise UserError("no reference images: DER needs references [M, 3, H, W]")
        references = self._references(batch.references)
        images = self._features(batch.images)
        references = references.to(images.device)
        if self.match == "best":
            return best_match(images, references).mean(dim=1)
        return cosine(images[:, None], references[None]).mean(dim=1)


class Dinov2(ImageNetwork):
    """DINOv2's patch features (transformers), with or without register tokens; the class token is not used."""

    files: ClassVar[WeightFiles] = FILES

    def _build(self, folder: Path) -> tuple[nn.Module, ...]:
        net = from_transformers("AutoModel", folder, self.dtype, kinds=("dinov2", "dinov2_with_registers"))
        self._read_processor(folder)
        return (net,)

    @torch.no_grad()
    def encode_patches(self, pixels: Tensor) -> Tensor:
        """[B, P, D], float32: the last layer's normalised states of the patches."""

        def encode(pixels: Tensor) -> Tensor:
            net = self._net
            states = net(pixel_values=self.prepare(pixels).to(self.dtype)).last_hidden_state
            first = 1 + int(net.config.to_dict().get("num_register_tokens", 0))
            return states[:, first:].float()

        return self.batched(encode, pixels)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, D], float32: the mean over the patches."""
        return self.encode_patches(pixels).mean(dim=1)
