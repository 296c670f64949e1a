"""aMUSEd's network, diffusers' `UVit2DModel`, computed from its own modules: the same values with less work.

What a text is to an attention, its keys and values, is computed once a prompt (:func:`keys_and_values`) and shared by
its rows and steps; diffusers projects the text anew for each row and step. The condition goes through its layers once a
prompt as well. Modules are called, never their weights read, so adapters in them count.

On a CPU three things are laid out otherwise, because they take longer than the products beside them
(docs/measured-facts.md): keys are padded to a multiple of 16, gates are copied side by side before their GELU, and
results that nobody needs for a gradient are overwritten.

Source: diffusers' UVit2DModel; Patil et al., "aMUSEd", 2024. GRN: Woo et al., "ConvNeXt V2", 2023.

Shape suffixes: B rows, P prompts, N image codes, L text positions, D width, E head width, H heads, K codebook.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .sdpa import attend

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

_LANES = 16
"""Float32 numbers of an AVX-512 register: attention over keys of another number takes up to twice as long on a CPU."""


class UVit(Protocol):
    """What is called of diffusers' UVit2DModel, which has no types for it."""

    embed: nn.Module
    down_block: Any
    project_to_hidden_norm: nn.Module
    project_to_hidden: nn.Module
    transformer_layers: nn.ModuleList
    project_from_hidden_norm: nn.Module
    project_from_hidden: nn.Module
    up_block: Any
    mlm_layer: Any


def keys_and_values(net: UVit, states_LD: Tensor) -> list[Tensor]:
    """[2, H, L, E] of one text for each attention that reads it, in the order the network runs them; on a CPU L is
    padded with zeros to a multiple of 16."""
    made = []
    for mapper, attention in _readers(net):
        read_LD = states_LD if mapper is None else mapper(F.silu(states_LD))
        pair = torch.stack([attention.to_k(read_LD), attention.to_v(read_LD)])
        if pair.device.type == "cpu":
            pair = F.pad(pair, (0, 0, 0, -pair.shape[1] % _LANES))
        made.append(pair.unflatten(-1, (attention.heads, -1)).transpose(1, 2))
    return made


def _readers(net: Any) -> Iterator[tuple[Any, Any]]:
    """(mapper of the text or None, attention) of every attention over the text."""
    for part in (net.down_block, net.transformer_layers, net.up_block):
        if part is net.transformer_layers:
            yield from ((None, layer.attn2) for layer in part)
            continue
        for block in part.attention_blocks:
            yield block.kv_mapper, block.attn1
            yield block.kv_mapper, block.attn2


class Texts:
    """What rows read: the keys and values of their prompts, taken in the order of :func:`keys_and_values`."""

    def __init__(self, of_prompt: Sequence[Sequence[Tensor]], length: int, prompt_of_row: Sequence[int]):
        runs = [(prompt, len(list(rows))) for prompt, rows in groupby(prompt_of_row)]
        self._size = math.gcd(*(count for _, count in runs))
        self._pieces = [prompt for prompt, count in runs for _ in range(count // self._size)]
        self._of_prompt, self._length = of_prompt, length
        padded = of_prompt[0][0].shape[-2]
        self._seen: Tensor | None = None
        if padded > length:
            like = of_prompt[0][0]
            self._seen = torch.zeros(1, 1, 1, padded, dtype=like.dtype, device=like.device)
            self._seen[..., length:] = -torch.inf

    def attended(self, attention: Attention, number: int, x_BND: Tensor) -> Tensor:
        """[B, N, D] that the attention of this number adds. Rows that stand side by side and read one prompt are
        attended as one long row."""
        pairs = torch.stack([self._of_prompt[prompt][number] for prompt in self._pieces])
        q = attention.to_q(x_BND)
        long = q.view(len(self._pieces), -1, q.shape[-1]).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        seen = attend(long, pairs[:, 0], pairs[:, 1], self._seen)
        return attention.to_out[0](seen.transpose(1, 2).reshape(q.shape))


def hidden(
    net: UVit,
    ids_BHW: Tensor,
    condition_PD: Tensor,
    place_of_row: Tensor,
    texts: Texts,
    recomputed: bool | int = 0,
) -> Tensor:
    """What the last convolution multiplies, [B, N, D], at ids int64 [B, height, width].

    Row b is drawn under condition `place_of_row[b]` and reads `texts`. `recomputed`: how many transformer layers are
    computed again in the backward pass, True for all.
    """
    active_PD = F.silu(condition_PD)
    x = net.embed(ids_BHW)
    x = _block(net.down_block, x, active_PD, place_of_row, texts, 0)
    high, wide = x.shape[-2:]
    x = net.project_to_hidden(net.project_to_hidden_norm(x.flatten(2).transpose(1, 2)))
    first = 2 * len(net.down_block.res_blocks)
    again = 0 if not torch.is_grad_enabled() else len(net.transformer_layers) if recomputed is True else recomputed
    for place, layer in enumerate(net.transformer_layers):
        run = partial(_layer, layer, active_PD=active_PD, of_row=place_of_row, texts=texts, number=first + place)
        x = checkpoint(run, x, use_reentrant=False) if place < again else run(x)
    x = net.project_from_hidden(net.project_from_hidden_norm(x)).transpose(1, 2).unflatten(2, (high, wide))
    x = _block(net.up_block, x, active_PD, place_of_row, texts, first + len(net.transformer_layers))
    x = net.mlm_layer.conv1(x)
    return net.mlm_layer.layer_norm(x.flatten(2).transpose(1, 2))


def _block(block: Any, x: Tensor, active_PD: Tensor, of_row: Tensor, texts: Texts, number: int) -> Tensor:
    """Convolutions [B, D, height, width] with attention over the text between them."""
    if block.downsample is not None:
        x = block.downsample(x)
    for mixing, reading in zip(block.res_blocks, block.attention_blocks, strict=True):
        x = _mixed(mixing, x, active_PD, of_row)
        high, wide = x.shape[-2:]
        flat = x.flatten(2).transpose(1, 2)
        for norm, attention in ((reading.norm1, reading.attn1), (reading.norm2, reading.attn2)):
            flat = _added(flat, texts.attended(attention, number, norm(flat)))
            number += 1
        x = flat.transpose(1, 2).unflatten(2, (high, wide))
    return x if block.upsample is None else block.upsample(x)


def _mixed(block: Any, x: Tensor, active_PD: Tensor, of_row: Tensor) -> Tensor:
    """A ConvNeXt block under the condition."""
    inner = block.channelwise_linear_1(block.norm(block.depthwise(x).permute(0, 2, 3, 1)))
    if torch.is_grad_enabled() or inner.device.type != "cpu":
        inner = block.channelwise_norm(block.channelwise_act(inner))
    else:
        inner = _response_normed(block.channelwise_norm, torch.ops.aten.gelu_(inner))
    x = _added(x, block.channelwise_linear_2(inner).permute(0, 3, 1, 2))
    scale, shift = block.cond_embeds_mapper(active_PD)[of_row, :, None, None].chunk(2, dim=1)
    return torch.addcmul(shift, x, 1 + scale)


def _response_normed(norm: Any, x: Tensor) -> Tensor:
    """Global response normalisation of x [B, height, width, D], which is overwritten."""
    size = x.square().sum((1, 2), keepdim=True).sqrt_()
    share = size / (size.mean(-1, keepdim=True) + 1e-6)
    return torch.addcmul(norm.beta, x, 1 + norm.gamma * share, out=x)


def _layer(layer: Any, x: Tensor, active_PD: Tensor, of_row: Tensor, texts: Texts, number: int) -> Tensor:
    """A transformer layer: self-attention, attention over the text, gated products."""
    own = layer.attn1
    h = _adapted(layer.norm1, x, active_PD, of_row)
    q, k, v = (project(h).unflatten(-1, (own.heads, -1)).transpose(1, 2) for project in (own.to_q, own.to_k, own.to_v))
    x = _added(x, own.to_out[0](attend(q, k, v).transpose(1, 2).flatten(2)))
    x = _added(x, texts.attended(layer.attn2, number, _adapted(layer.norm2, x, active_PD, of_row)))
    value, gate = layer.ff.net[0].proj(_adapted(layer.norm3, x, active_PD, of_row)).chunk(2, dim=-1)
    gate = gate.contiguous()
    gated = F.gelu(gate) * value if torch.is_grad_enabled() else torch.ops.aten.gelu_(gate).mul_(value)
    return _added(x, layer.ff.net[2](gated))


def _adapted(norm: Any, x_BND: Tensor, active_PD: Tensor, of_row: Tensor) -> Tensor:
    """Normed, then scaled and shifted by the condition."""
    scale, shift = norm.linear(active_PD)[of_row, None].chunk(2, dim=-1)
    return torch.addcmul(shift, norm.norm(x_BND), 1 + scale)


def _added(x: Tensor, new: Tensor) -> Tensor:
    """Their sum, in place of `new` where no gradient is wanted."""
    return x + new if torch.is_grad_enabled() else new.add_(x)
