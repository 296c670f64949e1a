"""How a model is sampled where the loops of masked models differ: schedule, temperature, guidance, default numbers.

`SamplingRule` is of images, `BlockRule` of text that is unmasked block after block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..utils.errors import UserError

TemperatureRule = Literal["product", "linear", "to_zero", "constant"]
Guidance = Literal["added", "interpolated"]
Remasking = Literal["least_sure", "most_sure"]


@dataclass(frozen=True)
class SamplingRule:
    """How a model is sampled: what its authors' loop does where loops differ, and the numbers they use by default."""

    schedule: str = "cosine"
    """Part of the codes that is still masked after each step (`ops.mask_schedule`)."""
    temperature_rule: TemperatureRule = "product"
    """Of the re-masking noise after step t of T: "product" multiplies by 1 − (t+1)/T at every step anew, "linear" takes
    that factor of the start, "to_zero" goes evenly from the start at the first step to 0 at the last, "constant" leaves
    it."""
    guidance: Guidance = "added"
    """What `guidance_scale` means: "added" is s in c + s·(c − u), off at 0; "interpolated" is g in u + g·(c − u), off
    at 1."""
    steps: int = 50
    guidance_scale: float = 5.0
    temperature: float = 1.0
    remasking: Remasking = "least_sure"
    """Which codes are masked again: the "least_sure", by log-probability + temperature·Gumbel, or the "most_sure", by
    probability / temperature + Gumbel (Lumina-DiMOO's loop, whose noise outweighs the probabilities)."""

    def temperatures(self, temperature: float, steps: int) -> list[float]:
        """The temperature of the re-masking noise of each of `steps` steps."""
        left = [1.0 - (step + 1) / steps for step in range(steps)]
        if self.temperature_rule == "constant":
            return [temperature] * steps
        if self.temperature_rule == "to_zero":
            return [temperature * (1.0 - step / max(1, steps - 1)) for step in range(steps)]
        if self.temperature_rule == "linear":
            return [temperature * part for part in left]
        of_step = []
        for part in left:
            temperature *= part
            of_step.append(temperature)
        return of_step

    def strength(self, guidance_scale: float) -> float:
        """s in (1 + s)·c − s·u, as `ops` takes it; 0 turns guidance off. Raises UserError for a scale below that."""
        off = 0.0 if self.guidance == "added" else 1.0
        number = isinstance(guidance_scale, (int, float)) and not isinstance(guidance_scale, bool)
        if not number or not math.isfinite(guidance_scale) or guidance_scale < off:
            raise UserError(
                f"guidance_scale={guidance_scale!r}: must be a finite number ≥ {off:g} ({off:g} turns guidance off)"
            )
        return float(guidance_scale) - off


@dataclass(frozen=True)
class BlockRule:
    """How text is unmasked: the blocks in their order, of each block the likeliest tokens first, and as many in each of
    its steps (Nie et al., 2025: semi-autoregressive, low-confidence re-masking, linear counts)."""

    length: int = 128
    """Tokens of a text by default."""
    block: int = 32
    """Tokens of a block."""
    steps: int = 64
    """Steps of a text of `length` tokens."""
    temperature: float = 0.0
    """Of the tokens: 0 takes the likeliest, 1 draws from the model's own distribution."""

    def plan(self, length: int | None, block: int | None, steps: int | None) -> tuple[int, int, int]:
        """(length, block, steps) with defaults put in: the longest block up to the usual one that divides the length,
        and steps in proportion to the length, at least one a block. Raises UserError where given blocks do not divide
        the length, or the number of blocks the steps."""
        length = self.length if length is None else length
        if block is None:
            block = next(size for size in range(min(self.block, length), 0, -1) if length % size == 0)
        if length % block:
            raise UserError(f"max_new_tokens={length}: must be a multiple of block_length={block}")
        count = length // block
        if steps is None:
            steps = count * max(1, min(block, round(self.steps * block / self.length)))
        if steps % count or steps > length:
            raise UserError(
                f"steps={steps}: must be a multiple of the {count} blocks and at most max_new_tokens={length}: a block "
                f"of {block} tokens takes 1 to {block} steps"
            )
        return length, block, steps

    @staticmethod
    def unknown_after(block: int, steps: int) -> list[int]:
        """How many of a block's tokens are unknown after each of its steps."""
        known, counts = 0, []
        for step in range(steps):
            known += block // steps + (step < block % steps)
            counts.append(block - known)
        return counts
