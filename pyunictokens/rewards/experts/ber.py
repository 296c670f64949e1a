"""BER, the BLIP evaluation reward (paper, equations 18 and 19): does the drawing show what the prompt says?

``BER = 1 − s`` with s the cosine *distance* of image and prompt, that is their cosine similarity, in [-1, 1]. It also
judges DSOG's previews. `Ber` has the formula and asks any image–text encoder; `Blip2` is the paper's: BLIP-2 with its
contrastive head, or by option the probability of its matching head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.errors import UserError
from ..base import ImageTextEncoder, Matcher, RewardBatch, WithNetwork, as_rows, check_pixels, cosine
from ..cache import TextCache
from ..networks import ImageNetwork, NetworkConfig, from_transformers, read_tokenizer


class Ber(WithNetwork):
    """Scores drawings against their prompts. Prompts are embedded once; give them in plain words (`plain_text`).

    head: "contrastive" compares vectors of picture and prompt; "matching" asks the network about each pair, dearer and
    nearer to yes or no (the network must be a :class:`~pyunictokens.rewards.base.Matcher`).
    """

    name = "ber"

    def __init__(self, encoder: ImageTextEncoder | Matcher, head: str = "contrastive"):
        super().__init__(encoder)
        wanted = {"contrastive": ("encode_text", "encode_image"), "matching": ("match",)}
        if head not in wanted:
            raise UserError(f"head={head!r}: must be contrastive or matching")
        lacking = [name for name in wanted[head] if not callable(getattr(encoder, name, None))]
        if lacking:
            raise UserError(f"head={head!r}: a {type(encoder).__name__} has no {' and no '.join(lacking)}")
        self.head = head
        self._texts = TextCache(lambda texts: self._encoder.encode_text(texts))

    @torch.no_grad()
    def similarity(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of pixels [B, 3, H, W] in [-1, 1] and B prompts: cosines, or the matching head's probabilities."""
        if self.head == "matching":
            return self._encoder.match(pixels, prompts)
        image = as_rows(self._encoder.encode_image(pixels), pixels.shape[0], "encode_image", several=True)
        text_BD = self._texts(prompts).to(image.device)
        if image.ndim == 2:
            return cosine(image, text_BD)
        return cosine(image, text_BD[:, None]).amax(dim=1)

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [-1, 1]."""
        return self.similarity(batch.images, batch.prompts)

    def preview_scorer(self, prompts: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
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


@dataclass(frozen=True)
class BerConfig(NetworkConfig):
    """BLIP-2."""

    head: str = "contrastive"
    """contrastive or matching; see :class:`Ber`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("head", "contrastive", "matching")


class Blip2(ImageNetwork):
    """BLIP-2's retrieval model (transformers' Blip2ForImageTextRetrieval): ViT, Q-Former and two heads.

    The library's forward pass runs picture and text together; here they are run apart, with the same values, so that a
    prompt is read once and a group's pictures meet only what depends on them.
    """

    expert = "ber"

    def __init__(self, config: BerConfig, device: str | torch.device = "cpu"):
        super().__init__(config, device)
        self._tokenizer: Any = None

    def _build(self, folder: Path) -> tuple[nn.Module, ...]:
        net: Any = from_transformers("Blip2ForImageTextRetrieval", folder, self.dtype, kinds=("blip-2",))
        if not net.config.qformer_config.use_qformer_text_input:
            raise UserError(f"{folder}: its Q-Former reads no text: BER wants a retrieval checkpoint of BLIP-2")
        self._tokenizer = read_tokenizer(folder)
        self._read_processor(folder)
        return (net,)

    def _net(self) -> Any:
        return self.load()[0]

    def _seen(self, pixels: Tensor) -> Tensor:
        """What the ViT sees, [B, patches + 1, D], in the Q-Former's dtype."""
        net = self._net()
        patches = net.vision_model(pixel_values=self.prepare(pixels).to(self.dtype)).last_hidden_state
        return patches.to(net.query_tokens.dtype)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, Q, D]: one vector for each of the Q queries, L2-normalised, float32."""

        def encode(pixels: Tensor) -> Tensor:
            net, seen = self._net(), self._seen(pixels)
            queries = net.query_tokens.expand(len(seen), -1, -1)
            found = net.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
            return F.normalize(_apply(net.vision_projection, found), dim=-1)

        return self.batched(encode, pixels)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """[B, D], L2-normalised, float32."""
        if not texts:
            raise UserError("no texts to encode: pass at least one")
        net, step, rows = self._net(), self.config.batch, []
        for start in range(0, len(texts), step):
            ids, mask = self._read(texts[start : start + step])
            read = net.qformer(query_embeds=net.embeddings(input_ids=ids), query_length=0, attention_mask=mask)
            rows.append(F.normalize(_apply(net.text_projection, read.last_hidden_state[:, 0]), dim=-1))
        return torch.cat(rows)

    @torch.no_grad()
    def match(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Probabilities [B] of the matching head that text b belongs to picture b, float32."""
        net, step, rows = self._net(), self.config.batch, []
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
        limit = self._net().config.qformer_config.max_position_embeddings
        ids = self._tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return ids["input_ids"].to(self.device), ids["attention_mask"].to(self.device)


def _apply(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The head's output in float32."""
    return head(hidden.to(head.weight.dtype)).float()
