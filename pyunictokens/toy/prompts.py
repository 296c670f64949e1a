"""Prompts of the toy world with room to improve: somebody wears something, and the model often gets it wrong.

Each row names what must be seen (`wear`, `wear_colour`, `pattern`). `metrics` read it off an image with the attribute
reader: they measure and must never be a reward. What rewards ask is the network of BER.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from . import grammar
from .networks import AttributeReader
from .scene import SLOTS, Attributes, random_scene

WANTED = ("wear", "wear_colour", "pattern")

Metric = Callable[..., Tensor]


def wearing(
    count: int, seed: int, *, without: frozenset[str] = frozenset()
) -> list[tuple[dict[str, object], Attributes]]:
    """`count` different prompts with their columns, and a scene that fits each; none of `without`."""
    rng, seen = np.random.default_rng([seed, 55]), set(without)
    rows: list[tuple[dict[str, object], Attributes]] = []
    while len(rows) < count:
        scene = random_scene(rng, bare=0.0 if rng.random() < 0.5 else 0.3)
        text = grammar.caption(scene, rng, full=True)
        if scene.wear == 0 or text in seen:
            continue
        seen.add(text)
        rows.append(({"prompt": text, **{slot: scene.word(slot) for slot in WANTED}}, scene))
    return rows


def reward(judge: AttributeReader) -> Metric:
    """The mean probability that the judge gives to what was asked for, in [0, 1]."""

    def wearing_right(images: Tensor, wear: list[str], wear_colour: list[str], pattern: list[str]) -> Tensor:
        with torch.no_grad():
            logits = judge(images)
        asked = dict(zip(WANTED, (wear, wear_colour, pattern), strict=True))
        given = []
        for slot, values in asked.items():
            index = torch.tensor([SLOTS[slot].index(value) for value in values], device=images.device)
            given.append(logits[slot].float().softmax(-1).gather(1, index[:, None])[:, 0])
        return torch.stack(given).mean(0)

    return wearing_right


def metrics(reader: AttributeReader) -> dict[str, Metric]:
    """What the reader says of images, as `reinforce` takes metrics."""

    def right(images: Tensor, columns: Sequence[Sequence[object]]) -> Tensor:
        read, slots = reader.read(images), list(SLOTS)
        seen = [
            [
                SLOTS[slot][int(read[row, slots.index(slot)])] == column[row]
                for slot, column in zip(WANTED, columns, strict=True)
            ]
            for row in range(len(images))
        ]
        return torch.tensor(seen, dtype=torch.float32)

    def share_right(images: Tensor, wear: list[str], wear_colour: list[str], pattern: list[str]) -> Tensor:
        return right(images, (wear, wear_colour, pattern)).mean(1)

    def wholly_right(images: Tensor, wear: list[str], wear_colour: list[str], pattern: list[str]) -> Tensor:
        return right(images, (wear, wear_colour, pattern)).amin(1)

    return {"wholly_right": wholly_right, "share_right": share_right}
