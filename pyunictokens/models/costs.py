"""Operations and bytes: what a phase costs, what any model costs at a guess, and what the image decoder costs.

A multiply and an add count as two operations; only matrix products and convolutions count, as
`torch.utils.flop_counter` counts them. Nothing is run and no machine is known. A model that knows its own numbers
overrides :class:`ModelCosts` (showo/costs.py).

Letters: P prompt positions, N image codes, D width, K codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .magvit import MagvitConfig


@dataclass(frozen=True)
class Cost:
    """What one phase costs. Costs add up; ``3 * cost`` is three times the same."""

    dense: float = 0.0
    """Operations of products with weights."""
    attention: float = 0.0
    """Operations of attention's products; kernels reach another part of the peak there."""
    head: float = 0.0
    """Operations of heads; in the rollout they run in float32."""
    bytes: float = 0.0
    launches: float = 0.0

    @property
    def flops(self) -> float:
        """All operations."""
        return self.dense + self.attention + self.head

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(getattr(self, f.name) * times for f in fields(self)))

    __rmul__ = __mul__


class ModelCosts:
    """A guess for any transformer: two operations a parameter and position, and of memory 17 numbers of the width a
    position and layer (Korthikanti et al., 2022, attention left to a fused kernel).

    The guess is for profiles and for the first size of an update's microbatches, which are then measured.
    """

    def __init__(self, parameters: int, layers: int, width: int, codebook: int, count: int, itemsize: int):
        self.parameters, self.layers, self.width = parameters, layers, width
        self.codebook, self.count, self.itemsize = codebook, count, itemsize

    def _forward(self, positions: float) -> Cost:
        return Cost(dense=2.0 * self.parameters * positions)

    def prefill(self, tokens: int) -> Cost:
        """One prompt of `tokens` positions."""
        return self._forward(tokens)

    def image_step(self, rows: int, prompt: int, count: int, guided: bool) -> Cost:
        """One step of `rows` images of `count` codes over prompts of `prompt` positions."""
        return self._forward(rows * count * (2 if guided else 1))

    def answers(self, context: int, lengths: Sequence[int]) -> Cost:
        """Answers of the given `lengths` to one question after a context of `context` positions."""
        return self._forward(context + sum(lengths))

    def reference(self, rows: int, timesteps: int, prompt: int, count: int, guided: bool) -> Cost:
        """Log-probs of all image tokens of `rows` rollouts without a graph."""
        return timesteps * self.image_step(rows, prompt, count, guided)

    def update(self, rows: int, timesteps: int, prompt: int, count: int, guided: bool, trainable: str) -> Cost:
        """Forward and backward over all image tokens of `rows` rollouts; `trainable` is full, lora or concept."""
        return (3 if trainable == "full" else 2) * self.reference(rows, timesteps, prompt, count, guided)

    def step_bytes(self, count: int) -> int:
        """Memory of one row of a step without a graph."""
        return count * 20 * self.width * self.itemsize

    def scoring_bytes(self, prompt: int, count: int, guided: bool) -> float:
        """Memory of one packed row (a rollout at a timestep) whose log-probs are taken without a graph."""
        return (2 if guided else 1) * (40 * self.itemsize + 12) * count * self.width

    def activation_bytes(
        self, prompt: int, count: int, guided: bool, trainable: str, checkpointed_layers: int = 0
    ) -> float:
        """What one packed row keeps between forward and backward."""
        kept = 17 * (self.layers - checkpointed_layers) + checkpointed_layers + (17 if checkpointed_layers else 0)
        return (2 if guided else 1) * (kept * self.itemsize + 12) * count * self.width


def decode_pixels(config: MagvitConfig, rows: int, grid: tuple[int, int], itemsize: int = 4) -> Cost:
    """Codes of `rows` images of `grid` (height, width) codes to pixels: the convolutions of the decoder."""
    level, total, moved = len(config.decoder_ch_mult) - 1, 0.0, 0.0
    height, width = grid
    positions = float(rows * height * width)

    def convolution(ins: int, outs: int, kernel: int) -> None:
        nonlocal total, moved
        total += 2 * positions * ins * outs * kernel * kernel
        moved += 4 * positions * (ins + outs)  # norm and activation read and write their input once more each

    channels = config.ch * config.decoder_ch_mult[level]
    convolution(config.z_channels, config.z_channels, 1)
    convolution(config.z_channels, channels, 3)
    for _ in range(4):
        convolution(channels, channels, 3)
    for _ in range(4):
        convolution(channels, channels, 1)
    attention = 4 * rows * (height * width) ** 2 * channels
    for level in reversed(range(len(config.decoder_ch_mult))):
        outs = config.ch * config.decoder_ch_mult[level]
        for _ in range(config.decoder_res_blocks[level]):
            convolution(channels, outs, 3)
            convolution(outs, outs, 3)
            if channels != outs:
                convolution(channels, outs, 1)
            channels = outs
        if level:
            positions *= 4
            convolution(channels, channels, 3)
    convolution(channels, 3, 3)
    return Cost(dense=total, attention=attention, bytes=itemsize * moved, launches=150)
