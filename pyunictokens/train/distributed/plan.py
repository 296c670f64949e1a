"""What of a model and its learning lies on each rank, for every way to share it out, and which of them fits.

Counted are weights, gradients and the optimizer's state, by the formulas of docs/distributed.md; nothing is run.
Activations take what is left. Adapters are so small beside the weights that they are left out.

Letters: W ranks; b bytes of a weight.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import torch

from ...config.training import GrpoConfig
from ...models import MaskedModel
from ...utils.errors import UserError
from .ranks import Ranks

log = logging.getLogger(__name__)

ROOM = 0.85
"""The part of a GPU's memory that may be full before activations."""
GB = 1e9
AHEAD = 2
"""Layers whose weights are on their way while one runs, where a rollout gathers each as it runs."""


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
class Mode:
    """What ranks share out, by the settings of the same names."""

    shard: str
    offload: bool = False
    ahead: bool = False
    """Rollouts gather each layer as it runs; else all are gathered once."""

    def __str__(self) -> str:
        words = [f"grpo.shard={self.shard}"]
        words += ["grpo.rollout_gather=ahead"] * self.ahead + ["grpo.offload=true"] * self.offload
        return " ".join(words)


MODES = (
    Mode("none"),
    Mode("optimizer"),
    Mode("full"),
    Mode("full", offload=True),
    Mode("full", ahead=True),
    Mode("full", offload=True, ahead=True),
)
"""Those that take less time first."""


@dataclass(frozen=True)
class Needed:
    """Bytes on each rank: of its GPU in the update and in the rollout, and of the host's memory."""

    update: float
    rollout: float
    host: float = 0.0

    @property
    def most(self) -> float:
        """Of the GPU."""
        return max(self.update, self.rollout)


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
    averaged: bool = False
    """Whether an average of the weights is kept (`grpo.ema_decay`)."""

    @classmethod
    def of(cls, model: MaskedModel, config: GrpoConfig, dtype: torch.dtype) -> Sizes:
        each = [sum(value.numel() for value in layer.parameters()) for layer in model.shardable_layers() or ()]
        total = sum(value.numel() for value in model.parameters())
        full, averaged = config.trainable == "full", config.ema_decay > 0
        return cls(sum(each), max(each, default=0), total - sum(each), dtype.itemsize, full, averaged)

    def needed(self, mode: Mode, ranks: int) -> Needed:
        """What lies on each of `ranks` ranks."""
        total, b, learn = self.layers + self.rest, self.itemsize, float(self.full)
        # AdamW's moments, float32 masters of smaller weights, and their average
        state = learn * (8 + (4 if b < 4 else 0) + (4 if self.averaged else 0))
        if mode.shard != "full":
            state *= total / (ranks if mode.shard == "optimizer" else 1)
            return Needed((b + learn * (4 + b)) * total + state, b * total + state)
        parts = self.layers / ranks
        kept = b * parts + state * total / ranks
        gradients = 4 * learn * parts
        host = 0.0
        if mode.offload:
            host = (b + 4 * learn + state) * parts
            kept, gradients = state * self.rest / ranks, 0.0
        update = kept + gradients + b * self.largest + (b + learn * (4 + b)) * self.rest
        whole = b * ((1 + AHEAD) * self.largest + self.rest) if mode.ahead else b * total
        return Needed(update, kept + whole, host)


def plan(sizes: Sizes, on: Devices) -> list[str]:
    """Lines that say what each mode needs on each GPU, and which to take."""
    room, fits = ROOM * on.memory, []
    lines = [f"{(sizes.layers + sizes.rest) / GB:.2f} billion weights, {on.ranks} GPUs of {on.memory:g} GB"]
    for mode in MODES if sizes.layers and on.ranks > 1 else MODES[:2]:
        needed = sizes.needed(mode, on.ranks)
        good = needed.most / GB <= room
        fits += [mode] * good
        host = f", {needed.host / GB:.1f} GB of the host's memory" if mode.offload else ""
        lines.append(
            f"{mode}: {needed.update / GB:.1f} GB in the update, {needed.rollout / GB:.1f} GB in the rollout{host}: "
            + (f"fits, {on.memory - needed.most / GB:.1f} GB for activations" if good else "does not fit")
        )
    if not sizes.layers:
        lines.append("grpo.shard=full: not for this model, whose layers cannot be spread")
    elif on.ranks == 1:
        lines.append("grpo.shard=full: not on one GPU, which has no others to share with")
    if not fits:
        return [*lines, "none fits: take more GPUs, GPUs with more memory, or trainable=lora"]
    lines.append(f"take {fits[0]}")
    if fits[0].shard == "full":
        lines.append(
            "rollout: each layer is gathered as it runs, the next two on their way; ranks sample in step"
            if fits[0].ahead
            else "rollout: weights are gathered once a step, and no rank waits for another while it samples"
        )
    return lines


def gathers_ahead(model: MaskedModel, config: GrpoConfig, ranks: Ranks) -> bool:
    """Whether rollouts with `grpo.shard=full` gather each layer as it runs: as the settings say, or because all weights
    at once do not fit the GPU of some rank."""
    if config.rollout_gather != "auto" or ranks.device.type != "cuda":
        return config.rollout_gather == "ahead"
    needed = Sizes.of(model, config, model.dtype).needed(Mode("full", config.offload), ranks.world)
    ahead = ranks.any(needed.rollout > ROOM * torch.cuda.get_device_properties(ranks.device).total_memory)
    if ahead and ranks.first:
        log.info("rollouts gather each layer as it runs: all weights at once would take %.1f GB", needed.rollout / GB)
    return ahead
