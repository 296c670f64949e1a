"""Layers whose weights are spread over ranks (FSDP2): `grpo.shard=full`, for bodies that do not fit a GPU beside what
learning needs.

Each transformer layer is a unit of `fully_shard`: its weights are gathered when it runs, forward and backward, and its
gradients scattered in float32, as a sum. Embedding, head and norms outside of layers stay whole on every rank. For
rollouts plain layers with the whole weights stand in their places: gathered once, and no rank waits for another while
it samples. Where these do not fit (`ahead`), each layer is gathered as it runs, with the next two on their way. With
`grpo.offload` the parts lie in the host's memory: a layer's weights go to the GPU to be gathered there, its gradients
come back, and AdamW runs on the CPU.

Ranks must make the same calls in the same order, so each has as many rows of each group as any other
(:func:`check_shares`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ...models import MaskedModel
from ...utils import profiling
from ...utils.errors import UserError
from .plan import AHEAD
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
    ahead: whether rollouts gather each layer as it runs. What then needs all weights at once has them on the CPU.
    """

    def __init__(self, model: MaskedModel, ranks: Ranks, offload: bool = False, ahead: bool = False):
        self.model, self.ranks, self.layers, self.ahead = model, ranks, model.shardable_layers(), ahead
        if self.layers is None:
            raise UserError(
                f"grpo.shard=full: the layers of {model.family} cannot be spread: use grpo.shard=optimizer, or a model "
                "whose layers can (llada, mmada)"
            )
        self._plain = [copy.deepcopy(layer).to("meta") for layer in self.layers]
        # from pinned memory gradients would arrive after the hooks that add them up in float32 (train/optimizer.py)
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
        # each layer is a root of its own: without this the gathered weights of one leave no memory to the next
        if hasattr(fsdp, "share_comm_ctx"):
            fsdp.share_comm_ctx(self._spread())
        elif ahead:
            raise UserError(f"grpo.rollout_gather=ahead needs torch ≥ 2.10, and this is {torch.__version__}")
        if ahead:
            self._gather_in_turn()  # the first time FSDP2 readies a layer, which must not be ahead of its turn

    @torch.no_grad()
    @profiling.phase("synchronisation")
    def _gathered(self) -> list[nn.Module]:
        """Plain layers with the whole weights as they are now."""
        made = []
        for layer, plain in zip(self._layers(), self._plain, strict=True):
            plain = copy.deepcopy(plain)
            with self.ranks.noticing():
                state = {
                    name: whole(value.to(self.ranks.device)).to("cpu" if self.ahead else self.ranks.device)
                    for name, value in layer.state_dict().items()
                }
            learns = {name for name, value in layer.named_parameters() if value.requires_grad}
            plain.load_state_dict(state, assign=True)
            for name, parameter in plain.named_parameters():
                parameter.requires_grad_(name in learns)
            made.append(plain.train(layer.training))
        return made

    def _layers(self) -> nn.ModuleList:
        assert self.layers is not None
        return self.layers

    def _spread(self) -> list[FSDPModule]:
        return [layer for layer in self._layers() if isinstance(layer, FSDPModule)]

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

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Around what computes for long without gradients, as often as each rank needs."""
        if not self.ahead:
            with self.whole():
                yield
            return
        layers, modules = self._spread(), self._layers()
        with self.ranks.taking_turns(self._gather_in_turn) as my_turn, ExitStack() as undo:
            passes = _Passes(my_turn)
            undo.callback(modules[0].register_forward_pre_hook(passes.begin, prepend=True).remove)
            undo.callback(modules[-1].register_forward_hook(passes.end).remove)
            for place, layer in enumerate(layers):
                layer.set_modules_to_forward_prefetch(layers[place + 1 : place + 1 + AHEAD])
                undo.callback(layer.set_modules_to_forward_prefetch, [])
            yield

    def _gather_in_turn(self) -> None:
        """The calls of a forward pass of another rank."""
        for layer in self._spread():
            layer.unshard()
            layer.reshard()

    def undo(self) -> None:
        """Leave plain layers with the whole weights for good; with `ahead` the model is on the CPU from then on."""
        layers = self._layers()
        for place, plain in enumerate(self._gathered()):
            layers[place] = plain
        if self.ahead:
            self.model.to("cpu")


@dataclass
class _Passes:
    """The forward passes of one rank, which tells the others of each."""

    my_turn: Callable[[], None]
    running: bool = False

    def begin(self, *_: object) -> None:
        if self.running:  # the last pass has not come to its end: memory ran out
            raise UserError(
                "a rollout does not fit into memory, and with grpo.rollout_gather=ahead it cannot be split, because "
                "all ranks gather each layer together: lower grpo.group_size or grpo.groups, or start more ranks"
            )
        self.my_turn()
        self.running = True

    def end(self, *_: object) -> None:
        self.running = False


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
