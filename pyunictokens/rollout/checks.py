"""What a caller of the engine may give, brought to one form or refused: prompts, known codes, grids, ids, numbers.

Every refusal is a `UserError` that names the value, the limit and the way out. It does not run anything.

Letters: P prompts, R rows (P × samples), N image codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .. import MASK, ops
from ..models import AnsweringModel, ImageTokenizer, MaskedModel, TextTokenizer
from ..utils.errors import UserError
from ..utils.memory import refuse_beyond_free

Texts = str | Iterable[str | Sequence[int] | Tensor]
"""Texts or lists of ids; a bare string is a list of one."""
Item = TypeVar("Item", bound=Hashable)

MAX_SAMPLE_ID = 2**63 - 1
MAX_DSOG_ID = 2**32 - 1
MAX_STEPS = 65536


def number(name: str, value: object, hint: str) -> float:
    """A finite float ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise UserError(f"{name}={value!r}: must be a finite number ≥ 0 ({hint})")
    return float(value)


def count(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """An integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limit = f"≥ {least}" if most is None else f"in {least}…{most}"
        raise UserError(f"{name}={value!r}: must be an integer {limit}")
    return value


def schedule(name: str) -> str:
    """A schedule that `ops.mask_schedule` knows."""
    ops.mask_schedule(name, 0, 1)
    return name


def token_lists(
    name: str,
    texts: Texts,
    tokenizer: TextTokenizer | None,
    model: MaskedModel,
    wrap: Callable[[str], str] | None = None,
    first: int = 0,
) -> list[list[int]]:
    """Strings (put through `wrap`, then tokenized) or lists of ids, as lists of ids. A bare string is a list of one.

    `first` is the number of the first text, for messages.
    """
    if isinstance(texts, str):
        texts = [texts]
    texts = list(texts)
    if not texts:
        raise UserError(f"{name}=[]: give at least one")
    known = model.num_text_ids
    lists = []
    for place, text in enumerate(texts, first):
        if isinstance(text, str):
            if tokenizer is None:
                raise UserError(f"{name}[{place}] is text: give RolloutEngine a tokenizer, or pass ids")
            ids = tokenizer.encode(wrap(text) if wrap else text)
        else:
            if isinstance(text, (int, float)) or (torch.is_tensor(text) and text.ndim != 1):
                raise UserError(f"{name}[{place}] is no text and no list of ids: give a list of prompts, not one's ids")
            ids = [int(i) for i in text]
        wrong = [i for i in ids if not 0 <= i < known]
        if wrong:
            raise UserError(
                f"{name}[{place}] has the id {wrong[0]}: text ids of this model are 0…{known - 1}"
                + ("; attach the concept before using its tokens" if isinstance(text, str) else "")
            )
        lists.append(ids)
    return lists


def sample_ids(given: Iterable[int] | Tensor | None, rows: int, most: int = MAX_SAMPLE_ID) -> list[int]:
    """R ids, by default 0…R−1. Equal ids are allowed: they draw the same noise."""
    ids = list(range(rows)) if given is None else [int(i) for i in given]
    if len(ids) != rows:
        raise UserError(f"{len(ids)} sample_ids for {rows} rows: give one for each prompt and sample, prompt-major")
    wrong = [i for i in ids if not 0 <= i <= most]
    if wrong:
        raise UserError(f"sample_ids hold {wrong[0]}: must be in 0…{most}")
    return ids


def known_codes(
    given: Tensor | None,
    grid: tuple[int, int] | None,
    prompts: int,
    samples: int,
    model: MaskedModel,
    room: Callable[[int], None] = lambda codes: None,
) -> tuple[Tensor, tuple[int, int]]:
    """(codes int64 [R, N] on the model's device, −1 unknown; grid). Codes come as [N], [1, N], [P, N] or [R, N].

    `room` is called with N before anything is allocated, and may refuse.
    """
    rows = prompts * samples
    if grid is not None:
        if len(grid) != 2:
            raise UserError(f"grid={grid!r}: must be (height, width) in codes")
        grid = (count("grid height", grid[0]), count("grid width", grid[1]))
    if given is None:
        grid = grid or model.grid
        room(grid[0] * grid[1])
        return torch.full((rows, grid[0] * grid[1]), MASK, device=model.device), grid
    codes = torch.as_tensor(given)
    if codes.is_floating_point() or codes.dtype == torch.bool or codes.ndim not in (1, 2) or codes.numel() == 0:
        raise UserError(
            f"known_codes of shape {tuple(codes.shape)}, {str(codes.dtype).removeprefix('torch.')}: must be integers "
            f"[N], [{prompts}, N] or [{rows}, N], {MASK} where unknown"
        )
    codes = codes.long() if codes.ndim == 2 else codes.long()[None]
    if codes.shape[0] not in (1, prompts, rows):
        raise UserError(
            f"known_codes with {codes.shape[0]} rows: must be 1, {prompts} (one a prompt) or {rows} (one a sample)"
        )
    if int(codes.min()) < MASK or int(codes.max()) >= model.codebook_size:
        raise UserError(
            f"known_codes reach from {int(codes.min())} to {int(codes.max())}: must lie in "
            f"0…{model.codebook_size - 1}, or be {MASK} where unknown"
        )
    grid = grid or _square(codes.shape[1])
    if grid[0] * grid[1] != codes.shape[1]:
        raise UserError(f"grid={grid}: holds {grid[0] * grid[1]} codes, known_codes has {codes.shape[1]}")
    room(codes.shape[1])
    if codes.shape[0] != rows:
        codes = codes.expand(prompts, -1).repeat_interleave(samples, 0)
    return codes.to(model.device, copy=True), grid


def _square(codes: int) -> tuple[int, int]:
    side = math.isqrt(codes)
    if side * side != codes:
        raise UserError(f"{codes} codes are no square: pass grid=(height, width)")
    return side, side


def looks(given: Tensor, model: MaskedModel, vq: ImageTokenizer | None) -> Tensor:
    """Pixels float [B, 3, H, W], codes int [B, N] or, where a model takes them, features float [B, patches, E] as what
    questions are asked about (`models.base.looked_at`): codes int64 [B, N] or features, on the model's device."""
    given = torch.as_tensor(given)
    if not (given.is_floating_point() and isinstance(model, AnsweringModel) and model.takes_features):
        return images(given, model, vq)
    _check_pixels(given)
    return given.to(model.device) if given.ndim == 3 else model.encoder.features(given).to(model.device)


def images(given: Tensor, model: MaskedModel, vq: ImageTokenizer | None) -> Tensor:
    """Pixels float [B, 3, H, W] or codes int [B, N] as codes int64 [B, N] on the model's device."""
    given = torch.as_tensor(given)
    _check_pixels(given)
    if given.is_floating_point():
        if vq is None:
            raise UserError("images are pixels: give RolloutEngine an image tokenizer to read them, or pass codes")
        return vq.encode(given.to(next(vq.parameters()).device)).to(model.device)
    if given.ndim != 2 or given.dtype == torch.bool:
        raise UserError(f"images of shape {tuple(given.shape)}: must be pixels float [B, 3, H, W] or codes int [B, N]")
    if int(given.min()) < 0 or int(given.max()) >= model.codebook_size:
        raise UserError(
            f"image codes reach from {int(given.min())} to {int(given.max())}: must lie in "
            f"0…{model.codebook_size - 1} (−1 is an unknown code: generate it first)"
        )
    return given.long().to(model.device)


def _check_pixels(given: Tensor) -> None:
    if given.numel() == 0:
        raise UserError(f"images of shape {tuple(given.shape)}: give at least one")
    if given.is_floating_point() and not bool(torch.isfinite(given).all()):
        raise UserError("images hold NaN or infinite pixels: must be finite, in [−1, 1]")


def image_room(rows: int, codes: int, steps: int, record: bool, side: int, device: torch.device) -> None:
    """Raise UserError where the results of `rows` images alone are more than the memory that is free; `side` is that of
    a code in pixels, 0 where none are wanted."""
    numbers = 3 * 8 + (steps * 8 if record else 0) + side * side * 3 * 4
    refuse_beyond_free(f"{rows} images of {codes} codes in {steps} steps", rows * codes * numbers, device)


def text_room(rows: int, tokens: int, model: MaskedModel) -> None:
    """Raise UserError where the keys, values and tokens of `rows` answers are more than the memory that is free."""
    costs = model.costs
    row = tokens * (2 * costs.layers * costs.width * costs.itemsize + 3 * 8)
    refuse_beyond_free(f"{rows} answers of up to {tokens} tokens", rows * row, model.device)


def unique_index(items: Sequence[Item]) -> tuple[list[int], list[int]]:
    """(first place of each distinct item, number of its distinct item for each item)."""
    seen: dict[Item, int] = {}
    index = [seen.setdefault(item, len(seen)) for item in items]
    first = [index.index(number) for number in range(len(seen))]
    return first, index
