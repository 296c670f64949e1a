"""Show-o's layers: Phi's, with layer norm on q and k, partial rotary, attention beside the MLP, tanh-GELU.

Module names are those of the published checkpoint. Who sees what is decided by a strategy of attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ...ops.reference import partial_rotary
from ...ops.rotary import qk_norm_rotary
from ..adjoining import Whole, adjoin, all_of, in_one
from ..fused_gelu import linear_gelu
from .attention import Attention
from .sizes import ShowoConfig


class SelfAttention(nn.Module):
    def __init__(self, config: ShowoConfig):
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)
        if config.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(head, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(head, eps=config.layer_norm_eps)
        self.normalise = config.qk_layernorm
        self.adjoin()

    @property
    def three(self) -> Sequence[nn.Module]:
        """The layers of queries, keys and values."""
        return self.q_proj, self.k_proj, self.v_proj

    def adjoin(self) -> None:
        """Let queries, keys and values come from one product where no gradient is formed."""
        adjoin(self.three)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfAttention:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # moves and casts put each parameter into a place of its own
        self.adjoin()
        return self

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, whole: Whole | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, L, E], turned by position. `whole`: the three layers as one, where that is
        known; by default it is found out."""
        three = all_of(self.three, x) if whole is None else in_one(self.three, x, whole)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in three)
        if self.normalise:
            norm_q, norm_k = self.q_layernorm, self.k_layernorm
            parameters = norm_q.weight, norm_q.bias, norm_k.weight, norm_k.bias
            q, k = qk_norm_rotary(q, k, cos, sin, *parameters, norm_q.eps)
        else:
            q, k = partial_rotary(q, cos, sin), partial_rotary(k, cos, sin)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attention) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        return self.dense(attend(layer, q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: ShowoConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, fused: bool | None = None) -> Tensor:
        return self.fc2(linear_gelu(self.fc1, x, fused))


class Block(nn.Module):
    def __init__(self, config: ShowoConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attention) -> Tensor:
        h = self.input_layernorm(x)
        return self.self_attn(h, cos, sin, layer, attend) + self.mlp(h) + x

    def joined(self, x: Tensor, h: Tensor, attended: Tensor, fused: bool) -> Tensor:
        """The block's result from its input `x`, the norm of that and what was attended [B, H, L, E]; `fused`: whether
        GELU is part of the product before it."""
        return self.self_attn.dense(attended.transpose(1, 2).flatten(2)) + self.mlp(h, fused) + x


class Decoder(nn.Module):
    def __init__(self, config: ShowoConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CausalLM(nn.Module):
    def __init__(self, config: ShowoConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
