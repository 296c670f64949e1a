"""The Show-o transformer: a Phi decoder over one vocabulary of text, task tokens and image codes.

Module names are those of the published checkpoint, so its state dict loads key by key. A concept's learned rows are
attached beside the weights, never written into them: ids after the special ids are theirs, and code ids and the mask id
move up by their number. Sequences are the business of prompting.py, cached paths of attention.py and prefill.py.

Shape suffixes: B batch, L sequence, D width, H heads, E head width, V vocabulary, K codebook, N image codes. Source:
Xie et al., 2024, "Show-o"; layer norm on q and k, partial rotary, parallel attention and MLP, tanh-GELU.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import ops
from ...utils.errors import UserError
from ...utils.files import save_safetensors_atomic, write_json
from ..base import AnswerDecoder, AnsweringModel, CapturableModel, ConceptModel, ImageEncoder, ImageStep
from ..checkpoint import assign, load_state_dict, read_config, resolve
from ..concept_tokens import ConceptTokens
from ..prefix import Prefix
from ..sampling_rule import SamplingRule
from . import padding, prompting
from . import prefill as cached
from .attention import Attention, FullAttention, PromptKV
from .compiled import CompiledBlocks
from .costs import ShowoCosts
from .joining import JoinedDecoder
from .layers import CausalLM, SelfAttention
from .sizes import ShowoConfig
from .vocabulary import TextVocabulary


class Showo(AnsweringModel, ConceptModel, CapturableModel):
    """The unified model. Weights are the published ones; at most one concept is attached beside them.

    ``model(input_ids, attention_allowed)`` is the plain full-sequence definition. Faster paths use :meth:`embed`,
    :meth:`encode` with a strategy of attention.py, and the heads.
    """

    family = "show-o"
    rule = SamplingRule("cosine", "product", "added", steps=50, guidance_scale=5.0, temperature=1.0)
    lora_targets = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")

    def __init__(self, config: ShowoConfig):
        super().__init__()
        self.config = config
        self.showo = CausalLM(config)
        if config.w_clip_vit:
            clip_width = 1024
            self.mm_projector = nn.Sequential(
                nn.Linear(clip_width, config.hidden_size),
                nn.GELU(),
                nn.Linear(config.hidden_size, config.hidden_size),
            )
        self.codebook_size, self.width = config.codebook_size, config.hidden_size
        side = math.isqrt(config.num_vq_tokens)
        self.grid = (side, side) if side * side == config.num_vq_tokens else (1, config.num_vq_tokens)
        self.end_id, self.max_positions = config.eos_token_id, config.max_position_embeddings
        self.takes_features = config.w_clip_vit
        self.system_ids: list[int] = []
        """Of the CLIP-ViT variant: ids of the system prompt that stands before the features."""
        self._load_encoder: Callable[[], ImageEncoder] | None = None
        self.compiled: CompiledBlocks | None
        """What runs the blocks of image steps, inside the context of :meth:`compiled_blocks`."""
        self.__dict__["compiled"] = None
        self._rotary: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def max_text(self) -> int:
        """Text positions of an image prompt."""
        return self.config.max_text

    @max_text.setter
    def max_text(self, positions: int) -> None:
        self.config = replace(self.config, max_text=positions)

    @property
    def num_text_ids(self) -> int:  # type: ignore[override]
        """Ids before the codes: text, special ids, and the attached concept's."""
        return self.first_code_id

    @property
    def first_code_id(self) -> int:
        """Id of code 0, moved up by the attached concept's rows."""
        return self.config.first_code_id + self.num_new

    @property
    def mask_token_id(self) -> int:
        """Id of an unknown code: the last id of all."""
        return self.config.vocab_size - 1 + self.num_new

    @property
    def dtype(self) -> torch.dtype:
        return self.showo.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.showo.lm_head.weight.device

    @property
    def costs(self) -> ShowoCosts:
        return ShowoCosts(self.config, self.dtype.itemsize)

    # --- images ----------------------------------------------------------------------------------------------------

    def prompt_ids(self, text_ids: Sequence[int]) -> list[int]:
        """`[t2i] [sot] text [eot]`, at most max_text + 1 ids."""
        return prompting.t2i_text(text_ids, prompting.SpecialIds.of(self), self.max_text)

    def cut_ids(self, text_ids: Sequence[int]) -> int:
        own = 2 if list(text_ids[:1]) == [self.config.bos_token_id] else 3
        return max(0, len(text_ids) + own - (self.max_text + 1))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> PromptKV:
        return cached.prefill_t2i(self, prompts)

    def check_grid(self, grid: tuple[int, int]) -> None:
        cached.check_room(self, math.prod(grid), self.max_text + 1)

    def compiled_blocks(self) -> CompiledBlocks:
        return CompiledBlocks(self)

    def image_step(self, prefix: Prefix, prefix_of_row: Sequence[int], count: int) -> ImageStep:
        return cached.ImageRows(self, prefix, prefix_of_row, count, called_again=True)

    def padded(self, prefix: Prefix) -> Prefix:
        return padding.padded(prefix, padding.padded_length(max(prefix.lengths), self.max_text + 1))

    def image_hidden(
        self, codes_BN: Tensor, prefix: Prefix, prefix_of_row: Sequence[int], timestep_B: Tensor | None = None
    ) -> Tensor:
        """[B, N, D] at image codes; Show-o has no embedding of time."""
        return cached.ImageRows(self, prefix, prefix_of_row, codes_BN.shape[1])(codes_BN)

    # --- answering -------------------------------------------------------------------------------------------------

    def question_text(self, question: str) -> str:
        return prompting.chat_question(question)

    def question_ids(self, text_ids: Sequence[int]) -> list[int]:
        """With the start of a text before it; the CLIP-ViT variant was trained without."""
        start = self.config.bos_token_id
        return list(text_ids) if self.takes_features or list(text_ids[:1]) == [start] else [start, *text_ids]

    def look_through(self, load: Callable[[], ImageEncoder], system_ids: Sequence[int]) -> None:
        """Give the CLIP-ViT variant its image encoder, loaded when it is first needed, and its system prompt."""
        self._load_encoder, self.system_ids = functools.cache(load), list(system_ids)

    @property
    def encoder(self) -> ImageEncoder:
        if not self.takes_features:
            return super().encoder
        if self._load_encoder is None:
            raise UserError(
                "this is Show-o's CLIP-ViT variant, which answers from the features of an image encoder, and has none: "
                "load it with pyunictokens.models.load, or give it one (look_through)"
            )
        return self._load_encoder()

    def prefill_questions(self, seen: Tensor, questions: Sequence[Sequence[int]]) -> tuple[PromptKV, Tensor]:
        return cached.prefill_mmu(self, seen, questions)

    def prefill_images(self, seen: Tensor) -> PromptKV:
        return cached.prefill_images(self, seen)

    def text_hidden(self, ids_BL: Tensor, prefix: Prefix, prefix_of_row: Sequence[int]) -> Tensor:
        return cached.text_hidden(self, ids_BL, prefix, prefix_of_row)

    def decoder(self, prefix: Prefix, prefix_of_row: Sequence[int], max_new: int, sliced: bool) -> AnswerDecoder:
        return cached.Decoder(self, prefix, prefix_of_row, max_new, sliced)

    def joining_decoder(self) -> JoinedDecoder:
        return JoinedDecoder(self)

    def vocabulary(self, concepts: Sequence[ConceptTokens | None]) -> TextVocabulary:
        return TextVocabulary(self, concepts)

    def text_parts(self) -> tuple[Tensor, ...]:
        """(weight [V, D], bias [V]) of the base head and, with a concept attached, its (weight [n, D], bias [n])."""
        head = self.showo.lm_head
        if self.concept is None:
            return head.weight, head.bias
        return head.weight, head.bias, self.concept.head_weight, self.concept.head_bias

    def text_logprob(
        self, hidden: Tensor, target: Tensor, *, temperature: float = 1.0, parts: Sequence[Tensor] | None = None
    ) -> Tensor:
        """log p(target) under the full distribution of text, special, concept and code tokens.

        The text head is the base head with a concept's rows in the middle. Gluing them together would need a gradient
        of the whole vocabulary to train 25 rows; here the two parts meet in their log-sum-exp instead. Equals
        ``log_softmax(F.linear(hidden, *model.text_head()) / temperature)[target]``.
        """
        weight, bias, *new = self.text_parts() if parts is None else parts
        if not new:
            return ops.selected_logprob(hidden, weight, target, bias, temperature=temperature)
        new_weight, new_bias = new
        first, count = self.config.first_code_id, new_weight.shape[0]
        is_new = (target >= first) & (target < first + count)
        base = torch.where(is_new, 0, torch.where(target >= first + count, target - count, target))
        exact = hidden if hidden.dtype == torch.float64 else hidden.float()
        logit = (exact * F.embedding(base, weight).to(exact.dtype)).sum(-1) + bias[base].to(exact.dtype)
        logit = logit / temperature
        base_logp = ops.selected_logprob(hidden, weight, base, bias, temperature=temperature)
        new_logits = F.linear(exact, new_weight.to(exact.dtype), new_bias.to(exact.dtype)) / temperature
        total = torch.logaddexp(logit - base_logp, new_logits.logsumexp(-1))
        own = new_logits.gather(-1, (target - first).clamp(0, count - 1)[..., None])[..., 0]
        return torch.where(is_new, own, logit) - total

    # --- embeddings and heads --------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids int64 [...] to embeddings [..., D], the concept's rows included."""
        table = self.showo.model.embed_tokens
        if self.concept is None:
            return table(ids)
        first, count = self.config.first_code_id, self.num_new
        x = table(torch.where(ids >= first + count, ids - count, ids.clamp(max=first - 1)))
        rows = F.embedding((ids - first).clamp(0, count - 1), self.concept.embed).to(x.dtype)
        new = (ids >= first) & (ids < first + count)
        return torch.where(new[..., None], rows, x)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Image codes int [...], −1 where unknown, to embeddings [..., D]."""
        base = self.config.first_code_id
        return self.showo.model.embed_tokens(torch.where(codes < 0, self.config.vocab_size - 1, codes + base).long())

    def image_head(self) -> tuple[Tensor, Tensor]:
        """(weight [K, D], bias [K]): the columns of the codes alone, as views of the published head."""
        head, first = self.showo.lm_head, self.config.first_code_id
        last = first + self.config.codebook_size
        return head.weight[first:last], head.bias[first:last]

    def text_head(self) -> tuple[Tensor, Tensor]:
        """(weight [V, D], bias [V]) of the whole vocabulary, the concept's rows in their place."""
        head = self.showo.lm_head
        if self.concept is None:
            return head.weight, head.bias
        first = self.config.first_code_id
        weight = [head.weight[:first], self.concept.head_weight.to(head.weight.dtype), head.weight[first:]]
        bias = [head.bias[:first], self.concept.head_bias.to(head.bias.dtype), head.bias[first:]]
        return torch.cat(weight), torch.cat(bias)

    # --- transformer -----------------------------------------------------------------------------------------------

    def encode(self, x_BLD: Tensor, positions: Tensor, attend: Attention, step: bool = False) -> Tensor:
        """Embeddings [B, L, D] at absolute positions int64 [L] or [B, L] to final hidden states [B, L, D]. `step`: of
        image rows, which come again in the same sizes, so that blocks may be compiled for them."""
        cos, sin = self._angles(x_BLD.device, x_BLD.dtype)
        cos, sin = cos[positions], sin[positions]
        if step and self.compiled is not None and self.compiled.serves(x_BLD):
            return self.compiled(x_BLD, cos, sin, attend)
        cos, sin = (t.unsqueeze(1) if t.ndim == 3 else t for t in (cos, sin))
        x = x_BLD
        again = len(self.showo.model.layers) if self.checkpoint_layers is True else int(self.checkpoint_layers)
        for index, layer in enumerate(self.showo.model.layers):
            if index < again and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, index, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, index, attend)
        return self.showo.model.final_layernorm(x)

    def forward(
        self, input_ids: Tensor | None, attention_allowed: Tensor | None = None, *, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """The plain full-sequence path. input_ids int64 [B, L] (or inputs_embeds [B, L, D]) and a boolean mask
        [B, L, L] (or [1, L, L]; True = may look) to logits [B, L, V]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds")
        x = self.embed(input_ids) if input_ids is not None else inputs_embeds
        assert x is not None
        if x.shape[1] > self.config.max_position_embeddings:
            raise UserError(
                f"a sequence of {x.shape[1]} positions: this model has {self.config.max_position_embeddings}"
            )
        if attention_allowed is not None and attention_allowed.shape[-2:] != (x.shape[1], x.shape[1]):
            raise UserError(
                f"attention_allowed of shape {tuple(attention_allowed.shape)}: must be [B, {x.shape[1]}, {x.shape[1]}]"
            )
        hidden = self.encode(x, torch.arange(x.shape[1], device=x.device), FullAttention(attention_allowed))
        weight, bias = self.text_head()
        return F.linear(hidden, weight, bias)

    def project_clip(self, features: Tensor) -> Tensor:
        """CLIP-ViT patch features [B, patches, 1024] to embeddings [B, patches, D] (the w_clip_vit variant)."""
        if not self.config.w_clip_vit:
            raise UserError("this checkpoint has no mm_projector: use a w_clip_vit variant, or image codes")
        return self.mm_projector(features.to(self.dtype))

    def _angles(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        table = self._rotary.get((device, dtype))
        if table is None:
            dim = self.config.rotary_dim
            inverse = 1.0 / self.config.rope_theta ** (torch.arange(0, dim, 2, device=device).float() / dim)
            angle = torch.arange(self.config.max_position_embeddings, device=device).float()[:, None] * inverse
            angle = torch.cat([angle, angle], dim=-1)
            table = self._rotary[(device, dtype)] = (angle.cos().to(dtype), angle.sin().to(dtype))
        return table

    # --- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Showo:
        """Load a published checkpoint: a folder or hub id with config.json and .safetensors or .bin, whole or sharded.

        The language model's config is looked for under `llm_model_path` beside the weights; without it Phi-1.5's
        numbers are taken. Raises UserError naming every weight that is missing, left over or of another shape.
        """
        from ..registry import refuse_others

        folder = resolve(path)
        refuse_others(folder, "show-o")
        weights = load_state_dict(folder)
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        config = ShowoConfig.from_checkpoint(read_config(folder), shapes, folder)
        with torch.device("meta"):
            model = cls(config)
        assign(model, {key: value.to(device=device, dtype=dtype) for key, value in weights.items()}, folder)
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.adjoin()
        return model.requires_grad_(False).eval()

    def identity(self) -> dict[str, object]:
        names = ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens", "hidden_size")
        return {name: getattr(self.config, name) for name in (*names, "num_hidden_layers", "num_attention_heads")}

    def save_pretrained(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write config.json (all sizes in one file) and model.safetensors. An attached concept is saved on its own."""
        weights = {key: value.to(dtype) if dtype else value for key, value in self.state_dict().items()}
        save_safetensors_atomic(Path(path) / "model.safetensors", weights)
        config = {"_class_name": "Showo", **asdict(self.config), "mask_token_id": self.config.vocab_size - 1}
        write_json(Path(path) / "config.json", config)
