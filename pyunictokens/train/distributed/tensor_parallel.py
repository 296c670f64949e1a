"""Tensor-parallel rollouts: each layer's matrices split over ranks, by heads and inner units, for drawing and writing
with a body that does not fit one GPU.

    q, k, v, gate, up: a part of their outputs each        attention's and the MLP's output: a part of their inputs

Ranks add up what the last of these give, twice a layer, so all make the same calls with the same rows and see the same
codes. Nothing learns here: training spreads layers by `grpo.shard=full` (sharded_layers.py).
"""

from __future__ import annotations

import torch
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ...models import MaskedModel
from ...models.llama_body import Block
from ...utils.errors import UserError
from .ranks import Ranks

BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")
BY_INPUT = ("attn_out", "ff_out")


@torch.no_grad()
def split_layers(model: MaskedModel, ranks: Ranks) -> None:
    """Leave on each rank its part of every layer of `model`, which all ranks hold whole; nothing is sent. Embedding and
    head stay whole. `RolloutEngine` then draws and writes as before, on all ranks together.

    Raises UserError for a model whose layers cannot be split, for adapters that are not merged, and where the ranks do
    not divide the heads or the inner width.
    """
    layers = [layer for layer in model.shardable_layers() or () if isinstance(layer, Block)]
    if not layers:
        raise UserError(f"the layers of {model.family} cannot be split over ranks: use llada, mmada or lumina-dimoo")
    for name in (*BY_OUTPUT, *BY_INPUT):
        if type(getattr(layers[0], name)) is not torch.nn.Linear:
            raise UserError(f"{name} holds an adapter: merge adapters before layers are split (Policy.merge)")
    heads, inner = layers[0].k_proj.out_features // layers[0].head_dim, layers[0].ff_proj.out_features
    if heads % ranks.world or inner % ranks.world:
        raise UserError(
            f"{ranks.world} ranks: must divide the {heads} heads of keys and the inner width {inner} of {model.family}"
        )
    if ranks.world == 1:
        return
    for layer in layers:
        styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in BY_OUTPUT}
        styles |= {name: RowwiseParallel() for name in BY_INPUT}
        parallelize_module(layer, ranks.mesh(), styles, src_data_rank=None)
