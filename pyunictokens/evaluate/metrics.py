"""Measures of answers and drawings, one small function each, with their formulas.

Answers: BLEU as the field computes it, exact and forgiving equality, yes and no. Drawings: CLIP-I and CLIP-T from any
image–text encoder, and, where truth is known, the share of attributes drawn right. The networks are handed in; this
module knows no model, no folder and no training. BLEU needs sacrebleu; the rest needs torch alone.

Letters: S drawings, M photos, H and W pixels.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.errors import UserError, needs

PUBLISHED_WEIGHTS = (0.7, 0.3)
"""Weights of single characters and pairs in the published evaluation's BLEU."""

_ALMOST_NONE = 0.1  # what stands in for a count of zero (smoothing method 1 of Chen & Cherry, 2014)
_HELPERS = re.compile(r"<token_\d+>")
_ARTICLES = frozenset({"a", "an", "the"})
_WORD = re.compile(r"[^\W_]+")
_SEGMENT = re.compile(r"[,.;:!?]+(?:\s|$)")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


class ImageTextNet(Protocol):
    """What CLIP scores ask of a network: pictures and texts in one space."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, D] of pixels [B, 3, H, W] in [-1, 1]."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, D]."""
        ...


class AttributeNet(Protocol):
    """What attribute accuracy asks of a network that reads images of a world whose truth is known."""

    def attributes(self, pixels: Tensor) -> list[dict[str, str]]:
        """What is seen in each image [B, 3, H, W], as words by slot."""
        ...


# --- answers -------------------------------------------------------------------------------------------------------


def clean(answer: str) -> str:
    """An answer without the concept's helper tokens, with single spaces: what a reader would see."""
    return " ".join(_HELPERS.sub("", answer).split())


def character_bleu(reference: str, candidate: str, weights: Sequence[float] = PUBLISHED_WEIGHTS) -> float:
    """BLEU over characters, as the published evaluation of UniCTokens computes it, in [0, 1].

    ``BP · exp(Σ wₙ log pₙ)`` with pₙ the share of the candidate's n-grams of characters (spaces and case count) found
    in the reference, each as often as there at most; an n-gram count of 0 beyond single characters becomes 0.1, no
    common character at all gives 0; ``BP = exp(1 − r/c)`` when the candidate (length c) is shorter than the reference
    (length r).
    """
    if not reference or not candidate:
        return 0.0
    # One number per character: spaces become tokens like any other, which sacrebleu's own character tokenizer drops.
    as_numbers = [" ".join(str(ord(character)) for character in text) for text in (candidate, reference)]
    found = _ngrams(len(weights)).sentence_score(as_numbers[0], [as_numbers[1]])
    if found.counts[0] == 0:
        return 0.0
    log_precision = 0.0
    for weight, hits, total in zip(weights, found.counts, found.totals, strict=True):
        log_precision += weight * math.log((hits or _ALMOST_NONE) / max(total, 1))
    brevity = min(0.0, 1.0 - len(reference) / len(candidate))
    return math.exp(brevity + log_precision)


def word_bleu(reference: str, candidate: str) -> float:
    """sacrebleu's sentence BLEU (13a words, up to 4-grams, exponential smoothing, effective order), in [0, 1]."""
    return float(_sentence_bleu().sentence_score(candidate, [reference]).score) / 100.0


@lru_cache
def _ngrams(longest: int) -> Any:
    with needs("evaluate"):
        from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="none", max_ngram_order=longest, smooth_method="none", effective_order=True)


@lru_cache
def _sentence_bleu() -> Any:
    with needs("evaluate"):
        from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)


def exact(reference: str, candidate: str) -> float:
    """1 where both are the same text, else 0."""
    return float(reference == candidate)


def same_answer(reference: str, candidate: str) -> float:
    """1 where both say the same words in the same order, else 0; case, punctuation and articles do not count."""
    return float(normalise(reference) == normalise(candidate))


def normalise(text: str) -> str:
    """Lower-case words without punctuation and articles, single spaces between; `<name>` keeps its brackets."""
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(
        " " if character in string.punctuation.replace("<", "").replace(">", "") else character for character in text
    )
    return " ".join(word for word in kept.split() if word not in _ARTICLES)


def says_yes(answer: str) -> bool | None:
    """True or False by the first of the words yes and no in the answer; None where neither is said."""
    for word in _WORD.findall(answer.casefold()):
        if word in ("yes", "no"):
            return word == "yes"
    return None


def recognition_weight(positives: Sequence[bool | float], negatives: Sequence[bool | float]) -> float:
    """0.5 · share right on pictures of the concept + 0.5 · share right on others: saying yes always is worth 0.5."""
    if not positives or not negatives:
        raise UserError(f"recognition weight of {len(positives)} positives and {len(negatives)} negatives: needs both")
    return 0.5 * sum(positives) / len(positives) + 0.5 * sum(negatives) / len(negatives)


def nearest(answer: str, facts: Sequence[str]) -> int:
    """Index of the fact the answer is most like, by :func:`character_bleu` of the fact; the first of equals."""
    if not facts:
        raise UserError("no facts to choose from")
    scores = [character_bleu(fact.casefold(), answer.casefold()) for fact in facts]
    return scores.index(max(scores))


# --- drawings ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_i(net: ImageTextNet, drawings: Tensor, photos: Tensor) -> list[float]:
    """CLIP-I of each drawing: its mean cosine similarity to the photos [M, 3, H, W]."""
    if photos.shape[0] == 0:
        raise UserError("CLIP-I needs at least one photo to compare with")
    a_SD, b_MD = (F.normalize(net.encode_image(pixels).float(), dim=-1) for pixels in (drawings, photos))
    return (a_SD @ b_MD.T).mean(dim=1).tolist()


@torch.no_grad()
def clip_t(net: ImageTextNet, drawings: Tensor, prompt: str) -> list[float]:
    """CLIP-T of each drawing: its cosine similarity to the prompt. Put names into plain words first."""
    return _similarity(net, drawings, [prompt])[:, 0].tolist()


@torch.no_grad()
def clip_t_segments(net: ImageTextNet, drawings: Tensor, prompt: str) -> list[float]:
    """Mean of CLIP-T over the parts of a dense prompt between punctuation marks.

    The paper lets GPT-4o judge each part; here the image–text encoder does.
    """
    return _similarity(net, drawings, segments(prompt)).mean(dim=1).tolist()


def segments(prompt: str) -> list[str]:
    """The parts of a prompt between punctuation marks, never none."""
    return [part.strip() for part in _SEGMENT.split(prompt) if part.strip()] or [prompt]


def _similarity(net: ImageTextNet, drawings: Tensor, texts: Sequence[str]) -> Tensor:
    image_SD = F.normalize(net.encode_image(drawings).float(), dim=-1)
    text_TD = F.normalize(net.encode_text(texts).float(), dim=-1)
    return image_SD @ text_TD.to(image_SD.device).T


def attribute_accuracy(seen: Mapping[str, str], wanted: Mapping[str, str]) -> float:
    """Share of the wanted slots that were seen with the wanted word. Slots that only say "none" are not counted when
    wanted: every drawing without the thing would have them right."""
    asked = {slot: word for slot, word in wanted.items() if word != "none"}
    if not asked:
        raise UserError(f"no attribute is wanted in {dict(wanted)}: accuracy is not defined")
    return sum(seen.get(slot) == word for slot, word in asked.items()) / len(asked)
