"""What is scored and what scores it: RewardBatch and the Expert interface, with the checks both sides rely on.

A batch is one group of rollouts of one step: R drawings, the answers they were drawn from, the facts the answer had to
be chosen from, and photos of the concept. This module knows no network and no formula: one file an expert has those.

Letters: R rollouts (rows), M reference photos, L facts, H and W pixels, D width of an embedding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.errors import UserError

KINDS = ("human", "animal", "object")
"""The kinds of concepts; the paper weighs the experts by kind (equation 13)."""

_TOKENS = re.compile(r"<[^<>\s]+>(?:\s*<[^<>\s]+>)*")


@dataclass
class RewardBatch:
    """One group of rollouts, ready to be scored. Raises UserError naming field, value and limit when it cannot be.

    Pixels are float in [-1, 1]; images and references may differ in size and in number.
    """

    images: Tensor
    """[R, 3, H, W]: what the model drew."""
    prompts: Sequence[str]
    """R texts: what each drawing should show, as an ordinary reader would put it (see :func:`plain_text`)."""
    answers: Sequence[str] = ()
    """R texts: IR, the model's answer that went into each drawing's prompt. Needed by TIER."""
    facts: Sequence[str] = ()
    """L texts the answer is compared with: extra_info in text-only steps, the true answer alone in visual ones."""
    correct: int = 0
    """Index in `facts` of the true one."""
    references: Tensor = field(default_factory=lambda: torch.empty(0, 3, 1, 1))
    """[M, 3, H, W]: photos of the concept. Needed by DER and FER."""
    kind: str = "object"
    """human, animal or object."""

    def __post_init__(self) -> None:
        for name in ("images", "references"):
            check_pixels(getattr(self, name), name, allow_none=name == "references")
        rows = len(self)
        if rows == 0:
            raise UserError("images: 0 rows: there is nothing to score")
        for name, texts in (("prompts", self.prompts), ("answers", self.answers)):
            if isinstance(texts, str):
                raise UserError(f"{name}={texts!r}: must be a list of {rows} texts, one a row, not one text")
            if len(texts) != rows and (name == "prompts" or len(texts) > 0):
                raise UserError(f"{name}: {len(texts)} texts for {rows} images: must be one a row")
        if isinstance(self.facts, str):
            raise UserError(f"facts={self.facts!r}: must be a list of texts, not one text")
        if self.facts and not 0 <= self.correct < len(self.facts):
            raise UserError(f"correct={self.correct}: must be an index into the {len(self.facts)} facts")
        if self.kind not in KINDS:
            raise UserError(f"kind={self.kind!r}: must be one of {', '.join(KINDS)}")

    def __len__(self) -> int:
        return self.images.shape[0]

    def row(self, index: int) -> RewardBatch:
        """The batch that holds one row alone."""
        return RewardBatch(
            images=self.images[index : index + 1],
            prompts=[self.prompts[index]],
            answers=[self.answers[index]] if self.answers else (),
            facts=self.facts,
            correct=self.correct,
            references=self.references,
            kind=self.kind,
        )


@runtime_checkable
class Expert(Protocol):
    """Anything that judges drawings. One method is all an expert needs; docs/rewards.md adds one in ten lines."""

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R], float and finite, larger is better, best about 1. A row's score must not depend on other rows."""
        ...


class TextEncoder(Protocol):
    """What TIER asks of its network (ERNIE 3.0 in the paper)."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, D] of any length; they are normalised here."""
        ...


class ImageEncoder(Protocol):
    """What DER asks of its network (DINOv2 in the paper). Patch features are to be reduced to one row an image."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, D] of pixels [B, 3, H, W] in [-1, 1]; resizing is the encoder's own business."""
        ...


class ImageTextEncoder(TextEncoder, ImageEncoder, Protocol):
    """What BER asks of its network (BLIP-2 in the paper): pictures and texts in one space.

    A picture may have several vectors, [B, Q, D]; the one nearest to the text counts.
    """


class PatchEncoder(Protocol):
    """What DER asks of its network when patches are matched one by one."""

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """One vector a patch, [B, P, D], of pixels [B, 3, H, W] in [-1, 1]; P is the same for every picture."""
        ...


class Matcher(Protocol):
    """What BER asks of its network when pictures and texts are judged pair by pair."""

    def match(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Probabilities [B] that text b belongs to picture b."""
        ...


class FaceEncoder(Protocol):
    """What FER asks of its networks (MTCNN and FaceNet in the paper)."""

    def encode_faces(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(a face was found, bool [B]; its embedding [B, D], anything where none was found)."""
        ...


class WithNetwork:
    """An expert over one network, which an ensemble may load early and move between devices."""

    def __init__(self, encoder: Any):
        self._encoder = encoder

    def load(self) -> None:
        """Read the network from disk now, where that is not done yet."""
        if callable(load := getattr(self._encoder, "load", None)):
            load()

    def to(self, device: str | torch.device) -> None:
        """Move the network. What was computed before stays where it is."""
        if callable(move := getattr(self._encoder, "to", None)):
            move(device)

    @property
    def bytes(self) -> int:
        """Memory of the network's weights; 0 where it does not say."""
        if isinstance(self._encoder, torch.nn.Module):
            return sum(t.numel() * t.element_size() for t in self._encoder.parameters())
        return int(getattr(self._encoder, "bytes", 0))


def plain_text(text: str, class_word: str) -> str:
    """`text` as someone would say it who does not know the concept: every run of `<tokens>` becomes the class word.

    ``plain_text("A photo of <token_0><token_1><bo>.", "dog")`` is ``"A photo of dog."``. Encoders that were never
    trained on the tokens can then read it, as the published evaluation does.
    """
    if not class_word.strip():
        raise UserError("class_word is empty: give the concept's class, e.g. 'dog' (field class of info.json)")
    return _TOKENS.sub(lambda _: class_word.strip(), text)


def check_pixels(pixels: Tensor, name: str, allow_none: bool = False) -> None:
    """Raise UserError unless `pixels` is a finite float [B, 3, H, W] in [-1, 1]."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
        found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise UserError(f"{name}: {found}: must be a tensor [B, 3, H, W]")
    if not pixels.is_floating_point():
        raise UserError(f"{name}: {pixels.dtype}: must be float in [-1, 1] (for uint8: pixels / 127.5 - 1)")
    if pixels.numel() == 0:
        if allow_none or pixels.shape[0] == 0:
            return
        raise UserError(f"{name}: {tuple(pixels.shape)}: has no pixels")
    low, high = torch.aminmax(pixels)
    if not (low >= -1.001 and high <= 1.001):  # NaN fails both
        raise UserError(f"{name}: values from {low.item():.4g} to {high.item():.4g}: must be finite and within [-1, 1]")


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity in fp32 of rows [..., D], clipped to [-1, 1] against rounding.

    The paper writes ``1 - cosine<a, b>`` where cosine is SciPy's *distance*; both together are this similarity.
    """
    similarity = (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(-1)
    return similarity.clamp(-1.0, 1.0)


def as_rows(embedding: Tensor, rows: int, origin: str, several: bool = False) -> Tensor:
    """`embedding` checked to be [rows, D]; with `several`, [rows, Q, D] is fine as well."""
    known = isinstance(embedding, Tensor) and embedding.ndim in ((2, 3) if several else (2,))
    if not known or embedding.shape[0] != rows:
        found = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        wanted = f"[{rows}, D] or [{rows}, Q, D]" if several else f"[{rows}, D]"
        raise UserError(f"{origin} returned {found} for {rows} inputs: must return a tensor {wanted}")
    return embedding
