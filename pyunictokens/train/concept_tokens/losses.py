"""The two losses of the concept stages: answering with the right words, and predicting the masked codes of an image.

    understanding   cross-entropy of the answer's tokens and its end, nothing else of the sequence counts
    generation      rate = schedule(u), u uniform per image; max(1, round(N·rate)) positions masked; cross-entropy there

Source: Show-o's training objectives (Xie et al., 2024). Gradients reach only what learns; the images' prefixes come
from train/images.py, computed once.

Shape suffixes: B rows, L text positions, N image codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import MASK, ops
from ...models import AnsweringModel, MaskedModel, Prefix, TextTokenizer


@dataclass(frozen=True)
class TextRow:
    """One question with its answer, as ids."""

    question: list[int]
    """The question in the model's wording (`AnsweringModel.question_ids`)."""
    answer: list[int]
    """The answer and its end."""


def text_row(tokenizer: TextTokenizer, model: AnsweringModel, wrapped: str, answer: str) -> TextRow:
    """Ids of a question in its wording and of its answer; the space between "ASSISTANT:" and the answer belongs to the
    answer."""
    return TextRow(
        model.question_ids(tokenizer.encode(wrapped)),
        [*tokenizer.encode(" " + answer.strip()), model.end_id],
    )


def understanding_loss(
    model: AnsweringModel, prefixes: Prefix, rows: Sequence[TextRow], total: int | None = None
) -> Tensor:
    """Mean cross-entropy of all answer tokens; row b follows image prefix b. `total`: the number of answer tokens where
    these rows are a part of a batch."""
    length = max(len(row.question) + len(row.answer) for row in rows) - 1
    ids_BL = torch.zeros(len(rows), length, dtype=torch.int64)
    target_BL = torch.full((len(rows), length), -1)
    for place, row in enumerate(rows):
        text = [*row.question, *row.answer]
        ids_BL[place, : len(text) - 1] = torch.tensor(text[:-1])
        target_BL[place, len(row.question) - 1 : len(text) - 1] = torch.tensor(row.answer)
    ids_BL, target_BL = ids_BL.to(model.device), target_BL.to(model.device)
    hidden = model.text_hidden(ids_BL, prefixes, range(len(rows)))
    counted = target_BL >= 0
    logp = model.text_logprob(hidden[counted], target_BL[counted])
    return -logp.mean() if total is None else -logp.sum() / total


def random_mask(batch: int, count: int, schedule: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(which codes are masked, bool [B, N]: max(1, round(N·schedule(u))) random positions of each image; the timesteps
    u, float32 [B]), on the CPU."""
    draws = torch.rand(batch, generator=generator)
    wanted = torch.tensor([max(1, round(count * ops.mask_rate(schedule, u))) for u in draws.tolist()])
    order = torch.rand(batch, count, generator=generator).argsort(-1).argsort(-1)
    return order < wanted[:, None], draws


def generation_loss(
    model: MaskedModel,
    codes_BN: Tensor,
    mask_BN: Tensor,
    prompts: Sequence[Sequence[int]],
    timestep_B: Tensor,
    total: int | None = None,
) -> Tensor:
    """Mean cross-entropy of the masked codes; prompts are those of `MaskedModel.prompt_ids`, one a row, and mask and
    timesteps those of :func:`random_mask`. `total`: how many codes are masked where these rows are part of a batch."""
    mask_BN = mask_BN.to(model.device)
    shown = codes_BN.to(model.device).masked_fill(mask_BN, MASK)
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    of_row = [distinct.index(tuple(prompt)) for prompt in prompts]
    hidden = model.image_hidden(shown, model.prefill(distinct), of_row, timestep_B.to(model.device))
    weight, bias = model.image_head()
    logp = ops.selected_logprob(hidden[mask_BN], weight, codes_BN.to(model.device)[mask_BN], bias)
    return -logp.mean() if total is None else -logp.sum() / total
