"""The fast paths through the transformer: prompts computed once, then image or answer rows over them.

    prompts  →  prefill_t2i / prefill_mmu  →  PromptKV  →  ImageRows / text_hidden  →  hidden states for the heads

Everything here is differentiable and equals the plain path of ``Showo.forward`` row for row.

Shape suffixes: B rows, N image codes, L answer tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...utils.errors import UserError
from ...utils.fingerprint import bytes_of
from ..prefix import Prefix
from .attention import CausalAfterPrompt, DecodeAttention, FullAttention, PromptAttention, PromptKV, Recorded
from .buffers import BufferedAttention, buffers_serve
from .prompting import SpecialIds, mmu_clip_allowed

if TYPE_CHECKING:
    from .model import Showo


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
    for place, member in enumerate(member for members, _, _ in groups for member in members):
        order[member] = place
    total = reduce(PromptKV.__add__, [prompts for _, prompts, _ in groups])
    last = torch.cat([hidden for _, _, hidden in groups])
    return total.select(order), last[order]


def prefill_t2i(model: Showo, prompts: Sequence[Sequence[int]]) -> PromptKV:
    """Keys and values of unpadded image prompts (`prompting.t2i_text`), each at the positions it has in the padded
    sequence. Prompts of equal length are computed together; equal prompts once."""
    unique: dict[tuple[int, ...], int] = {}
    place = [unique.setdefault(tuple(prompt), len(unique)) for prompt in prompts]
    distinct, end = list(unique), model.max_text + 1
    groups = []
    for length, members in _by_length(distinct).items():
        if length > end:
            raise UserError(f"a prompt of {length} ids: at most max_text + 1 = {end}; cut it with prompting.t2i_text")
        ids = torch.tensor([distinct[i] for i in members], device=model.device)
        groups.append((members, *_prefill(model, model.embed(ids), end - length, FullAttention(causal=True))))
    return _merge(len(distinct), groups)[0].select(place)


class ImageRows:
    """Hidden states [B, N, D] at image codes int [B, N] (−1 unknown), row b over prompt `prompt_of_row[b]`.

    Only N + 2 rows are computed (soi, codes, eoi), and no mask is needed: they see their prompt and one another. All
    that needs the host is made here, so a call can be captured where rows of one prompt length stand together. Where
    one will be `called_again`, keys and values may lie in buffers that stay (buffers.py): after other prompts were
    copied into the tensors of `prompts`, say :meth:`refresh`.
    """

    def __init__(
        self, model: Showo, prompts: Prefix, prompt_of_row: Sequence[int], count: int, called_again: bool = False
    ):
        starts = {prompts.next_position[prompt] for prompt in prompt_of_row}
        if len(starts) != 1:
            raise UserError(f"prompts that end at positions {sorted(starts)}: prefill them with one max_text")
        start = starts.pop()
        check_room(model, count, start)
        ids, device = SpecialIds.of(model), model.device
        self._model, self._rows = model, len(prompt_of_row)
        self._attend: PromptAttention | BufferedAttention
        if called_again and buffers_serve(model.device, model.dtype, model.config.head_dim):
            self._attend = BufferedAttention(prompts, prompt_of_row, count + 2, model.config.head_dim)
        else:
            self._attend = PromptAttention(prompts, prompt_of_row)
        self._ends = torch.tensor([ids.soi, ids.eoi], device=device)
        self._positions = torch.arange(start, start + count + 2, device=device)

    def __call__(self, codes_BN: Tensor, timestep_B: Tensor | None = None) -> Tensor:
        model = self._model
        ends = model.embed(self._ends).expand(self._rows, 2, -1)
        x = torch.cat([ends[:, :1], model.embed_codes(codes_BN), ends[:, 1:]], dim=1)
        return model.encode(x, self._positions, self._attend, step=True)[:, 1:-1]

    def refresh(self) -> None:
        """Take what now lies in the prompts' tensors."""
        if isinstance(self._attend, BufferedAttention):
            self._attend.refresh()


def check_room(model: Showo, count: int, start: int) -> None:
    """Raises UserError where `count` codes after position `start` are more than the model has positions for."""
    limit = model.config.max_position_embeddings
    if start + count + 2 > limit:
        raise UserError(
            f"{count} codes after position {start}: this model has {limit} positions; "
            "use a smaller grid or a smaller max_text"
        )


def prefill_images(model: Showo, seen: Tensor) -> PromptKV:
    """Keys and values of what comes before any question: [mmu] [soi] codes [eoi] of images int [B, N], or of features
    float [B, patches, 1024] [mmu] system [soi] patches [eoi] (the CLIP-ViT variant)."""
    ids, seen = SpecialIds.of(model), seen.to(model.device)
    features = seen.is_floating_point()
    before = [ids.mmu, *(model.system_ids if features else ()), ids.soi]
    text = model.embed(torch.tensor([*before, ids.eoi], device=model.device)).expand(len(seen), -1, -1)
    middle = model.project_clip(seen) if features else model.embed_codes(seen)
    x = torch.cat([text[:, :-1], middle, text[:, -1:]], dim=1)
    if not features:
        return _prefill(model, x, 0, FullAttention())[0]
    allowed = mmu_clip_allowed(len(before) - 2, seen.shape[1], 0).to(model.device)
    return _prefill(model, x, 0, FullAttention(allowed))[0]


def prefill_mmu(model: Showo, seen: Tensor, questions: Sequence[Sequence[int]]) -> tuple[PromptKV, Tensor]:
    """Keys and values of understanding prefixes (what :func:`prefill_images` takes, and question ids, one question a
    row), and the hidden state [B, D] from which each answer's first token is drawn.

    An image never sees its question, so equal images are computed once and questions of equal length together.
    """
    if len(seen) != len(questions):
        raise UserError(f"{len(seen)} images and {len(questions)} questions: give one question for each image")
    place: dict[bytes, int] = {}
    image_of = [place.setdefault(key, len(place)) for key in map(bytes_of, seen)]
    first = torch.tensor([image_of.index(image) for image in range(len(place))], device=seen.device)
    images = prefill_images(model, seen[first])
    start, sequences = images.next_position[0], [model.question_ids(question) for question in questions]
    groups = []
    for length, members in _by_length(sequences).items():
        _check_end(model, start + length)
        which = [image_of[member] for member in members]
        attend = Recorded(CausalAfterPrompt(images, which))
        text = model.embed(torch.tensor([sequences[member] for member in members], device=model.device))
        hidden = model.encode(text, torch.arange(start, start + length, device=text.device), attend)
        groups.append((members, images.select(which).followed_by(attend.prompts(start + length)), hidden[:, -1]))
    return _merge(len(sequences), groups)


def text_hidden(model: Showo, ids_BL: Tensor, prompts: Prefix, prompt_of_row: Sequence[int]) -> Tensor:
    """Hidden states [B, L, D] at text ids int64 [B, L] right after the prompts, each seeing those before it."""
    x = model.embed(ids_BL)
    start = torch.tensor([prompts.next_position[prompt] for prompt in prompt_of_row], device=x.device)
    positions = start[:, None] + torch.arange(x.shape[1], device=x.device)
    return model.encode(x, positions, CausalAfterPrompt(prompts, prompt_of_row))


class Decoder:
    """Answers token by token over cached prompts, by `DecodeAttention`."""

    def __init__(self, model: Showo, prompts: Prefix, prompt_of_row: Sequence[int], max_new: int, sliced: bool):
        self._model = model
        self._attend = DecodeAttention(prompts, prompt_of_row, max_new, sliced)
        start = [prompts.next_position[prompt] for prompt in prompt_of_row]
        self._start = torch.tensor(start, dtype=torch.int64, device=model.device)

    def __call__(self, x_BD: Tensor, step: Tensor) -> Tensor:
        return self._model.encode(x_BD[:, None], (self._start + step)[:, None], self._attend)[:, 0]

    def advance(self, going: Tensor | int = 1) -> None:
        self._attend.advance(going)

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._attend.keep_rows(rows)
        self._start = self._start[torch.tensor(rows, device=self._start.device)]
