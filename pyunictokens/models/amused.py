"""aMUSEd: a U-shaped transformer over VQ codes that reads CLIP text by cross-attention (256² and 512² checkpoints).

    model_index.json   says AmusedPipeline
    transformer/       UVit2DModel          what learns
    text_encoder/      CLIP with projection, frozen: no part of what is trained, saved with a run or given adapters
    tokenizer/         CLIP's words
    vqvae/             VQModel: pixels to codes and back
    scheduler/         the id of an unknown code

A prompt is padded to CLIP's 77 positions and read once; its keys and values serve all rows and steps. The network is
diffusers' own (uvit.py), run up to the input of its last convolution, which is a product of one position and therefore
the image head. The size of the image is part of the condition, so square grids alone can be drawn.

Source: Patil, Berman, Rombach, von Platen, "aMUSEd: An open MUSE reproduction", 2024.

Shape suffixes: B rows, N image codes, L text positions, D width, E hidden width, K codebook.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..utils.errors import UserError, needs
from ..utils.files import write_json
from ..utils.loading import no_bars
from . import uvit
from .base import ImageTokenizer, MaskedModel
from .bundle import ModelBundle, Sources
from .checkpoint import read_config, resolve
from .costs import ModelCosts
from .prefix import Prefix
from .registry import Family, refuse_others
from .sampling_rule import SamplingRule
from .tokenizer import TextTokenizer

if TYPE_CHECKING:
    from diffusers import UVit2DModel, VQModel
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase

AESTHETIC_SCORE = 6.0
"""What the published pipeline conditions on; with a crop at (0, 0)."""
_INDEX = "model_index.json"


class Amused(MaskedModel):
    """aMUSEd behind `MaskedModel`. It draws; it neither answers nor has rows for a concept."""

    family = "amused"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    transformer: Any
    """UVit2DModel: diffusers has no types for what is in it."""
    text_encoder: Any
    rule = SamplingRule("cosine", "to_zero", "interpolated", steps=12, guidance_scale=10.0, temperature=2.0)

    def __init__(
        self,
        transformer: UVit2DModel,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        mask_id: int,
        downsampling: int,
    ):
        super().__init__()
        self.transformer = transformer
        config = self.transformer.config
        self.__dict__["text_encoder"] = text_encoder  # not a submodule: it is read, never trained
        self.words = tokenizer
        self.mask_id, self.downsampling = mask_id, downsampling
        self.codebook_size, self.width = config.codebook_size, config.in_channels
        self.grid = (config.sample_size, config.sample_size)
        self.places = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        self.max_text, self.num_text_ids = self.places - 2, text_encoder.config.vocab_size

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Amused:
        self.text_encoder._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    # --- prompts ---------------------------------------------------------------------------------------------------

    def prompt_ids(self, text_ids: Sequence[int]) -> list[int]:
        words = self.words
        ids = [words.bos_token_id, *list(text_ids)[: self.max_text], words.eos_token_id]
        return ids + [words.pad_token_id] * (self.places - len(ids))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        wrong = [len(prompt) for prompt in prompts if len(prompt) != self.places]
        if wrong:
            raise UserError(f"a prompt of {wrong[0]} ids: must have {self.places}, as prompt_ids makes it")
        known: dict[tuple[int, ...], list[Tensor]] = {}
        for prompt in map(tuple, prompts):
            if prompt not in known:
                known[prompt] = self._read(prompt)
        return Prefix([known[tuple(prompt)] for prompt in prompts], [self.places] * len(prompts))

    def _read(self, prompt: tuple[int, ...]) -> list[Tensor]:
        """(pooled text [F], keys and values of each attention over it) of one prompt."""
        with torch.no_grad():
            read = self.text_encoder(torch.tensor([prompt], device=self.device), output_hidden_states=True)
        net, states_LC = self.transformer, read.hidden_states[-2][0].to(self.dtype)
        states_LD = net.encoder_proj_layer_norm(net.encoder_proj(states_LC))
        return [read.text_embeds[0].to(self.dtype), *uvit.keys_and_values(net, states_LD)]

    # --- images ----------------------------------------------------------------------------------------------------

    def check_grid(self, grid: tuple[int, int]) -> None:
        step = 2 if self.transformer.config.downsample else 1
        if grid[0] != grid[1] or grid[0] % step:
            raise UserError(
                f"grid={grid}: this model draws squares{' of an even number of codes' if step == 2 else ''}, "
                f"as {self.grid}"
            )

    def image_hidden(
        self, codes_BN: Tensor, prefix: Prefix, prefix_of_row: Sequence[int], timestep_B: Tensor
    ) -> Tensor:
        net, (rows, count) = self.transformer, codes_BN.shape
        side = math.isqrt(count)
        used = sorted(set(prefix_of_row))
        place_of_row = torch.tensor([used.index(prompt) for prompt in prefix_of_row], device=codes_BN.device)
        pooled_PF = torch.stack([prefix.parts[prompt][0] for prompt in used])
        size_PC = self._size(side).expand(len(used), -1)
        condition_PD = net.cond_embed(torch.cat([pooled_PF, size_PC.to(pooled_PF.dtype)], dim=1))
        ids = torch.where(codes_BN < 0, self.mask_id, codes_BN).long().view(rows, side, side)
        texts = uvit.Texts([part[1:] for part in prefix.parts], self.places, prefix_of_row)
        return uvit.hidden(net, ids, condition_PD, place_of_row, texts, self.checkpoint_layers)

    def _size(self, side: int) -> Tensor:
        """[1, C], float32: width, height, crop and aesthetic score, each in waves."""
        with needs("diffusers"):
            from diffusers.models.embeddings import get_timestep_embedding

        pixels = float(side * self.downsampling)
        values = torch.tensor([pixels, pixels, 0.0, 0.0, AESTHETIC_SCORE], device=self.device)
        width = self.transformer.config.micro_cond_encode_dim
        return get_timestep_embedding(values, width, flip_sin_to_cos=True, downscale_freq_shift=0).reshape(1, -1)

    def image_head(self) -> tuple[Tensor, Tensor | None]:
        last = self.transformer.mlm_layer.conv2
        return last.weight.flatten(1), last.bias

    @property
    def costs(self) -> ModelCosts:
        """A guess by the number of parameters, with the network's own depth."""
        config, head = self.transformer.config, self.image_head()[0]
        layers = config.num_hidden_layers + 2 * config.num_res_blocks
        total = sum(parameter.numel() for parameter in self.parameters())
        return ModelCosts(
            total, layers, config.hidden_size, self.codebook_size, math.prod(self.grid), head.element_size()
        )

    # --- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Amused:
        """Load a published pipeline folder or hub id, frozen and in eval mode."""
        with needs("train"):
            from transformers import AutoTokenizer, CLIPTextModelWithProjection
        with needs("diffusers"):
            from diffusers import UVit2DModel

        folder = resolve(path)
        refuse_others(folder, "amused")
        transformer = _whole(UVit2DModel, folder / "transformer", dtype)
        text_encoder = _whole(CLIPTextModelWithProjection, folder / "text_encoder", dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder / 'tokenizer'}: cannot be read as CLIP's tokenizer: {error}") from error
        vocabulary = transformer.config.vocab_size
        mask_id = _number(folder / "scheduler" / "scheduler_config.json", "mask_token_id", vocabulary - 1)
        if not transformer.config.codebook_size <= mask_id < vocabulary:
            raise UserError(f"{folder / 'scheduler'}: mask_token_id={mask_id}: must be an id after the codes")
        if transformer.config.encoder_hidden_size != text_encoder.config.hidden_size:
            raise UserError(
                f"{folder}: its transformer reads text of width {transformer.config.encoder_hidden_size}, its text "
                f"encoder gives {text_encoder.config.hidden_size}: they do not belong together"
            )
        levels = read_config(folder / "vqvae").get("block_out_channels", [0] * 5)
        model = cls(transformer, text_encoder, tokenizer, mask_id, 2 ** (len(levels) - 1))
        return model.to(device).requires_grad_(False).eval()

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the parts that :meth:`from_pretrained` reads; the image tokenizer is saved on its own."""
        folder = Path(path)
        self.transformer.save_pretrained(folder / "transformer")
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.words.save_pretrained(folder / "tokenizer")
        levels = self.downsampling.bit_length()
        write_json(folder / "vqvae" / "config.json", {"_class_name": "VQModel", "block_out_channels": [0] * levels})
        scheduler = {"_class_name": "AmusedScheduler", "mask_token_id": self.mask_id, "masking_schedule": "cosine"}
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        write_json(folder / _INDEX, {"_class_name": "AmusedPipeline"})


class AmusedVQ(ImageTokenizer):
    """The pipeline's VQModel: pixels to codes and back."""

    net: Any

    def __init__(self, net: VQModel):
        super().__init__()
        self.net = net
        self.codebook_size = self.net.config.num_vq_embeddings
        self.downsampling = 2 ** (len(self.net.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> AmusedVQ:
        """Load the `vqvae/` of a pipeline folder or hub id, or a folder that holds a VQModel; frozen."""
        with needs("diffusers"):
            from diffusers import VQModel

        folder = resolve(path)
        inner = folder / "vqvae" if (folder / "vqvae").is_dir() else folder
        refuse_others(inner, "diffusers' VQModel")
        net = _whole(VQModel, inner, dtype)
        return cls(net).to(device).requires_grad_(False).eval()

    def encode(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise UserError(f"an image of {height}×{width} pixels: sides must be multiples of {self.downsampling}")
        latents = self.net.encode((pixels.to(self.net.dtype) + 1.0) / 2.0).latents
        return self.net.quantize(latents)[2][2].view(len(pixels), -1)

    def decode(self, codes: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        side = math.isqrt(codes.shape[1])
        grid = (len(codes), *(shape or (side, side)), self.net.config.latent_channels)
        return self.net.decode(codes, force_not_quantize=True, shape=grid).sample.clip(0.0, 1.0) * 2.0 - 1.0


def _whole(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network of diffusers or transformers from its folder. Raises UserError where weights are missing: the
    libraries would fill the gap with random numbers."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json here: give the whole published pipeline folder")
    try:
        with no_bars():
            net, report = kind.from_pretrained(
                folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # many kinds, for files that are cut short, absent or of other shapes
        raise UserError(f"{folder}: cannot be read as {kind.__name__}: {type(error).__name__}: {error}") from error
    gaps = [key for key in sorted(report["missing_keys"]) if not key.endswith("position_ids")]
    if gaps:
        raise UserError(f"{folder}: no checkpoint of {kind.__name__}: {len(gaps)} weights missing ({gaps[0]}, …)")
    return net


def _number(file: Path, key: str, default: int) -> int:
    from ..utils.files import read_json_table

    value = read_json_table(file).get(key, default) if file.is_file() else default
    if not isinstance(value, int):
        raise UserError(f"{file}: {key}={value!r}: must be a whole number")
    return value


def _recognises(config: Mapping[str, object]) -> bool:
    return config.get("_class_name") == "AmusedPipeline"


def _load(sources: Sources, dtype: torch.dtype, device: torch.device) -> ModelBundle:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    assert sources.model is not None
    model = Amused.from_pretrained(sources.model, dtype, device)
    vq = AmusedVQ.from_pretrained(sources.vq or sources.model, device=device)
    if vq.codebook_size != model.codebook_size:
        raise UserError(
            f"the image tokenizer {sources.vq} has {vq.codebook_size} codes, the model {model.codebook_size}"
        )
    words = model.words
    text = TextTokenizer(words.backend_tokenizer, words.bos_token, words.eos_token, model.num_text_ids)
    return ModelBundle(model, vq, text, sources)


_PUBLISHED = {name: Sources(*[f"amused/{name}"] * 3) for name in ("amused-256", "amused-512")}
FAMILY = Family(
    "amused", _recognises, _load, {**_PUBLISHED, **{f"amused/{name}": its for name, its in _PUBLISHED.items()}}
)
