"""Layers whose weights are spread over ranks (FSDP2): `grpo.shard=full`, for bodies that do not fit a GPU beside what
learning needs.

Each transformer layer is a unit of `fully_shard`: its weights are gathered when it runs, forward and backward, and its
gradients scattered in float32, as a sum. Embedding, head and norms outside of layers stay whole on every rank. Where no
gradient is wanted for long (a step's rollouts, evaluations, files), plain layers with the whole weights stand in their
places (:meth:`ShardedLayers.whole`): gathered once, and no rank waits for another while it samples. With
`grpo.offload` the parts lie in the host's memory: a layer's weights go to the GPU to be gathered there, its gradients
come back, and AdamW runs on the CPU.

Ranks must make the same calls in the same order, so each has as many rows of each group as any other
(:func:`check_shares`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ...models import MaskedModel
from ...utils import profiling
from ...utils.errors import UserError
from .ranks import Ranks


def check_shares(groups: int, group_size: int, micro_rows: int, micro_timesteps: int, world: int) -> None:
    """Raise UserError where ranks would have other numbers of rows or microbatches than others."""
    even = groups % world == 0 or (world % groups == 0 and group_size % (world // groups) == 0)
    if not even:
        raise UserError(
            f"grpo.shard=full on {world} ranks with groups={groups} of {group_size}: ranks must have equal parts of "
            f"the groups: set grpo.groups to a multiple of {world}, or for one group grpo.group_size"
        )
    if not (micro_rows and micro_timesteps):
        raise UserError(
            "grpo.shard=full needs equal microbatches on all ranks: set grpo.micro_rows and grpo.micro_timesteps"
        )


class ShardedLayers:
    """The layers of one model, spread over ranks. All calls are made by all ranks together.

    offload: whether each rank's parts lie in the host's memory.
    """

    def __init__(self, model: MaskedModel, ranks: Ranks, offload: bool = False):
        self.ranks, self.layers = ranks, model.shardable_layers()
        if self.layers is None:
            raise UserError(
                f"grpo.shard=full: the layers of {model.family} cannot be spread: use grpo.shard=optimizer, or a model "
                "whose layers can (llada, mmada)"
            )
        self._plain = [copy.deepcopy(layer).to("meta") for layer in self.layers]
        # from pinned memory gradients would arrive after the hooks that add them up in float32 (optimizer.py)
        where = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
        for layer in self.layers:
            fully_shard(
                layer,
                mesh=ranks.mesh(),
                reshard_after_forward=True,
                mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
                offload_policy=where,
            )
            assert isinstance(layer, FSDPModule)
            layer.set_gradient_divide_factor(1.0)  # the loss is divided by all rows already
            layer.set_force_sum_reduction_for_comms(True)

    @torch.no_grad()
    @profiling.phase("synchronisation")
    def _gathered(self) -> list[nn.Module]:
        """Plain layers with the whole weights as they are now."""
        made = []
        for layer, plain in zip(self._layers(), self._plain, strict=True):
            plain = copy.deepcopy(plain)
            with self.ranks.noticing():
                state = {name: whole(value.to(self.ranks.device)) for name, value in layer.state_dict().items()}
            learns = {name for name, value in layer.named_parameters() if value.requires_grad}
            plain.load_state_dict(state, assign=True)
            for name, parameter in plain.named_parameters():
                parameter.requires_grad_(name in learns)
            made.append(plain.train(layer.training))
        return made

    def _layers(self) -> nn.ModuleList:
        assert self.layers is not None
        return self.layers

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside this context the model has plain layers with the whole weights; what is done to them is lost."""
        layers, spread = self._layers(), list(self._layers())
        for place, plain in enumerate(self._gathered()):
            layers[place] = plain
        try:
            yield
        finally:
            for place, layer in enumerate(spread):
                layers[place] = layer

    def undo(self) -> None:
        """Leave plain layers with the whole weights for good."""
        layers = self._layers()
        for place, plain in enumerate(self._gathered()):
            layers[place] = plain


def whole(value: Tensor) -> Tensor:
    """A tensor that is spread over ranks as a whole one, which all ranks ask for together; another as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `value`, which every rank has whole, as `like` is spread; nothing is sent. As it is where
    `like` is not spread."""
    if not isinstance(like, DTensor):
        return value
    spread = distribute_tensor(
        value.to(device=like.device, dtype=like.dtype), like.device_mesh, like.placements, src_data_rank=None
    )
    return spread.to_local()


def local(value: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value
