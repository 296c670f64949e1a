"""What is scored and what scores it: RewardBatch, the protocol RewardModel, and the score a run is given.

A batch is one group of rollouts of one step: R images, the prompts they were generated for and, where a reward asks
for them, the model's answers, the concept's facts, its reference images and the further columns of a prompt list. Of a
model that writes it is R texts instead (`completions`), and there are no images. A
reward model gives one number an image; an ensemble weighs several of them into an :class:`EnsembleScore`. Everything
that a run asks of its rewards is the protocol :class:`Rewards`.

Letters: R rollouts, M reference images, L facts, H and W pixels, D width of an embedding, P previews.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.errors import NotFinite, UserError

Device = str | torch.device
KINDS = ("human", "animal", "object")
"""The kinds of concepts; the paper weighs the reward models by kind (equation 13)."""

_TOKENS = re.compile(r"<[^<>\s]+>(?:\s*<[^<>\s]+>)*")


@dataclass
class RewardBatch:
    """One group of rollouts, ready to be scored. Raises UserError naming field, value and limit when it cannot be.

    Pixels are float in [-1, 1]; images and references may differ in size and in number.
    """

    images: Tensor
    """[R, 3, H, W]: what the model generated."""
    prompts: Sequence[str]
    """R texts: what each image should show, as an ordinary reader would put it (see :func:`plain_text`)."""
    answers: Sequence[str] = ()
    """R texts: IR, the model's answer that went into each image's prompt. Needed by TIER."""
    facts: Sequence[str] = ()
    """L texts the answer is compared with: extra_info in text-only steps, the true answer alone in visual ones."""
    correct: int = 0
    """Index in `facts` of the true one."""
    references: Tensor = field(default_factory=lambda: torch.empty(0, 3, 1, 1))
    """[M, 3, H, W]: reference images of the concept. Needed by DER and FER."""
    kind: str = "object"
    """human, animal or object."""
    columns: Mapping[str, Sequence[object]] = field(default_factory=dict)
    """Further columns of a prompt list, R values each; reward functions get them by name."""
    completions: Sequence[str] = ()
    """R texts, where the model writes and draws nothing: what it wrote. `images` is then [R, 3, 0, 0]."""

    @classmethod
    def of_texts(
        cls, completions: Sequence[str], prompts: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> RewardBatch:
        """A batch of R texts."""
        return cls(torch.empty(len(completions), 3, 0, 0), prompts, columns=columns, completions=list(completions))

    def __post_init__(self) -> None:
        check_pixels(self.images, "images", allow_none=bool(self.completions))
        check_pixels(self.references, "references", allow_none=True)
        rows = len(self)
        if rows == 0:
            raise UserError("images: 0 rows: there is nothing to score")
        for name, texts in (("prompts", self.prompts), ("answers", self.answers), ("completions", self.completions)):
            if isinstance(texts, str):
                raise UserError(f"{name}={texts!r}: must be a list of {rows} texts, one an image, not one text")
            if len(texts) != rows and (name == "prompts" or len(texts) > 0):
                raise UserError(f"{name}: {len(texts)} texts for {rows} images: must be one an image")
        for name, values in self.columns.items():
            if isinstance(values, str) or len(values) != rows:
                raise UserError(f"columns: {name!r} has {len(values)} values for {rows} images: must be one an image")
        if isinstance(self.facts, str):
            raise UserError(f"facts={self.facts!r}: must be a list of texts, not one text")
        if self.facts and not 0 <= self.correct < len(self.facts):
            raise UserError(f"correct={self.correct}: must be an index into the {len(self.facts)} facts")
        if self.kind not in KINDS:
            raise UserError(f"kind={self.kind!r}: must be one of {', '.join(KINDS)}")

    def __len__(self) -> int:
        return self.images.shape[0]

    def row(self, index: int) -> RewardBatch:
        """The batch that holds one image alone."""
        return RewardBatch(
            images=self.images[index : index + 1],
            prompts=[self.prompts[index]],
            answers=[self.answers[index]] if self.answers else (),
            facts=self.facts,
            correct=self.correct,
            references=self.references,
            kind=self.kind,
            columns={name: [values[index]] for name, values in self.columns.items()},
            completions=self.completions[index : index + 1],
        )


# --- what scores ---------------------------------------------------------------------------------------------------


@runtime_checkable
class RewardModel(Protocol):
    """Anything that scores images. One method is all it needs; docs/rewards.md adds one in ten lines.

    What more it offers is used where it is there: `score_and_absent` (:class:`CountsAbsent`), `preview_scorer`
    (:class:`JudgesPreviews`), `face_embedding` (:class:`EmbedsFaces`), `to` and `bytes` (placement.py).
    """

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R], float, larger is better, best about 1. An image's score must not depend on other images.

        A value that is not finite leaves the step out (:class:`InvalidScore`); an exception ends the run.
        """
        ...


PreviewScorer = Callable[[Tensor, Tensor], Tensor]
"""``scorer(pixels [P, 3, H, W] in [-1, 1], prompt_index int64 [P]) -> scores [P]``: what DSOG asks in one rollout."""


class PreviewJudge(Protocol):
    """What DSOG is given: from the prompts of one rollout, in plain words, to the scorer of its early previews."""

    def __call__(self, prompts: Sequence[str], /) -> PreviewScorer: ...


FaceEmbedding = Callable[[Tensor], Tensor]
"""From reference images [M, 3, H, W] of a person to embeddings [F, D] of the faces in them, F ≤ M."""


@runtime_checkable
class JudgesPreviews(Protocol):
    """A reward model with a way of its own to judge previews; others are asked by `score` if they are registered so."""

    def preview_scorer(self, prompts: Sequence[str]) -> PreviewScorer: ...


@runtime_checkable
class EmbedsFaces(Protocol):
    """A reward model that knows faces; a person's concept tokens start from what it returns."""

    def face_embedding(self, pixels: Tensor) -> Tensor: ...


@runtime_checkable
class CountsAbsent(Protocol):
    """A reward model that can tell a bad image from one without anything to look at (FER: no face)."""

    def score_and_absent(self, batch: RewardBatch) -> tuple[Tensor, Tensor]:
        """(scores [R]; bool [R], true where there was nothing to look at and the score is therefore 0)."""
        ...


@runtime_checkable
class AsksColumns(Protocol):
    """A reward model that cannot score without some columns of a prompt list."""

    @property
    def columns(self) -> Sequence[str]:
        """Their names."""
        ...


# --- what a run is given -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InvalidScore:
    """A reward model gave numbers that are not finite. The step is left out and counted; nothing is made up instead."""

    reward: str
    """The reward model's name."""
    rows: tuple[int, ...]
    """The images it could not score, by their place in the batch."""
    value: float
    """The first such number: nan, inf or -inf."""
    prompt: str
    """The first such image's prompt."""

    def __str__(self) -> str:
        return (
            f"reward model {self.reward!r} scored image {self.rows[0]} (of {len(self.rows)} such) as {self.value}: "
            f"must be finite; prompt {self.prompt!r}"
        )


@dataclass
class EnsembleScore:
    """Rewards of one batch. Where :attr:`invalid` is not empty, `total` is NaN in the rows named there."""

    total: Tensor
    """[R], float32: the weighted sum."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """[R] by reward model, unweighted. Those of weight 0 for this kind are not asked and have no entry."""
    no_face: int = 0
    """Images in which a reward model found nothing to look at (FER: no face) and which it therefore scored 0."""
    invalid: tuple[InvalidScore, ...] = ()
    """Scores that are not finite, by reward model."""

    def require_finite(self) -> EnsembleScore:
        """This score, for callers that cannot leave a batch out. Raises UserError where a number is not finite."""
        if self.invalid:
            raise UserError(str(self.invalid[0]))
        return self


@runtime_checkable
class Rewards(Protocol):
    """Everything a run asks of its rewards: `Ensemble` here, `RemoteRewards` on other machines. `as_rewards` makes one.

    ``submit(batch)`` may return before the scores are there, so that the next group is generated meanwhile; ``score``
    is ``submit(batch).result()``.
    """

    @property
    def preview_scorer(self) -> PreviewJudge | None:
        """The judge of DSOG's previews; None where no reward model judges previews."""
        ...

    @property
    def face_embedding(self) -> FaceEmbedding | None:
        """Where a person's concept tokens start from; None where no reward model knows faces."""
        ...

    def score(self, batch: RewardBatch) -> EnsembleScore: ...

    def submit(self, batch: RewardBatch) -> Future[EnsembleScore]: ...

    def throughput(self) -> dict[str, float]:
        """Images a second by reward model, over everything scored so far."""
        ...


# --- what the reward models of the paper ask of their networks -------------------------------------------------------


@runtime_checkable
class TextEncoder(Protocol):
    """What TIER asks of its network (ERNIE 3.0 in the paper)."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, D] of any length; they are normalised by whoever asks."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """What DER asks of its network (DINOv2 in the paper). Patch features are to be reduced to one row an image."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, D] of pixels [B, 3, H, W] in [-1, 1]; resizing is the encoder's own business."""
        ...


@runtime_checkable
class ImageTextEncoder(TextEncoder, ImageEncoder, Protocol):
    """What BER asks of its network (BLIP-2 in the paper): images and texts in one space.

    An image may have several vectors, [B, Q, D]; the one nearest to the text counts.
    """


@runtime_checkable
class PatchEncoder(Protocol):
    """What DER asks of its network when patches are matched one by one."""

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """One vector a patch, [B, P, D], of pixels [B, 3, H, W] in [-1, 1]; P is the same for every image."""
        ...


@runtime_checkable
class Matcher(Protocol):
    """What BER asks of its network when images and texts are judged pair by pair."""

    def match(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Probabilities [B] that text b belongs to image b."""
        ...


class FaceEncoder(Protocol):
    """What FER asks of its networks (MTCNN and FaceNet in the paper)."""

    def encode_faces(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(a face was found, bool [B]; its embedding [B, D], anything where none was found)."""
        ...


@runtime_checkable
class Movable(Protocol):
    """What can be brought to another device: a network, or a reward model over one."""

    def to(self, device: Device, /) -> object: ...


@runtime_checkable
class Weighed(Protocol):
    """What can say how much memory its weights take."""

    @property
    def bytes(self) -> int: ...


N = TypeVar("N")


class WithNetwork(Generic[N]):
    """A reward model over one network, which an ensemble may move between devices."""

    def __init__(self, encoder: N):
        self._encoder = encoder

    def to(self, device: Device) -> None:
        """Move the network. What was computed before stays where it is."""
        if isinstance(self._encoder, Movable):
            self._encoder.to(device)

    @property
    def bytes(self) -> int:
        """Memory of the network's weights; 0 where it does not say."""
        if isinstance(self._encoder, torch.nn.Module):
            return sum(t.numel() * t.element_size() for t in self._encoder.parameters())
        return self._encoder.bytes if isinstance(self._encoder, Weighed) else 0


# --- checks that both sides rely on ----------------------------------------------------------------------------------


def plain_text(text: str, class_word: str) -> str:
    """`text` as someone would say it who does not know the concept: every run of `<tokens>` becomes the class word.

    ``plain_text("A photo of <token_0><token_1><bo>.", "dog")`` is ``"A photo of dog."``. Encoders that were never
    trained on the tokens can then read it, as the published evaluation does.
    """
    if not class_word.strip():
        raise UserError("class_word is empty: give the concept's class, e.g. 'dog' (field class of info.json)")
    return _TOKENS.sub(lambda _: class_word.strip(), text)


def check_pixels(pixels: Tensor, name: str, allow_none: bool = False) -> None:
    """Raise UserError unless `pixels` is a float [B, 3, H, W] in [-1, 1], NotFinite where a value is no number."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise UserError(f"{name}: {shape_of(pixels)}: must be a tensor [B, 3, H, W]")
    if not pixels.is_floating_point():
        raise UserError(f"{name}: {pixels.dtype}: must be float in [-1, 1] (for uint8: pixels / 127.5 - 1)")
    if pixels.numel() == 0:
        if allow_none or pixels.shape[0] == 0:
            return
        raise UserError(f"{name}: {tuple(pixels.shape)}: has no pixels")
    low, high = torch.aminmax(pixels)
    if not (low >= -1.001 and high <= 1.001):  # NaN fails both
        kind = UserError if bool(torch.isfinite(low) & torch.isfinite(high)) else NotFinite
        raise kind(f"{name}: values from {low.item():.4g} to {high.item():.4g}: must be finite and within [-1, 1]")


def shape_of(value: object) -> object:
    """What an error says of something that should be a tensor: its shape, or its type."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


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
        wanted = f"[{rows}, D] or [{rows}, Q, D]" if several else f"[{rows}, D]"
        raise UserError(f"{origin} returned {shape_of(embedding)} for {rows} inputs: must return a tensor {wanted}")
    return embedding
