"""Chameleon (Chameleon team, 2024) of transformers as a model that also generates images.

The library's class answers only: its `forward` gives image tokens the lowest logit there is, and its VQ model has an
encoder alone. Here the head is applied to the hidden states, with image tokens as they are, and the VQGAN's decoder
is built from the library's own blocks, for the `decoder.*` weights of checkpoints that have them (Anole's) or of the
published tokenizer file.

An image in a sequence is its codes between begin and end tokens, so that a whole sequence is ids and nothing else.

Letters: L sequence, N codes of an image, B images, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluate.baselines.vlm import Backbone
from ..evaluate.core import Unsupported
from ..models.checkpoint import load_tensors, resolve
from ..utils.errors import UserError, needs

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ChameleonVQVAEConfig, PreTrainedTokenizerBase

_PREFIXES = ("model.vqmodel.decoder.", "vqmodel.decoder.", "decoder.")


class Chameleon(Backbone):
    """A Chameleon checkpoint. `decoder` is a file or folder with the VQGAN decoder's weights; "" looks into the
    checkpoint itself."""

    def __init__(
        self, path: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, decoder: str = ""
    ):
        with _decoder_is_no_surprise():
            super().__init__(path, device, dtype)
        if self.model.config.model_type != "chameleon":
            raise UserError(
                f"{path}: is a {self.model.config.model_type}, must be a Chameleon (as leloy/Anole-7b-v0.1-hf)"
            )
        self.decoder_place = decoder or path
        self.tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        if self.tokenizer.sep_token_id is None:
            raise UserError(f"{path}: its tokenizer has no sep_token, which ends a turn")
        self.end_of_turn = int(self.tokenizer.sep_token_id)
        self.side = int(self.model.config.vq_config.resolution)
        self._decoder: VqDecoder | None = None

    @property
    def codes_of_image(self) -> int:
        """N."""
        return int(self.processor.image_seq_length)

    def ids(self, text: str) -> list[int]:
        """Ids of a text within a sequence."""
        return [int(index) for index in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    @torch.no_grad()
    def image_ids(self, image: Image) -> list[int]:
        """Ids of an image: begin, N codes, end."""
        pixels = self.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        codes = self.model.model.get_image_tokens(pixels.to(self.device, self.model.dtype))[0].tolist()
        return [int(self.processor.image_start_token_id), *codes, int(self.processor.image_end_token_id)]

    @torch.no_grad()
    def turn_ids(self, images: Sequence[Image], text: str) -> list[int]:
        """Ids of what a user says, its images as codes, up to the end of the turn."""
        inputs = self.inputs(images, text)
        ids = inputs["input_ids"][0]
        if images:
            pixels = inputs["pixel_values"]
            codes = self.model.model.get_image_tokens(pixels).flatten().to(ids)
            ids = ids.masked_scatter(ids == self.processor.image_token_id, codes)
        return [int(index) for index in ids]

    def logits(self, ids_BL: Tensor, last: int) -> Tensor:
        """[B, last, V] for the last positions; image tokens keep their logits."""
        hidden = self.model.model(input_ids=ids_BL, use_cache=False).last_hidden_state[:, -last:]
        logits: Tensor = self.model.lm_head(hidden)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def loss(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """The summed cross-entropy over the tokens of `answer`, image tokens among them."""
        ids = torch.tensor([[*prompt, *answer]], device=self.device)
        logits_AV = self.logits(ids, len(answer) + 1)[0, :-1]
        return F.cross_entropy(logits_AV, ids[0, len(prompt) :], reduction="sum")

    @torch.no_grad()
    def sample_codes(self, prompt: Sequence[int], n: int, seed: int) -> Tensor:
        """`n` images after `prompt` (which ends with the begin token), ids [n, N], drawn among the image tokens alone
        at temperature 1. Image i has a generator of its own, from (seed, i)."""
        allowed = torch.tensor(self.model.model.vocabulary_mapping.image_tokens, device=self.device)
        generators = [torch.Generator().manual_seed(seed * 1000 + index) for index in range(n)]
        ids_BL = torch.tensor([list(prompt)] * n, device=self.device)
        cache, made = None, list[Tensor]()
        for _ in range(self.codes_of_image):
            out = self.model.model(input_ids=ids_BL, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = self.model.lm_head(out.last_hidden_state[:, -1])[:, allowed].float()
            chances = logits.softmax(-1).cpu()
            drawn = [torch.multinomial(row, 1, generator=one) for row, one in zip(chances, generators, strict=True)]
            ids_BL = allowed[torch.stack(drawn).to(self.device)]
            made.append(ids_BL)
        return torch.cat(made, dim=1)

    @torch.no_grad()
    def decode(self, ids_BN: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] of image tokens. Raises Unsupported where there is no decoder."""
        mapping = self.model.model.vocabulary_mapping.bpe2img
        codes = torch.tensor([[mapping[int(index)] for index in row] for row in ids_BN], device=self.device)
        vq, side = self.model.model.vqmodel, round(ids_BN.shape[1] ** 0.5)
        quantized = vq.quantize.embedding(codes).view(len(codes), side, side, -1).permute(0, 3, 1, 2)
        return self.decoder()(vq.post_quant_conv(quantized)).float().clamp(-1, 1)

    def decoder(self) -> VqDecoder:
        """The VQGAN's decoder, read when it is first needed."""
        if self._decoder is None:
            made = VqDecoder(self.model.config.vq_config)
            weights = decoder_weights(self.decoder_place)
            if not weights:
                raise Unsupported(
                    f"{self.decoder_place}: holds no weights of a VQGAN decoder, so no image can be made of codes: "
                    "train on a checkpoint that has them (leloy/Anole-7b-v0.1-hf), or give decoder=FILE, the published "
                    "tokenizer's vqgan.ckpt"
                )
            try:
                made.load_state_dict(weights)
            except RuntimeError as error:
                raise UserError(f"{self.decoder_place}: its VQGAN decoder does not fit: {error}") from None
            self._decoder = made.to(self.device, self.model.dtype).eval().requires_grad_(False)
        return self._decoder


@contextmanager
def _decoder_is_no_surprise() -> Iterator[None]:
    """Inside this context the library loads a checkpoint that holds a decoder without a warning of each tensor."""
    with needs("evaluate"):
        from transformers import ChameleonForConditionalGeneration

    net: Any = ChameleonForConditionalGeneration
    kept = net._keys_to_ignore_on_load_unexpected
    net._keys_to_ignore_on_load_unexpected = [*(kept or []), r"vqmodel\.decoder\."]
    try:
        yield
    finally:
        net._keys_to_ignore_on_load_unexpected = kept


def decoder_weights(place: str) -> dict[str, Tensor]:
    """The weights `decoder.…` of a file, or of the files of a checkpoint; {} where there are none."""
    path = Path(place).expanduser()
    files = [path] if path.is_file() else sorted(resolve(place).glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with needs("train"):
                from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                names = {name: _bare(name) for name in opened.keys() if _bare(name)}  # noqa: SIM118
                found |= {bare: opened.get_tensor(name) for name, bare in names.items()}
        else:
            found |= {_bare(name): value for name, value in load_tensors(file).items() if _bare(name)}
    return found


def _bare(name: str) -> str:
    """The name of a decoder's tensor within it; "" for others."""
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), "")


class VqDecoder(nn.Module):
    """The decoder of a VQGAN (Esser et al., 2021) in the published names: features [B, C, h, w] to pixels."""

    def __init__(self, config: ChameleonVQVAEConfig):
        super().__init__()
        with needs("evaluate"):
            from transformers.models.chameleon.modeling_chameleon import (
                ChameleonVQVAEEncoderAttnBlock as Attention,
            )
            from transformers.models.chameleon.modeling_chameleon import (
                ChameleonVQVAEEncoderResnetBlock as Resnet,
            )

        vanilla, at = config.attn_type == "vanilla", config.attn_resolutions or ()
        levels = len(config.channel_multiplier)
        width = config.base_channels * config.channel_multiplier[-1]
        resolution = config.resolution // 2 ** (levels - 1)
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1 = Resnet(config, width, width)
        self.mid.attn_1 = Attention(width) if vanilla else nn.Identity()
        self.mid.block_2 = Resnet(config, width, width)
        up: list[nn.Module] = []
        for level in reversed(range(levels)):
            part, out = nn.Module(), config.base_channels * config.channel_multiplier[level]
            part.block, part.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                part.block.append(Resnet(config, width, out))
                width = out
                if resolution in at and vanilla:
                    part.attn.append(Attention(width))
            if level:
                part.upsample = nn.Module()
                part.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
                resolution *= 2
            up.insert(0, part)
        self.up = nn.ModuleList(up)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        mid: Any = self.mid
        x = mid.block_2(mid.attn_1(mid.block_1(self.conv_in(features))))
        parts: list[Any] = list(self.up)
        for level in reversed(range(len(parts))):
            part = parts[level]
            for place, block in enumerate(part.block):
                x = block(x)
                if len(part.attn):
                    x = part.attn[place](x)
            if level:
                x = part.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        pixels: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return pixels
