"""The two losses of the concept stages: answering with the right words, and predicting the masked codes of a picture.

    understanding   cross-entropy of the answer's tokens and its end, nothing else of the sequence counts
    generation      rate = schedule(u), u uniform per image; max(1, round(N·rate)) positions masked; cross-entropy there

Source: Show-o's training objectives. Gradients reach only what learns; the pictures' keys and values come from
train/images.py, computed once.

Shape suffixes: B rows, L text positions, N image codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import MASK, ops
from ...models import PromptKV, Showo, TextTokenizer, image_hidden, prefill_t2i
from ...models.showo import prompting
from ...models.showo.attention import CausalAfterPrompt
from ...models.showo.prompting import SpecialIds
from ..logprobs import text_logprob


@dataclass(frozen=True)
class TextRow:
    """One question with its answer, as ids."""

    question: list[int]
    """sot and the question in its published wording."""
    answer: list[int]
    """The answer and eot."""


def text_row(tokenizer: TextTokenizer, ids: SpecialIds, question: str, answer: str) -> TextRow:
    """Ids of a question and its answer; the space between "ASSISTANT:" and the answer belongs to the answer."""
    return TextRow(
        [ids.sot, *tokenizer.encode(prompting.chat_question(question))],
        [*tokenizer.encode(" " + answer.strip()), ids.eot],
    )


def understanding_loss(model: Showo, prefixes: PromptKV, rows: Sequence[TextRow]) -> Tensor:
    """Mean cross-entropy of all answer tokens; row b follows picture prefix b."""
    length = max(len(row.question) + len(row.answer) for row in rows) - 1
    ids_BL = torch.zeros(len(rows), length, dtype=torch.int64)
    target_BL = torch.full((len(rows), length), -1)
    for place, row in enumerate(rows):
        text = [*row.question, *row.answer]
        ids_BL[place, : len(text) - 1] = torch.tensor(text[:-1])
        target_BL[place, len(row.question) - 1 : len(text) - 1] = torch.tensor(row.answer)
    ids_BL, target_BL = ids_BL.to(model.device), target_BL.to(model.device)
    start = torch.tensor(prefixes.next_position, device=model.device)
    positions = start[:, None] + torch.arange(length, device=model.device)
    hidden = model.encode(model.embed(ids_BL), positions, CausalAfterPrompt(prefixes, range(len(rows))))
    counted = target_BL >= 0
    return -text_logprob(model, hidden[counted], target_BL[counted]).mean()


def random_mask(codes_BN: Tensor, schedule: str, generator: torch.Generator) -> Tensor:
    """Which codes are masked, bool [B, N] on the CPU: max(1, round(N·schedule(u))) random positions of each image."""
    batch, count = codes_BN.shape
    draws = torch.rand(batch, generator=generator).tolist()
    wanted = torch.tensor([max(1, round(count * ops.mask_rate(schedule, u))) for u in draws])
    order = torch.rand(batch, count, generator=generator).argsort(-1).argsort(-1)
    return order < wanted[:, None]


def generation_loss(
    model: Showo, codes_BN: Tensor, mask_BN: Tensor, prompts: Sequence[Sequence[int]], max_text: int
) -> Tensor:
    """Mean cross-entropy of the masked codes; prompts are unpadded drawing prompts, one a row."""
    mask_BN = mask_BN.to(model.device)
    shown = codes_BN.to(model.device).masked_fill(mask_BN, MASK)
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    of_row = [distinct.index(tuple(prompt)) for prompt in prompts]
    hidden = image_hidden(model, shown, prefill_t2i(model, distinct, max_text), of_row)
    weight, bias = model.image_head()
    return -ops.selected_logprob(hidden[mask_BN], weight, codes_BN.to(model.device)[mask_BN], bias).mean()
