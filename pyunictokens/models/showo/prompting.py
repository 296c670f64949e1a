"""Sequences and masks, as published: what the model reads to generate (t2i) and to answer (mmu).

    t2i   [pad…][<|t2i|>][sot] text [eot]  [<|soi|>] N codes [<|eoi|>]      left-padded to max_text + 1, then the image
    mmu   [<|mmu|>][<|soi|>] N codes [<|eoi|>][sot] text                    no padding on the left

Also the wrapping of a question. What is asked and drawn is worded in data/wording.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...utils.errors import UserError

if TYPE_CHECKING:
    from .model import Showo
    from .sizes import ShowoConfig

SPECIAL_TOKENS = (
    "[PAD]",
    "<|soi|>",
    "<|eoi|>",
    "<|sov|>",
    "<|eov|>",
    "<|t2i|>",
    "<|mmu|>",
    "<|t2v|>",
    "<|v2v|>",
    "<|lvg|>",
)
"""Token strings of the special ids, in the order of their ids."""


@dataclass(frozen=True)
class SpecialIds:
    """The special ids in their published order after the text ids, with sot/eot, the first code and the mask."""

    pad: int
    soi: int
    eoi: int
    sov: int
    eov: int
    t2i: int
    mmu: int
    t2v: int
    v2v: int
    lvg: int
    sot: int
    eot: int
    first_code: int
    mask: int

    @classmethod
    def from_config(cls, config: ShowoConfig, num_new: int = 0) -> SpecialIds:
        """Ids of a model of this configuration with `num_new` concept rows attached."""
        first = config.llm_vocab_size
        names = ("pad", "soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")
        return cls(
            **{name: first + place for place, name in enumerate(names)},
            sot=config.bos_token_id,
            eot=config.eos_token_id,
            first_code=first + len(SPECIAL_TOKENS) + num_new,
            mask=config.vocab_size - 1 + num_new,
        )

    @classmethod
    def of(cls, model: Showo) -> SpecialIds:
        """Ids of this model as it is now, an attached concept counted."""
        return cls.from_config(model.config, model.num_new)


def t2i_text(text_ids: Sequence[int], ids: SpecialIds, max_text: int) -> list[int]:
    """The unpadded text part of an image sequence: [t2i][sot] text [eot], at most max_text + 1 ids.

    Too long a text keeps its first `max_text` ids, task and sot included, and is closed with eot.
    """
    if max_text < 3:
        raise UserError(f"max_text={max_text}: must be ≥ 3 to hold the task token, sot and eot")
    text = list(text_ids)
    if not text or text[0] != ids.sot:
        text = [ids.sot, *text]
    sequence = [ids.t2i, *text, ids.eot]
    return sequence if len(sequence) <= max_text + 1 else [*sequence[:max_text], ids.eot]


def t2i(
    text_ids: Sequence[int],
    codes: Tensor | Sequence[int] | None,
    ids: SpecialIds,
    max_text: int,
    num_codes: int | None = None,
) -> Tensor:
    """One image sequence, int64 [max_text + 1 + N + 2]. `codes` [N] with −1 where unknown; None means all of
    `num_codes` unknown."""
    if codes is None:
        if num_codes is None:
            raise UserError("give codes, or num_codes for an image that is all unknown")
        codes = torch.full((num_codes,), -1)
    codes = torch.as_tensor(codes, dtype=torch.long).cpu()
    text = t2i_text(text_ids, ids, max_text)
    image = torch.where(codes < 0, ids.mask, codes + ids.first_code).tolist()
    padding = [ids.pad] * (max_text + 1 - len(text))
    return torch.tensor([*padding, *text, ids.soi, *image, ids.eoi])


def mmu_prefix(codes: Tensor | Sequence[int], question_ids: Sequence[int], ids: SpecialIds) -> list[int]:
    """An understanding sequence up to where the answer begins."""
    image = [int(code) + ids.first_code for code in codes]
    question = list(question_ids)
    if not question or question[0] != ids.sot:
        question = [ids.sot, *question]
    return [ids.mmu, ids.soi, *image, ids.eoi, *question]


def mmu(
    codes: Tensor | Sequence[int],
    question_ids: Sequence[int],
    ids: SpecialIds,
    answer_ids: Sequence[int] | None = None,
) -> Tensor:
    """One understanding sequence, int64 [L]; with `answer_ids` the answer and its eot follow the question."""
    answer = [] if answer_ids is None else [*answer_ids, ids.eot]
    return torch.tensor([*mmu_prefix(codes, question_ids, ids), *answer])


def attention_allowed(input_ids: Tensor, kind: str, ids: SpecialIds) -> Tensor:
    """Boolean masks [B, L, L] (row may look at column) for sequences int64 [B, L] of `kind` "t2i" or "mmu".

    t2i: text is causal and blind to the image and to padding; soi…eoi see everything but padding. Padding rows see
    earlier padding only, so that no row is empty. mmu: columns up to eoi are open to all, the rest is causal.
    """
    length = input_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
    if kind == "mmu":
        eoi = (input_ids == ids.eoi).int().argmax(dim=1)
        opened = torch.arange(length, device=input_ids.device) <= eoi[:, None]
        return causal | opened[:, None, :]
    if kind != "t2i":
        raise UserError(f"kind={kind!r}: must be 't2i' or 'mmu'")
    pad = input_ids == ids.pad
    image = ((input_ids == ids.soi).cumsum(1) > 0) & (
        (input_ids == ids.eoi).cumsum(1) - (input_ids == ids.eoi).int() < 1
    )
    seen = torch.where(image[:, :, None], True, causal) & ~pad[:, None, :]
    return torch.where(pad[:, :, None], causal & pad[:, None, :], seen)


def mmu_clip_allowed(system: int, patches: int, question: int) -> Tensor:
    """Mask bool [1, L, L] of the CLIP-ViT variant: [mmu] system [soi] patches [eoi] question; causal, patches open."""
    length = 1 + system + 1 + patches + 1 + question
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[:, 1 + system + 1 : 1 + system + patches] = True  # the published mask leaves the last patch causal
    return allowed[None]


def chat_question(question: str) -> str:
    """The published wrapping of a question."""
    return f"USER: \n{question} ASSISTANT:"


def published_question(question: str) -> str:
    """The wrapping that UniCTokens trains its tokens with: as :func:`chat_question`, without the line break."""
    return f"USER: {question} ASSISTANT:"
