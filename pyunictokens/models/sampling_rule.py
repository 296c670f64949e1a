"""How a model is sampled where the loops of masked models differ: schedule, temperature, guidance, default numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..utils.errors import UserError

TemperatureRule = Literal["product", "linear", "to_zero", "constant"]
Guidance = Literal["added", "interpolated"]


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
