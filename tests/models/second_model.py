"""A masked model that is no Show-o: the proof that nobody outside `models/` reaches into one.

Image codes attend to the states of a text encoder through cross-attention, know the time, and go through a convolution
over the grid and a norm before the last linear layer, which has no bias. It decays its noise linearly, reads a guidance
scale as g in u + g·(c − u), has no text head and no rows for a concept, and cannot be captured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyunictokens.models import ImageTokenizer, MaskedModel, ModelBundle, Prefix, SamplingRule, Sources
from pyunictokens.models.registry import Family
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import read_json, save_safetensors_atomic, write_json

WORDS, CODES, GRID, WIDTH, HEADS, START = 31, 13, (3, 5), 24, 2, 30
"""Text ids, image codes, grid, width, heads, and the id that opens every prompt."""


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(3)])
        self.own = nn.Linear(WIDTH, 3 * WIDTH)
        self.query, self.memory = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x_BND: Tensor, text_BPD: Tensor, padding_BP: Tensor) -> Tensor:
        x = x_BND + _attend(*self.own(self.norms[0](x_BND)).chunk(3, -1), None)
        keys, values = self.memory(text_BPD).chunk(2, -1)
        x = x + _attend(self.query(self.norms[1](x)), keys, values, ~padding_BP[:, None, None])
        return x + self.outer(F.gelu(self.inner(self.norms[2](x))))


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2)


class SecondModel(MaskedModel):
    """Two layers over 3 × 5 codes, or any other grid of five columns."""

    family = "second"
    rule = SamplingRule("linear", "linear", "interpolated", steps=6, guidance_scale=3.0, temperature=1.5)
    lora_targets = ("own", "query", "memory")

    def __init__(self, max_text: int = 7):
        super().__init__()
        self.codebook_size, self.grid, self.width = CODES, GRID, WIDTH
        self.max_text, self.num_text_ids = max_text, WORDS
        self.words, self.codes = nn.Embedding(WORDS, WIDTH), nn.Embedding(CODES + 1, WIDTH)
        self.places = nn.Parameter(torch.zeros(64, WIDTH))
        self.text_layer = nn.Linear(WIDTH, WIDTH)
        self.time = nn.Linear(2, WIDTH)
        self.layers = nn.ModuleList([_Layer(), _Layer()])
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CODES, bias=False)

    @classmethod
    def random(cls, seed: int = 0, dtype: torch.dtype = torch.float64) -> SecondModel:
        """Weights that make prompts, time and neighbours matter."""
        model, generator = cls().to(dtype), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.35 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        return model.requires_grad_(False).eval()

    def prompt_ids(self, text_ids: Sequence[int]) -> list[int]:
        return [START, *list(text_ids)[: self.max_text]]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        long = [prompt for prompt in prompts if len(prompt) > self.max_text + 1]
        if long:
            raise UserError(f"a prompt of {len(long[0])} ids: at most {self.max_text + 1}")
        return Prefix([[self._states(prompt)] for prompt in prompts], [len(prompt) for prompt in prompts])

    def _states(self, prompt: Sequence[int]) -> Tensor:
        ids = torch.tensor(list(prompt), device=self.device)
        return torch.tanh(self.text_layer(self.words(ids) + self.places[: len(prompt)]))

    def image_hidden(
        self, codes_BN: Tensor, prefix: Prefix, prefix_of_row: Sequence[int], timestep_B: Tensor
    ) -> Tensor:
        count = codes_BN.shape[1]
        states = [prefix.parts[prompt][0] for prompt in prefix_of_row]
        text_BPD = nn.utils.rnn.pad_sequence(states, batch_first=True)
        lengths = torch.tensor([len(each) for each in states], device=codes_BN.device)
        padding_BP = torch.arange(text_BPD.shape[1], device=codes_BN.device) >= lengths[:, None]
        angle = timestep_B.to(text_BPD.dtype)[:, None] * math.pi
        time_BD = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        x = self.codes(torch.where(codes_BN < 0, CODES, codes_BN).long()) + self.places[:count] + time_BD[:, None]
        for layer in self.layers:
            x = layer(x, text_BPD, padding_BP)
        plane = x.transpose(1, 2).unflatten(2, (count // GRID[1], GRID[1]))
        return self.norm(x + self.mix(plane).flatten(2).transpose(1, 2))

    def check_grid(self, grid: tuple[int, int]) -> None:
        if grid[1] != GRID[1]:
            raise UserError(f"grid={grid}: this model draws {GRID[1]} columns")

    def image_head(self) -> tuple[Tensor, None]:
        return self.head.weight, None

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> SecondModel:
        from safetensors.torch import load_file

        model = cls(read_json(Path(path) / "config.json")["max_text"])
        model.load_state_dict(load_file(Path(path) / "model.safetensors"))
        return model.to(device, dtype).requires_grad_(False).eval()

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        save_safetensors_atomic(Path(path) / "model.safetensors", self.state_dict())
        write_json(Path(path) / "config.json", {"architectures": ["SecondModel"], "max_text": self.max_text})


class Pixels(ImageTokenizer):
    """One pixel a code, grey by its number in [−1, 1]."""

    codebook_size, downsampling = CODES, 1

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def encode(self, pixels: Tensor) -> Tensor:
        return ((pixels[:, 0].flatten(1) + 1) * (CODES - 1) / 2).round().long()

    def decode(self, codes: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        grey = codes.float() * 2 / (CODES - 1) - 1
        return grey.unflatten(1, shape or GRID)[:, None].expand(-1, 3, -1, -1)


class Words:
    """Text to ids: a word is the sum of its letters."""

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % START for word in text.split()][:7]


def _load(sources: Sources, dtype: torch.dtype, device: torch.device) -> ModelBundle:
    model = SecondModel.from_pretrained(sources.model or "", dtype, device)
    return ModelBundle(model, Pixels(), Words(), sources)  # type: ignore[arg-type]


FAMILY = Family("second", lambda config: config.get("architectures") == ["SecondModel"], _load)
