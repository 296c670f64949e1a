"""What an update looked like: means over all its ratios, whatever microbatches, groups and ranks they were taken in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .. import ops


@dataclass
class UpdateStats:
    """What an update looked like, over all tokens that count."""

    loss: float = 0.0
    loss_answer: float = 0.0
    loss_image: float = 0.0
    kl: float = 0.0
    clip_fraction: float = 0.0
    ratio_max: float = 0.0
    ratio_mean: float = 0.0
    entropy: float | None = None
    """Of the image tokens' distributions, in nats; None for objectives whose ratios are not of tokens."""
    tokens: int = 0
    """Ratios: of tokens, timesteps or rollouts."""
    image_tokens: int = 0
    """Tokens whose entropy is known."""
    microbatches: int = 0
    """Microbatches of the image tokens' part."""
    packed_rows: int = 0
    """Packed (rollout, timestep) rows of its largest microbatch."""

    @classmethod
    def merged(cls, parts: Sequence[UpdateStats]) -> UpdateStats:
        """Those of an objective whose rows were taken in `parts`: losses add up, means are weighted by tokens."""
        tokens = sum(part.tokens for part in parts)
        drawn = sum(part.image_tokens for part in parts)

        def mean(name: str) -> float:
            return sum(getattr(part, name) * part.tokens for part in parts) / max(1, tokens)

        seen = [(part.entropy, part.image_tokens) for part in parts if part.entropy is not None]

        return cls(
            loss=sum(part.loss for part in parts),
            loss_answer=sum(part.loss_answer for part in parts),
            loss_image=sum(part.loss_image for part in parts),
            kl=mean("kl"),
            clip_fraction=mean("clip_fraction"),
            ratio_max=max((part.ratio_max for part in parts), default=0.0),
            ratio_mean=mean("ratio_mean"),
            entropy=sum(value * count for value, count in seen) / max(1, drawn) if seen else None,
            tokens=tokens,
            image_tokens=drawn,
            microbatches=sum(part.microbatches for part in parts),
            packed_rows=max((part.packed_rows for part in parts), default=0),
        )


@dataclass
class Tally:
    """Sums of statistics, kept on the device until the end."""

    weighted: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    ratio_max: list[Tensor] = field(default_factory=list)
    microbatches: int = 0
    packed_rows: int = 0

    def add(self, stats: ops.GrpoStats, count: Tensor) -> None:
        for name in ("kl", "clip_fraction", "ratio_mean", "entropy"):
            value = getattr(stats, name)
            if value is not None:
                self.weighted[name] = self.weighted.get(name, 0.0) + value.detach().float() * count
                self.counts[name] = self.counts.get(name, 0.0) + count
        self.ratio_max.append(stats.ratio_max.detach().float() * (count > 0))

    def mean(self, name: str) -> float:
        return float(self.weighted[name] / self.counts[name].clamp(min=1)) if name in self.weighted else 0.0
