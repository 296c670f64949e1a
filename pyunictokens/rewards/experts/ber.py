"""BER, the BLIP evaluation reward (paper, equations 18 and 19): does the image show what the prompt says?

``BER = 1 − s`` with s the cosine *distance* of image and prompt, that is their cosine similarity, in [-1, 1]. It also
judges DSOG's previews. `Ber` has the formula and asks any image–text encoder; `Blip2` is the paper's: BLIP-2 with its
contrastive head, or by option the probability of its matching head. Knows no reference images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.weight_files import PROCESSOR, TOKENIZER, WEIGHTS, WeightFiles
from ...utils.errors import UserError
from ..base import (
    Device,
    ImageTextEncoder,
    Matcher,
    PreviewScorer,
    RewardBatch,
    WithNetwork,
    as_rows,
    check_pixels,
    cosine,
)
from ..cache import TextCache
from ..networks import ImageNetwork, NetworkConfig, from_transformers, read_tokenizer
from ..registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BerConfig(NetworkConfig):
    """BLIP-2."""

    head: str = "contrastive"
    """contrastive or matching; see :class:`Ber`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("head", "contrastive", "matching")


FILES = WeightFiles(
    "BLIP-2 with its retrieval heads",
    "Salesforce/blip2-itm-vit-g",
    (("config.json",), WEIGHTS, TOKENIZER, PROCESSOR),
    "MIT",
    gigabytes=4.69,
)


@register("ber", label="BER: the prompt", settings=BerConfig, files=FILES, judges_previews=True)
class Ber(WithNetwork[ImageTextEncoder | Matcher]):
    """Scores images against their prompts. Prompts are embedded once; give them in plain words (`plain_text`).

    head: "contrastive" compares vectors of image and prompt; "matching" asks the network about each pair, dearer and
    nearer to yes or no (the network must be a :class:`~pyunictokens.rewards.base.Matcher`).
    """

    name = "ber"

    def __init__(self, encoder: ImageTextEncoder | Matcher, head: str = "contrastive"):
        super().__init__(encoder)
        if head not in {"contrastive", "matching"}:
            raise UserError(f"head={head!r}: must be contrastive or matching")
        self.head = head
        if head == "matching" and not isinstance(encoder, Matcher):
            raise UserError(f"head={head!r}: a {type(encoder).__name__} has no match")
        if head == "contrastive" and not isinstance(encoder, ImageTextEncoder):
            raise UserError(f"head={head!r}: a {type(encoder).__name__} has no encode_text or no encode_image")
        self._texts = TextCache(encoder.encode_text) if isinstance(encoder, ImageTextEncoder) else None

    @classmethod
    def from_settings(cls, settings: BerConfig, device: Device) -> Ber:
        return cls(Blip2.located(settings, device), settings.head)

    @torch.no_grad()
    def similarity(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of pixels [B, 3, H, W] in [-1, 1] and B prompts: cosines, or the matching head's probabilities."""
        encoder = self._encoder
        if self.head == "matching":
            assert isinstance(encoder, Matcher)
            return encoder.match(pixels, prompts)
        assert isinstance(encoder, ImageTextEncoder) and self._texts is not None
        image = as_rows(encoder.encode_image(pixels), pixels.shape[0], "encode_image", several=True)
        text_BD = self._texts(prompts).to(image.device)
        if image.ndim == 2:
            return cosine(image, text_BD)
        return cosine(image, text_BD[:, None]).amax(dim=1)

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [-1, 1]."""
        return self.similarity(batch.images, batch.prompts)

    def preview_scorer(self, prompts: Sequence[str]) -> PreviewScorer:
        """The judge DSOG asks: ``scorer(pixels [P, 3, H, W], prompt_index [P]) -> [P]`` for this rollout's prompts."""
        prompts = list(prompts)

        def scorer(pixels: Tensor, prompt_index: Tensor) -> Tensor:
            pixels = pixels.clamp(-1.0, 1.0)  # a decoder overshoots a little
            check_pixels(pixels, "preview")
            chosen = [int(index) for index in prompt_index]
            if any(not 0 <= index < len(prompts) for index in chosen):
                raise UserError(f"prompt_index={chosen}: must be indices into the {len(prompts)} prompts")
            return self.similarity(pixels, [prompts[index] for index in chosen])

        return scorer


class Blip2(ImageNetwork):
    """BLIP-2's retrieval model (transformers' Blip2ForImageTextRetrieval): ViT, Q-Former and two heads.

    The library's forward pass runs image and text together; here they are run apart, with the same values, so that a
    prompt is read once and a group's images meet only what depends on them.
    """

    files: ClassVar[WeightFiles] = FILES

    _tokenizer: PreTrainedTokenizerBase

    def _build(self, folder: Path) -> tuple[nn.Module, ...]:
        net: Any = from_transformers("Blip2ForImageTextRetrieval", folder, self.dtype, kinds=("blip-2",))
        if not net.config.qformer_config.use_qformer_text_input:
            raise UserError(f"{folder}: its Q-Former reads no text: BER wants a retrieval checkpoint of BLIP-2")
        self._tokenizer = read_tokenizer(folder)
        self._read_processor(folder)
        return (net,)

    def _seen(self, pixels: Tensor) -> Tensor:
        """What the ViT sees, [B, patches + 1, D], in the Q-Former's dtype."""
        net = self._net
        patches = net.vision_model(pixel_values=self.prepare(pixels).to(self.dtype)).last_hidden_state
        return patches.to(net.query_tokens.dtype)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, Q, D]: one vector for each of the Q queries, L2-normalised, float32."""

        def encode(pixels: Tensor) -> Tensor:
            net, seen = self._net, self._seen(pixels)
            queries = net.query_tokens.expand(len(seen), -1, -1)
            found = net.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
            return F.normalize(_apply(net.vision_projection, found), dim=-1)

        return self.batched(encode, pixels)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """[B, D], L2-normalised, float32."""
        if not texts:
            raise UserError("no texts to encode: pass at least one")
        net, step, rows = self._net, self.config.batch, []
        for start in range(0, len(texts), step):
            ids, mask = self._read(texts[start : start + step])
            read = net.qformer(query_embeds=net.embeddings(input_ids=ids), query_length=0, attention_mask=mask)
            rows.append(F.normalize(_apply(net.text_projection, read.last_hidden_state[:, 0]), dim=-1))
        return torch.cat(rows)

    @torch.no_grad()
    def match(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Probabilities [B] of the matching head that text b belongs to image b, float32."""
        net, step, rows = self._net, self.config.batch, []
        for start in range(0, len(texts), step):
            seen = self._seen(pixels[start : start + step].to(self.device))
            ids, mask = self._read(texts[start : start + step])
            queries = net.query_tokens.expand(len(seen), -1, -1)
            mask = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)
            both = net.embeddings(input_ids=ids, query_embeds=queries)
            found = net.qformer(
                query_embeds=both, query_length=queries.shape[1], attention_mask=mask, encoder_hidden_states=seen
            ).last_hidden_state[:, : queries.shape[1]]
            rows.append(_apply(net.itm_head, found).mean(dim=1).softmax(dim=-1)[:, 1])
        return torch.cat(rows)

    def _read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids [B, L], mask [B, L]) of texts, the longer ones cut to the positions there are."""
        limit = self._net.config.qformer_config.max_position_embeddings
        ids = self._tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return ids["input_ids"].to(self.device), ids["attention_mask"].to(self.device)


def _apply(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The head's output in float32."""
    return head(hidden.to(head.weight.dtype)).float()
