"""Prompts of the toy world with room to improve: long ones, of which the model often gets some part wrong.

Each row says in the column `asked` what must be seen, slot by slot. `metrics` read it off an image with the attribute
reader: they measure and must never be a reward. What rewards ask is the second reader, which was trained apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from . import grammar
from .networks import AttributeReader
from .scene import SLOTS, Attributes, random_scene

Metric = Callable[..., Tensor]
Asked = Mapping[str, str]


def dense_prompts(
    count: int, seed: int, *, without: frozenset[str] = frozenset()
) -> list[tuple[dict[str, object], Attributes]]:
    """`count` different prompts with their columns, and a scene that fits each; none of `without`. Somebody wears
    something in each, and all that the scene shows is said."""
    rng, seen = np.random.default_rng([seed, 55]), set(without)
    rows: list[tuple[dict[str, object], Attributes]] = []
    while len(rows) < count:
        scene = random_scene(rng, bare=0.0 if rng.random() < 0.5 else 0.3)
        text = grammar.caption(scene, rng, full=True)
        if scene.wear == 0 or text in seen:
            continue
        seen.add(text)
        rows.append(({"prompt": text, "asked": _said(scene)}, scene))
    return rows


def _said(scene: Attributes) -> dict[str, str]:
    """What a full caption of the scene says, slot by slot."""
    silent = {"hair"} if scene.kind != "human" else set()
    silent |= {"item", "item_colour"} if scene.item == 0 else set()
    return {slot: scene.word(slot) for slot in SLOTS if slot not in silent}


def reward(second: AttributeReader) -> Metric:
    """The probability that the second reader gives to all that was asked for, in [0, 1]."""

    def as_asked(images: Tensor, asked: Sequence[Asked]) -> Tensor:
        with torch.no_grad():
            given = {slot: logits.float().softmax(-1) for slot, logits in second(images).items()}
        each = [
            torch.stack([given[slot][row, SLOTS[slot].index(word)] for slot, word in wanted.items()]).prod()
            for row, wanted in enumerate(asked)
        ]
        return torch.stack(each)

    return as_asked


def metrics(reader: AttributeReader) -> dict[str, Metric]:
    """What the reader says of images, as `reinforce` takes metrics."""

    def right(images: Tensor, asked: Sequence[Asked]) -> list[list[bool]]:
        seen = reader.attributes(images)
        return [
            [words[slot] == word for slot, word in wanted.items()] for words, wanted in zip(seen, asked, strict=True)
        ]

    def share_right(images: Tensor, asked: Sequence[Asked]) -> Tensor:
        return torch.tensor([sum(each) / len(each) for each in right(images, asked)])

    def wholly_right(images: Tensor, asked: Sequence[Asked]) -> Tensor:
        return torch.tensor([float(all(each)) for each in right(images, asked)])

    return {"wholly_right": wholly_right, "share_right": share_right}
