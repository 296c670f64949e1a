"""Measures of answers, one small function each, with their formulas: BLEU as the field computes it, exact and forgiving
equality, yes and no, the option an answer picks; and the share of attributes that an image shows right.

Measures that need a network are in clip.py and scoring.py. BLEU needs sacrebleu.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ..utils.errors import UserError, needs

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

PUBLISHED_WEIGHTS = (0.7, 0.3)
"""Weights of single characters and pairs in the published evaluation's BLEU."""

_ALMOST_NONE = 0.1  # what stands in for a count of zero (smoothing method 1 of Chen & Cherry, 2014)
_HELPERS = re.compile(r"<token_\d+>")
_ARTICLES = frozenset({"a", "an", "the"})
_WORD = re.compile(r"[^\W_]+")
_SEGMENT = re.compile(r"[,.;:!?]+(?:\s|$)")
_LETTER = re.compile(r"^\W*\(?([A-H])(?:[.):]|\W*$)")


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
def _ngrams(longest: int) -> BLEU:
    with needs("evaluate"):
        from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="none", max_ngram_order=longest, smooth_method="none", effective_order=True)


@lru_cache
def _sentence_bleu() -> BLEU:
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


def nearest(answer: str, facts: Sequence[str]) -> int:
    """Index of the fact the answer is most like, by :func:`character_bleu` of the fact; the first of equals."""
    if not facts:
        raise UserError("no facts to choose from")
    scores = [character_bleu(fact.casefold(), answer.casefold()) for fact in facts]
    return scores.index(max(scores))


def picked(answer: str, options: Sequence[str]) -> str | None:
    """The option an answer names, by its letter (``B``, ``(B)``, ``B. grey``) or by its words; None where it names none
    or several."""
    letter = _LETTER.match(answer)
    if letter and ord(letter[1]) - ord("A") < len(options):
        return options[ord(letter[1]) - ord("A")]
    said = f" {normalise(answer)} "
    named = [option for option in options if f" {normalise(option)} " in said]
    whole = [option for option in named if not any(option != other and option in other for other in named)]
    return whole[0] if len(whole) == 1 else None


def segments(prompt: str) -> list[str]:
    """The parts of a prompt between punctuation marks, never none."""
    return [part.strip() for part in _SEGMENT.split(prompt) if part.strip()] or [prompt]


def attribute_accuracy(seen: Mapping[str, str], wanted: Mapping[str, str]) -> float:
    """Share of the wanted slots that were seen with the wanted word. Slots that only say "none" are not counted when
    wanted: every image without the thing would have them right."""
    asked = {slot: word for slot, word in wanted.items() if word != "none"}
    if not asked:
        raise UserError(f"no attribute is wanted in {dict(wanted)}: accuracy is not defined")
    return sum(seen.get(slot) == word for slot, word in asked.items()) / len(asked)
