"""FER, the FaceNet evaluation reward (paper, equation 21): is the generated face the person's face?

``FER = 1 − cosine distance`` of face embeddings, averaged over the references with a face. Where no face is found in a
image FER is 0 and the row is counted; a face unlike the person's is never worth less than no face, so the score is
clamped to [0, 1]. Used for humans only. `Fer` has the formula and asks any face encoder; facenet.py has the paper's,
MTCNN and FaceNet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...utils.errors import UserError
from ..base import Device, FaceEncoder, RewardBatch, WithNetwork, as_rows, cosine
from ..cache import ReferenceCache
from ..registry import register
from .facenet import FILES, FerConfig, MtcnnFaceNet


@register("fer", label="FER: the face", settings=FerConfig, files=FILES)
class Fer(WithNetwork[FaceEncoder]):
    """Scores faces in images against faces in the reference images; the references are searched once."""

    name = "fer"

    def __init__(self, encoder: FaceEncoder):
        super().__init__(encoder)
        self._references = ReferenceCache(self._faces)

    @classmethod
    def from_settings(cls, settings: FerConfig, device: Device) -> Fer:
        return cls(MtcnnFaceNet.located(settings, device))

    def _faces(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found_B, face_BD = self._encoder.encode_faces(pixels)
        rows = pixels.shape[0]
        if found_B.shape != (rows,) or found_B.dtype != torch.bool:
            raise UserError(
                f"encode_faces found: {found_B.dtype} {tuple(found_B.shape)} for {rows} images: must be bool [{rows}]"
            )
        return found_B, as_rows(face_BD, rows, "encode_faces")

    @torch.no_grad()
    def face_embedding(self, pixels: Tensor) -> Tensor:
        """Embeddings [F, D] of the faces in references [M, 3, H, W]; F ≤ M. Raises UserError where there is none."""
        found_M, face_MD = self._faces(pixels)
        if not bool(found_M.any()):
            raise UserError(f"no face found in any of the {len(pixels)} references: use clearer ones")
        return face_MD[found_M]

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [0, 1]."""
        return self.score_and_absent(batch)[0]

    @torch.no_grad()
    def score_and_absent(self, batch: RewardBatch) -> tuple[Tensor, Tensor]:
        """(scores [R] in [0, 1]; bool [R], true where no face was found and the score is therefore 0)."""
        count = batch.references.shape[0]
        if count == 0:
            raise UserError("no reference images: FER needs references [M, 3, H, W]")
        seen_M, reference_MD = self._references(batch.references)
        if not bool(seen_M.any()):
            raise UserError(
                f"no face found in any of the {count} reference images: use clearer references, or leave FER out with "
                "weights={'fer': 0, ...}"
            )
        found_R, face_RD = self._faces(batch.images)
        reference_MD = reference_MD[seen_M].to(face_RD.device)
        similarity_R = cosine(face_RD[:, None], reference_MD[None]).mean(dim=1).clamp(0.0, 1.0)
        return torch.where(found_R, similarity_R, 0.0), ~found_R
