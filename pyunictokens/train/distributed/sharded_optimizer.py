"""AdamW whose state is spread over ranks: what full weights need on several GPUs.

Every rank keeps whole weights in the model's precision, because a rollout runs the forward pass 2·T times a step and
would gather them each time; spread are the float32 masters and AdamW's two moments, as DTensors cut along their first
dimension. A step is a reduce-scatter of gradients, AdamW on the own part, an all-gather of new weights. Gradients of a
step are summed over its microbatches in a whole float32 tensor a parameter first, so ranks speak once a step.
Parameters that are spread themselves (sharded_layers.py) have gradients that are summed already.

How that state lies on disk is train/checkpoint/shards.py's business. docs/distributed.md compares the modes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from ...utils import profiling
from ...utils.errors import UserError
from ..checkpoint.shards import read_parts, shapes
from ..optimizer import PARTS, Gathers, Optimizer, fitting
from .ranks import Ranks


@dataclass
class _Sum:
    """The gradient of a parameter of lower precision, added up in float32."""

    grad: Tensor | None = None


class ShardedOptimizer(Optimizer):
    """:class:`Optimizer` with masters and moments spread over its ranks; the same numbers but for the order of sums."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        undecayed: frozenset[str] = frozenset(),
        ranks: Ranks,
        ema_decay: float = 0.0,
    ):
        self._mesh = ranks.mesh()
        # float32 parameters gather their gradients themselves, others here; those that are spread in their masters
        self._sums: dict[str, Gathers] = {
            name: value if value.dtype == torch.float32 else _Sum()
            for name, value in named.items()
            if not isinstance(value, DTensor)
        }
        super().__init__(
            named,
            lr=lr,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            undecayed=undecayed,
            ranks=ranks,
            ema_decay=ema_decay,
        )

    def _spread(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that all ranks have; nothing is sent."""
        if whole.dim() == 0:
            raise UserError("a parameter without dimensions cannot be spread: set grpo.shard=none")
        return distribute_tensor(whole.detach().float(), self._mesh, [Shard(0)], src_data_rank=None)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if isinstance(parameter, DTensor):
            return super()._master(parameter)
        return self._spread(parameter).clone()

    def _gathering(self, name: str) -> Gathers:
        return self._sums[name] if name in self._sums else self._masters[name]

    def zero_grad(self) -> None:
        super().zero_grad()
        for each in self._sums.values():
            each.grad = None

    def _sum_gradients(self) -> None:
        for name in self.ranks.learned(self._sums):
            own, self._sums[name].grad = self._sums[name].grad, None
            if own is None:
                own = torch.zeros_like(self.named[name], dtype=torch.float32)
            with profiling.phase("synchronisation"), self.ranks.noticing():
                gradient = DTensor.from_local(own, self._mesh, [Partial("sum")], run_check=False)
                self._masters[name].grad = gradient.redistribute(placements=[Shard(0)])

    def grad_norm(self) -> float:
        device = next(iter(self.named.values())).device
        parts = [_local(master.grad) for master in self._masters.values() if master.grad is not None]
        squares = [torch.linalg.vector_norm(part).square().to(device) for part in parts]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=device)
        return math.sqrt(float(self.ranks.sum(total)))

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.named.items():
            if values[name] is parameter:
                continue
            value = values[name].to(parameter.dtype)
            if name in self._sums and isinstance(value, DTensor):  # whole parameters of spread masters
                with profiling.phase("synchronisation"), self.ranks.noticing():
                    value = value.full_tensor()
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Hardly anything: what is large is in :meth:`shards`."""
        return self._averaging()

    def shards(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            state[f"master.{name}"] = master.detach()
            if name in self._average:
                state[f"average.{name}"] = self._average[name]
            for part, value in self.adam.state.get(master, {}).items():
                state[f"optim.{name}.{part}"] = value
        return state

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], shards: Path | None, origin: object = "checkpoint") -> None:
        """Put back what any number of ranks saved; parameters are taken as they are now, so load them first."""
        held = self._read(shards, origin) if shards is not None else None
        self._restore_averaging(tensors, origin)
        for name, value in self._average.items():
            key, shape = f"average.{name}", self.named[name].shape
            value.copy_(self._spread(fitting(tensors, key, shape, origin)) if held is None else held[key])
        for name, parameter in self.named.items():
            master = self._masters[name]
            if held is not None:
                master.copy_(held[f"master.{name}"])
            elif master is parameter:
                pass
            elif parameter.dtype == torch.float32:
                master.copy_(self._spread(parameter))
            else:
                master.copy_(self._spread(fitting(tensors, f"master.{name}", parameter.shape, origin)))
            keys = {part: f"optim.{name}.{part}" for part in PARTS}
            if not any(key in (tensors if held is None else held) for key in keys.values()):
                continue
            self.adam.state[master] = {
                part: held[key]
                if held is not None
                else fitting(tensors, key, torch.Size(), origin).clone()
                if part == "step"
                else self._spread(fitting(tensors, key, parameter.shape, origin)).to(master.device, copy=True)
                for part, key in keys.items()
            }

    def _read(self, folder: Path, origin: object) -> dict[str, Tensor]:
        """This rank's part of all tensors in `folder`, cut for the ranks of now."""
        known = shapes(folder)
        state: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            needed = [f"master.{name}", *([f"average.{name}"] if self._average else [])]
            for key in (*needed, f"optim.{name}.exp_avg", f"optim.{name}.exp_avg_sq"):
                if key in known:
                    state[key] = torch.zeros_like(self._masters[name])
                if known.get(key, parameter.shape) != parameter.shape or (key in needed and key not in known):
                    found = f"of shape {tuple(known[key])}" if key in known else "missing"
                    raise UserError(f"{origin}: {key} is {found}, this run needs {tuple(parameter.shape)}")
            if f"optim.{name}.step" in known:
                state[f"optim.{name}.step"] = torch.zeros(())
        read_parts(folder, state, self.ranks)
        return state


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
