"""What of a model and its learning lies on each rank, for every value of `grpo.shard`, and which of them fits.

Counted are weights, gradients and the optimizer's state, by the formulas of docs/distributed.md; nothing is run.
Activations take what is left. Adapters are so small beside the weights that they are left out.

Letters: W ranks; b bytes of a weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ...models import MaskedModel
from ...utils.errors import UserError

ROOM = 0.85
"""The part of a GPU's memory that may be full before activations."""
GB = 1e9
AHEAD = 3
"""Layers at hand where two are gathered ahead of the one that runs."""


@dataclass(frozen=True)
class Devices:
    """`ranks` GPUs of `memory` GB each."""

    ranks: int
    memory: float

    @classmethod
    def read(cls, text: str) -> Devices:
        """From words such as 8x80. Raises UserError."""
        found = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+(?:\.\d+)?)", text.strip())
        if found is None or int(found[1]) < 1 or float(found[2]) <= 0:
            raise UserError(f"--plan {text}: must be GPUs times GB of each, as in 8x80")
        return cls(int(found[1]), float(found[2]))


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights."""

    layers: int
    """In the transformer's layers that can be spread over ranks; 0 where none can."""
    largest: int
    """In the largest of these."""
    rest: int
    itemsize: int
    full: bool
    """Whether all weights learn; else adapters do."""

    @classmethod
    def of(cls, model: MaskedModel, trainable: str, dtype: torch.dtype) -> Sizes:
        each = [sum(value.numel() for value in layer.parameters()) for layer in model.shardable_layers() or ()]
        total = sum(value.numel() for value in model.parameters())
        return cls(sum(each), max(each, default=0), total - sum(each), dtype.itemsize, trainable == "full")

    def needed(self, shard: str, ranks: int) -> tuple[float, float]:
        """(update, rollout) bytes on each rank."""
        total, b, learn = self.layers + self.rest, self.itemsize, float(self.full)
        state = learn * (8 + (4 if b < 4 else 0))  # AdamW's moments, and float32 masters of smaller weights
        if shard != "full":
            state /= ranks if shard == "optimizer" else 1
            return (b + learn * (4 + b) + state) * total, (b + state) * total
        state *= total / ranks
        spread = (b + 4 * learn) * self.layers / ranks + b * self.largest
        update = spread + (b + learn * (4 + b)) * self.rest + state
        return update, b * total + b * self.layers / ranks + state

    def ahead(self, ranks: int) -> float:
        """Bytes on each rank in a rollout that gathers each layer as it runs, two ahead."""
        b, total = self.itemsize, self.layers + self.rest
        state = float(self.full) * (8 + (4 if b < 4 else 0)) * total / ranks
        return b * (self.layers / ranks + AHEAD * self.largest + self.rest) + state


def plan(sizes: Sizes, on: Devices) -> list[str]:
    """Lines that say what each mode needs on each GPU, and which to take."""
    room, lines, fits = ROOM * on.memory, [], []
    lines.append(f"{(sizes.layers + sizes.rest) / GB:.2f} billion weights, {on.ranks} GPUs of {on.memory:g} GB")
    for shard in ("none", "optimizer", "full"):
        if shard == "full" and not sizes.layers:
            lines.append("grpo.shard=full: not for this model, whose layers cannot be spread")
            continue
        update, rollout = (each / GB for each in sizes.needed(shard, on.ranks))
        good = max(update, rollout) <= room
        fits += [shard] * good
        lines.append(
            f"grpo.shard={shard}: {update:.1f} GB in the update, {rollout:.1f} GB in the rollout: "
            + (f"fits, {on.memory - max(update, rollout):.1f} GB for activations" if good else "does not fit")
        )
    if fits:
        lines.append(f"take grpo.shard={fits[0]}")
        if fits[0] == "full":
            lines.append("rollout: weights are gathered once a step, and no rank waits for another while it samples")
        return lines
    if sizes.layers and sizes.needed("full", on.ranks)[0] / GB <= room:
        lines.append(
            f"the update fits with grpo.shard=full, the weights gathered for the rollout do not; two layers ahead "
            f"would take {sizes.ahead(on.ranks) / GB:.1f} GB, but rollouts do not run so here (docs/distributed.md)"
        )
    lines.append("none fits: take more GPUs, GPUs with more memory, or trainable=lora")
    return lines
