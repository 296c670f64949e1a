"""TIER, the text inference evaluation reward (paper, equations 14 to 17): did the answer choose the right fact?

`Tier` has the formula and asks any text encoder; `SentenceEncoder` is the paper's: ERNIE 3.0, or whatever sentence
encoder transformers can load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...models.weight_files import TOKENIZER, WEIGHTS, WeightFiles
from ...utils.errors import UserError
from ..base import Device, RewardBatch, TextEncoder, WithNetwork, cosine
from ..cache import TextCache
from ..networks import Network, NetworkConfig, from_transformers, read_tokenizer
from ..registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


@dataclass(frozen=True)
class TierConfig(NetworkConfig):
    """The sentence encoder."""

    pooling: str = "mean"
    """mean: over the tokens of a text; cls: the first token's vector."""
    max_tokens: int = 512
    """Longer texts keep their beginning; never more than the network has positions for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("pooling", "mean", "cls")
        if self.max_tokens < 3:
            raise UserError(f"max_tokens={self.max_tokens}: must be at least 3 (two tokens frame every text)")


FILES = WeightFiles(
    "ERNIE 3.0 (any sentence encoder of transformers)",
    "nghuyong/ernie-3.0-base-zh",
    (("config.json",), WEIGHTS, TOKENIZER),
    "none stated on its card; ERNIE 3.0 itself is Apache-2.0",
    gigabytes=0.47,
)


@register("tier", label="TIER: the answer", settings=TierConfig, files=FILES)
class Tier(WithNetwork[TextEncoder]):
    """Scores answers against the concept's facts. The facts are embedded once; an empty answer scores 0."""

    name = "tier"

    def __init__(self, encoder: TextEncoder):
        super().__init__(encoder)
        self._texts = TextCache(encoder.encode_text)

    @classmethod
    def from_settings(cls, settings: TierConfig, device: Device) -> Tier:
        return cls(SentenceEncoder.located(settings, device))

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


class SentenceEncoder(Network):
    """Texts to vectors by an encoder of transformers: ERNIE 3.0 in the paper, or BERT, RoBERTa, a sentence transformer.

    The last layer's vectors are averaged over the text's tokens, padding left out, or the first one is taken. A pooling
    head of the checkpoint is not used.
    """

    files: ClassVar[WeightFiles] = FILES
    config: TierConfig
    _tokenizer: PreTrainedTokenizerBase

    def _build(self, folder: Path) -> tuple[nn.Module, ...]:
        net: Any = from_transformers("AutoModel", folder, self.dtype, unused=("pooler.",))
        if getattr(net.config, "is_encoder_decoder", False):
            raise UserError(f"{folder}: holds an encoder-decoder ({net.config.model_type}): TIER wants an encoder")
        self._tokenizer = read_tokenizer(folder)
        return (net,)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, D], float32, on the network's device; not normalised."""
        if not texts:
            raise UserError("no texts to encode: pass at least one")
        step = self.config.batch
        return torch.cat([self._embed(texts[start : start + step]) for start in range(0, len(texts), step)])

    def _embed(self, texts: Sequence[str]) -> Tensor:
        net = self._net
        places = getattr(net.config, "max_position_embeddings", self.config.max_tokens)
        limit = min(self.config.max_tokens, places - (2 if net.config.model_type in _SHIFTED else 0))
        ids = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(self.device)
        hidden_BLD = net(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state.float()
        if self.config.pooling == "cls":
            return hidden_BLD[:, 0]
        here_BL1 = ids["attention_mask"][:, :, None].float()
        return (hidden_BLD * here_BL1).sum(1) / here_BL1.sum(1).clamp(min=1.0)


_SHIFTED = {"roberta", "xlm-roberta", "camembert", "mpnet"}
"""Kinds of models whose position table begins with two rows that no token uses."""
