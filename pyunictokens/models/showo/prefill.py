"""The fast paths through the transformer: prompts computed once, then image or answer rows over them.

    prompts  →  prefill_t2i / prefill_mmu  →  PromptKV  →  image_hidden / answer_hidden  →  hidden states for the heads

Everything here is differentiable and equals the plain path of ``Showo.forward`` row for row.

Shape suffixes: B rows, N image codes, L answer tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...utils.errors import UserError
from .attention import CausalAfterPrompt, FullAttention, PromptAttention, PromptKV, Recorded
from .model import Showo
from .prompting import SpecialIds, mmu_clip_allowed


def _prefill(model: Showo, x_BLD: Tensor, start: int, rule: FullAttention) -> tuple[PromptKV, Tensor]:
    length = x_BLD.shape[1]
    _check_end(model, start + length)
    attend = Recorded(rule)
    hidden = model.encode(x_BLD, torch.arange(start, start + length, device=x_BLD.device), attend)
    return attend.prompts(start + length), hidden[:, -1]


def _check_end(model: Showo, end: int) -> None:
    limit = model.config.max_position_embeddings
    if end > limit:
        raise UserError(f"a prompt that ends at position {end}: this model has {limit}")


def _by_length(sequences: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(len(sequence), []).append(index)
    return groups


def _merge(count: int, groups: list[tuple[list[int], PromptKV, Tensor]]) -> tuple[PromptKV, Tensor]:
    order = [0] * count
    total, offset = PromptKV([], [], []), 0
    for members, prompts, _ in groups:
        for place, member in enumerate(members):
            order[member] = offset + place
        offset += len(members)
        total = total + prompts
    last = torch.cat([hidden for _, _, hidden in groups])
    return total.select(order), last[order]


def prefill_t2i(model: Showo, prompts: Sequence[Sequence[int]], max_text: int) -> PromptKV:
    """Keys and values of unpadded drawing prompts (`prompting.t2i_text`), each at the positions it has in the padded
    sequence. Prompts of equal length are computed together; equal prompts once."""
    unique: dict[tuple[int, ...], int] = {}
    place = [unique.setdefault(tuple(prompt), len(unique)) for prompt in prompts]
    distinct = list(unique)
    groups = []
    for length, members in _by_length(distinct).items():
        if length > max_text + 1:
            raise UserError(
                f"a prompt of {length} ids: at most max_text + 1 = {max_text + 1}; cut it with prompting.t2i_text"
            )
        ids = torch.tensor([distinct[i] for i in members], device=model.device)
        groups.append((members, *_prefill(model, model.embed(ids), max_text + 1 - length, FullAttention(causal=True))))
    return _merge(len(distinct), groups)[0].select(place)


def image_hidden(model: Showo, codes_BN: Tensor, prompts: PromptKV, prompt_of_row: Sequence[int]) -> Tensor:
    """Hidden states [B, N, D] at the image codes int [B, N] (−1 unknown), row b over prompt `prompt_of_row[b]`.

    Only N + 2 rows are computed (soi, codes, eoi), and no mask is needed: they see their prompt and one another.
    """
    ids = SpecialIds.of(model)
    count, total = codes_BN.shape[1], codes_BN.shape[0]
    ends = model.embed(torch.tensor([ids.soi, ids.eoi], device=codes_BN.device)).expand(total, 2, -1)
    x = torch.cat([ends[:, :1], model.embed_codes(codes_BN), ends[:, 1:]], dim=1)
    starts = {prompts.next_position[prompt] for prompt in prompt_of_row}
    if len(starts) != 1:
        raise UserError(f"prompts that end at positions {sorted(starts)}: prefill them with one max_text")
    start = starts.pop()
    if start + count + 2 > model.config.max_position_embeddings:
        raise UserError(
            f"{count} codes after position {start}: this model has {model.config.max_position_embeddings} positions; "
            "use a smaller grid or a smaller max_text"
        )
    positions = torch.arange(start, start + count + 2, device=codes_BN.device)
    return model.encode(x, positions, PromptAttention(prompts, prompt_of_row))[:, 1:-1]


def prefill_mmu(model: Showo, codes_BN: Tensor, questions: Sequence[Sequence[int]]) -> tuple[PromptKV, Tensor]:
    """Keys and values of understanding prefixes (image codes [B, N] and question ids, one question a row), and the
    hidden state [B, D] from which each answer's first token is drawn.

    An image never sees its question, so equal images are computed once and questions of equal length together.
    """
    ids = SpecialIds.of(model)
    if len(codes_BN) != len(questions):
        raise UserError(f"{len(codes_BN)} images and {len(questions)} questions: give one question for each image")
    place: dict[tuple[int, ...], int] = {}
    image_of = [place.setdefault(tuple(codes), len(place)) for codes in codes_BN.tolist()]
    first = torch.tensor([image_of.index(image) for image in range(len(place))], device=codes_BN.device)
    ends = model.embed(torch.tensor([ids.mmu, ids.soi, ids.eoi], device=model.device)).expand(len(place), -1, -1)
    x = torch.cat([ends[:, :2], model.embed_codes(codes_BN[first].to(model.device)), ends[:, 2:]], dim=1)
    images, _ = _prefill(model, x, 0, FullAttention())
    start = images.next_position[0]
    sequences = [[ids.sot, *question] if list(question[:1]) != [ids.sot] else list(question) for question in questions]
    groups = []
    for length, members in _by_length(sequences).items():
        _check_end(model, start + length)
        which = [image_of[member] for member in members]
        attend = Recorded(CausalAfterPrompt(images, which))
        text = model.embed(torch.tensor([sequences[member] for member in members], device=model.device))
        hidden = model.encode(text, torch.arange(start, start + length, device=text.device), attend)
        groups.append((members, images.select(which).followed_by(attend.prompts(start + length)), hidden[:, -1]))
    return _merge(len(sequences), groups)


def prefill_mmu_clip(
    model: Showo, features: Tensor, system_ids: Sequence[int], question_ids: Sequence[int]
) -> tuple[PromptKV, Tensor]:
    """The CLIP-ViT variant's prefix for features [B, patches, 1024]: [mmu] system [soi] patches [eoi] question."""
    ids = SpecialIds.of(model)
    batch = features.shape[0]
    before = model.embed(torch.tensor([ids.mmu, *system_ids, ids.soi], device=model.device)).expand(batch, -1, -1)
    after = model.embed(torch.tensor([ids.eoi, *question_ids], device=model.device)).expand(batch, -1, -1)
    x = torch.cat([before, model.project_clip(features), after], dim=1)
    allowed = mmu_clip_allowed(len(system_ids), features.shape[1], len(question_ids)).to(model.device)
    return _prefill(model, x, 0, FullAttention(allowed))


def answer_hidden(
    model: Showo, tokens_BL: Tensor, prompts: PromptKV, last_hidden: Tensor, prompt_of_row: Sequence[int]
) -> Tensor:
    """Hidden states [B, L, D] that predict answer tokens int64 [B, L] (any id past an answer's end is ignored by the
    caller's mask): the prompt's last state for token 0, then the state at each token for the next."""
    first = last_hidden[torch.as_tensor(list(prompt_of_row), device=last_hidden.device)][:, None]
    if tokens_BL.shape[1] == 1:
        return first
    x = model.embed(tokens_BL[:, :-1].clamp(min=0))
    start = torch.tensor([prompts.next_position[prompt] for prompt in prompt_of_row], device=x.device)
    positions = start[:, None] + torch.arange(x.shape[1], device=x.device)
    return torch.cat([first, model.encode(x, positions, CausalAfterPrompt(prompts, prompt_of_row))], dim=1)
