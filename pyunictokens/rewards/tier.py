"""TIER, the text inference evaluation reward (paper, equations 14 to 17): did the answer choose the right fact?

Knows similarities of texts; does not know images, nor which network embeds the texts (ERNIE 3.0 in the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .base import RewardBatch, TextEncoder, cosine
from .cache import TextCache


def tier_score(similarity_RL: Tensor, correct: int) -> Tensor:
    """Scores [R] of answers whose similarity to each of the L facts is given, [R, L].

    ``d = ‖q − onehot(correct)‖₂``, ``TIER = (2 − d) / 2`` clamped to [0, 1]. With a single fact this is
    ``d = |1 − q|``, the reading for visual-instruct steps. The distance of many half-right similarities can pass 2,
    hence the clamp: the facts of a concept should differ from each other.
    """
    truth = torch.zeros_like(similarity_RL)
    truth[:, correct] = 1.0
    distance = (similarity_RL - truth).norm(dim=-1)
    return ((2.0 - distance) / 2.0).clamp(0.0, 1.0)


class Tier:
    """Scores answers against the concept's facts. The facts are embedded once; an empty answer scores 0."""

    name = "tier"

    def __init__(self, encoder: TextEncoder):
        self._texts = TextCache(encoder.encode_text)

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [0, 1], on the images' device."""
        if not batch.facts or not batch.answers:
            raise UserError(
                f"{len(batch.answers)} answers and {len(batch.facts)} facts: TIER needs both; or leave it out with "
                "weights={'tier': 0, ...}"
            )
        facts_LD = self._texts(batch.facts)
        answers_RD = self._texts(batch.answers)
        score = tier_score(cosine(answers_RD[:, None], facts_LD[None]), batch.correct).to(batch.images.device)
        empty = torch.tensor([not answer.strip() for answer in batch.answers], device=score.device)
        return torch.where(empty, 0.0, score)
