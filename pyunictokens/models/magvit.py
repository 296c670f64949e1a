"""MAGVIT-v2 image tokenizer: pixels to codes and back, with a look-up-free quantiser.

The layout (module names, order of layers) is that of the published checkpoint, so its state dict loads key by key. The
shape of the network (widths, blocks, bits) is read from the weights themselves.

A code is the sign pattern of one position's `z_channels` features read as a binary number, most significant bit first
(Yu et al., 2023, "Language Model Beats Diffusion", section 3.1). The decoder is fully convolutional but for one
attention layer in the middle, so it takes any grid h×w.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import UserError
from ..utils.files import save_safetensors_atomic, write_json
from .base import ImageTokenizer
from .checkpoint import assign, load_state_dict, read_config, resolve, whole_number
from .costs import Cost, decode_pixels


@dataclass(frozen=True)
class MagvitConfig:
    """Sizes of the tokenizer. The defaults are the published one (downsampling 16, 8192 codes)."""

    ch: int = 128
    encoder_ch_mult: tuple[int, ...] = (1, 2, 2, 4, 4)
    decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_res_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    decoder_res_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)
    z_channels: int = 13
    norm_groups: int = 32

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.encoder_ch_mult) - 1)

    @property
    def codebook_size(self) -> int:
        return 2**self.z_channels

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, tuple[int, ...]], norm_groups: int = 32) -> MagvitConfig:
        """Read the sizes off the weights' shapes, so that no configuration file has to agree with them."""
        try:
            ch = shapes["encoder.conv_in.weight"][0]
            z_channels = shapes["encoder.quant_conv.weight"][0]
        except KeyError as error:
            raise UserError(f"not a MAGVIT-v2 checkpoint: the weight {error} is missing") from None
        except IndexError:
            raise UserError("not a MAGVIT-v2 checkpoint: a convolution's weight has no size") from None
        if ch < 1 or not 1 <= z_channels <= 30:
            raise UserError(
                f"not a MAGVIT-v2 checkpoint: {ch} channels and {z_channels} bits: must be ≥ 1, and ≤ 30 bits"
            )

        def levels(side: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
            width: dict[int, int] = {}
            blocks: dict[int, int] = {}
            for key, shape in shapes.items():
                found = re.fullmatch(rf"{side}\.(\d+)\.block\.(\d+)\.conv2\.weight", key)
                if found:
                    level, block = int(found[1]), int(found[2])
                    width[level] = shape[0] // ch
                    blocks[level] = max(blocks.get(level, 0), block + 1)
            return tuple(width[i] for i in sorted(width)), tuple(blocks[i] for i in sorted(blocks))

        encoder_mult, encoder_blocks = levels("encoder.down")
        decoder_mult, decoder_blocks = levels("decoder.up")
        return cls(ch, encoder_mult, decoder_mult, encoder_blocks, decoder_blocks, z_channels, norm_groups)


class _Residual(nn.Module):
    def __init__(self, width_in: int, width_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-6)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class _Attention(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape_as(x)
        return x + self.proj_out(h)


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.block_1 = _Residual(width, width, groups)
        self.attn_1 = _Attention(width, groups)
        self.block_2 = _Residual(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Down(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the published tokenizer pads right and bottom only


class _Up(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """One resolution: residual blocks, then `resample` (a :class:`_Down` or :class:`_Up`) under its published name."""

    def __init__(self, widths: list[int], groups: int, resample: tuple[str, nn.Module] | None):
        super().__init__()
        self.block = nn.ModuleList([_Residual(a, b, groups) for a, b in pairwise(widths)])
        self.resample_name = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.resample_name)(x) if self.resample_name else x


class MagvitEncoder(nn.Module):
    """Pixels [B, 3, H, W] to features [B, z_channels, H/f, W/f]; their signs are the code's bits."""

    def __init__(self, config: MagvitConfig):
        super().__init__()
        groups, last = config.norm_groups, len(config.encoder_ch_mult) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.ch
        for level, (mult, blocks) in enumerate(zip(config.encoder_ch_mult, config.encoder_res_blocks, strict=True)):
            out = config.ch * mult
            self.down.append(
                _Level([width] + [out] * blocks, groups, ("downsample", _Down(out)) if level != last else None)
            )
            width = out
        self.mid = _Middle(width, groups)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class MagvitDecoder(nn.Module):
    """Bits as ±1, [B, z_channels, h, w], to pixels [B, 3, h·f, w·f]."""

    def __init__(self, config: MagvitConfig):
        super().__init__()
        groups = config.norm_groups
        width = config.ch * config.decoder_ch_mult[-1]
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = _Middle(width, groups)
        levels: list[nn.Module] = []
        for level in reversed(range(len(config.decoder_ch_mult))):
            out = config.ch * config.decoder_ch_mult[level]
            blocks = config.decoder_res_blocks[level]
            levels.insert(0, _Level([width] + [out] * blocks, groups, ("upsample", _Up(out)) if level else None))
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _Quantizer(nn.Module):
    """The table of ±1 patterns, kept because the published checkpoint carries it."""

    embedding: Tensor
    power_vals: Tensor

    def __init__(self, bits: int):
        super().__init__()
        powers = 2 ** torch.arange(bits - 1, -1, -1)
        self.register_buffer("power_vals", powers)
        self.register_buffer("embedding", ((torch.arange(2**bits)[:, None] & powers) > 0).float() * 2 - 1)


class MagvitV2(ImageTokenizer):
    """The tokenizer. ``encode`` and ``decode`` run without gradients; training code calls ``encoder``/``decoder``."""

    def __init__(self, config: MagvitConfig | None = None):
        super().__init__()
        self.config = config or MagvitConfig()
        self.encoder = MagvitEncoder(self.config)
        self.decoder = MagvitDecoder(self.config)
        self.quantize = _Quantizer(self.config.z_channels)
        self.downsampling, self.codebook_size = self.config.downsampling, self.config.codebook_size

    def decode_cost(self, rows: int, grid: tuple[int, int]) -> Cost:
        return decode_pixels(self.config, rows, grid)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1], sides multiples of `downsampling`, to codes int64 [B, h·w], row by row."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(f"pixels of shape {tuple(pixels.shape)}: must be [B, 3, H, W]")
        if any(side % self.downsampling or side == 0 for side in pixels.shape[2:]):
            raise UserError(
                f"pixels of {pixels.shape[2]}×{pixels.shape[3]}: sides must be positive multiples "
                f"of {self.downsampling}"
            )
        bits = self.encoder(pixels.to(self.encoder.conv_in.weight.dtype)).flatten(2).transpose(1, 2) > 0
        return (bits * self.quantize.power_vals).sum(-1)

    @torch.no_grad()
    def decode(self, codes: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Codes int [B, h·w] (square unless `shape` = (h, w) is given) to pixels [B, 3, h·f, w·f], about [-1, 1]."""
        if codes.ndim != 2:
            raise UserError(f"codes of shape {tuple(codes.shape)}: must be [B, h·w]")
        if shape is None:
            side = math.isqrt(codes.shape[1])
            shape = (side, side)
        if shape[0] * shape[1] != codes.shape[1]:
            raise UserError(f"{codes.shape[1]} codes do not fill a grid of {shape[0]}×{shape[1]}: pass shape=(h, w)")
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise UserError(
                f"codes reach from {int(codes.min())} to {int(codes.max())}: must lie in 0…{self.codebook_size - 1} "
                "(−1 is an unknown code: generate it first)"
            )
        weight = self.decoder.conv_in.weight
        z = self.bits(codes).to(weight.dtype).transpose(1, 2).unflatten(2, shape)
        return self.decoder(z)

    def bits(self, codes: Tensor) -> Tensor:
        """Codes [...] to their patterns of ±1, float32 [..., z_channels]."""
        return self.quantize.embedding[codes].float()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> MagvitV2:
        """Load from a folder or hub id holding `pytorch_model.safetensors`, `model.safetensors` or `pytorch_model.bin`.

        Raises UserError when a weight is missing, left over, or of another shape.
        """
        from .registry import refuse_others

        folder = resolve(path)
        refuse_others(folder, "magvit-v2")
        options = read_config(folder, required=False)
        weights = load_state_dict(folder)
        groups = whole_number(options, "norm_groups", 32, folder)
        config = MagvitConfig.from_state_dict({key: tuple(value.shape) for key, value in weights.items()}, groups)
        try:
            with torch.device("meta"):
                model = cls(config)
        except (ValueError, IndexError) as error:  # sizes that no network has
            raise UserError(
                f"{folder}: not a MAGVIT-v2 checkpoint, or norm_groups={groups} is wrong: {error}"
            ) from None
        dtypes = {"quantize.power_vals": torch.int64}  # some files store the powers as floats
        placed = {key: value.to(device=device, dtype=dtypes.get(key, dtype)) for key, value in weights.items()}
        assign(model, placed, folder)
        return model.requires_grad_(False).eval()

    def save_pretrained(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors`; floating weights in `dtype` when given."""
        weights = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_safetensors_atomic(Path(path) / "model.safetensors", weights)
        write_json(
            Path(path) / "config.json", json.loads(json.dumps({"_class_name": "MAGVITv2", **asdict(self.config)}))
        )
