"""AdamW over the trained parameters with clipping and a schedule, in float32 whatever the model's precision.

Parameters of lower precision get float32 master weights that the optimizer works on and that gather their gradients: a
step of 1e-6 would vanish in bfloat16's rounding, and so would the last of many gradients added up. With several ranks
gradients are summed over them once a step, and every rank does the same step. State is kept by parameter name, so that
it can be saved. distributed/sharded_optimizer.py spreads its state over ranks.

With `ema_decay` the average of the weights over steps is kept as well (Polyak and Juditsky, 1992): steps that are large
enough to find something new are too large to settle, and the average settles without waiting for the rate to fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config.training import GrpoConfig
from ..utils.errors import UserError
from .distributed.ranks import Ranks

PARTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of one tensor."""
AVERAGED = "average_steps"
"""In a checkpoint, the number of steps that the average of the weights holds."""


def learning_rate(step: int, *, lr: float, steps: int, warmup: int = 0, schedule: str = "constant") -> float:
    """The learning rate of step `step` (from 0) of `steps`: a linear warm-up, then constant or a half cosine to 0."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return lr
    if schedule != "cosine":
        raise ValueError(f"schedule={schedule!r}: must be constant or cosine")
    return lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def make_optimizer(config: GrpoConfig, named: Mapping[str, nn.Parameter], ranks: Ranks) -> Optimizer:
    """AdamW as `config` says, its state spread over the ranks where that is wanted. Concept rows are never decayed."""
    kind: Callable[..., Optimizer] = Optimizer
    wanted = config.shard in ("optimizer", "full") or (config.shard == "auto" and config.trainable == "full")
    if wanted and ranks.world > 1:
        from .distributed.sharded_optimizer import ShardedOptimizer

        kind = ShardedOptimizer
    return kind(
        named,
        lr=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        undecayed=frozenset(name for name in named if name.startswith("concept.")),
        ranks=ranks,
        ema_decay=config.ema_decay,
    )


class Gathers(Protocol):
    """Where gradients of a parameter are added up: a tensor, or a sum beside it."""

    grad: Tensor | None


class Optimizer:
    """AdamW over `named` parameters; those in `undecayed` get no weight decay. `ema_decay` is that of the average of
    the weights; 0 keeps none."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        undecayed: frozenset[str] = frozenset(),
        ranks: Ranks | None = None,
        ema_decay: float = 0.0,
    ):
        if not named:
            raise UserError("nothing to train: no parameter requires a gradient")
        self.named = dict(named)
        self.max_grad_norm = max_grad_norm
        self.ranks = ranks or Ranks()
        self._masters: dict[str, Tensor] = {name: self._master(value) for name, value in self.named.items()}
        self._hooks = [
            value.register_post_accumulate_grad_hook(_into(self._gathering(name)))
            for name, value in self.named.items()
            if self._gathering(name) is not value
        ]
        groups = [
            {"params": [self._masters[n] for n in self.named if (n in undecayed) == bare], "weight_decay": decay}
            for bare, decay in ((False, weight_decay), (True, 0.0))
        ]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.999), eps=eps
        )
        self.ema_decay = ema_decay
        self._average = {n: value.detach().clone() for n, value in self._masters.items()} if ema_decay else {}
        self._averaged_steps = torch.zeros(())

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """What AdamW works on in place of `parameter`."""
        return parameter if parameter.dtype == torch.float32 else parameter.detach().float().clone()

    def _gathering(self, name: str) -> Gathers:
        """Whose `grad` gathers a parameter's gradients in float32."""
        return self._masters[name]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for name, value in self.named.items():
            value.grad = self._masters[name].grad = None

    def release(self) -> None:
        """Forget all gradients and let go of the parameters; another optimizer may then take them."""
        self.zero_grad()
        for hook in self._hooks:
            hook.remove()

    def grad_norm(self) -> float:
        """The length of the whole gradient, in float32."""
        norms = [torch.linalg.vector_norm(p.grad.detach()) for p in self._masters.values() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def _sum_gradients(self) -> None:
        """Bring the sum over ranks into the masters' gradients."""
        self.ranks.sum_gradients(self._masters)

    def step(self, lr: float) -> float:
        """Sum the gradient over ranks, clip it and take one step, all ranks alike. Returns the gradient's length before
        clipping; one that is not finite leaves everything as it was."""
        self._sum_gradients()
        norm = self.grad_norm()
        if not math.isfinite(norm):
            return norm
        scale = 1.0
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            scale = self.max_grad_norm / (norm + 1e-6)
        for master in self._masters.values():
            if master.grad is not None and scale != 1.0:
                master.grad.mul_(scale)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        with torch.no_grad():
            self._put(self._masters)
            self._add_to_average()
        return norm

    def _add_to_average(self) -> None:
        """The first steps count more, so that the average is never mostly the weights that training began with."""
        if not self._average:
            return
        self._averaged_steps += 1
        steps = float(self._averaged_steps)
        new = 1.0 - min(self.ema_decay, (1.0 + steps) / (10.0 + steps))
        for name, value in self._average.items():
            value.lerp_(self._masters[name].detach(), new)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        """Bring `values`, which lie as the masters do, into the parameters."""
        for name, parameter in self.named.items():
            if values[name] is not parameter:
                parameter.copy_(values[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context the parameters hold the average, where one is kept. All ranks enter and leave together,
        and no graph may be alive across its borders."""
        if not self._average:
            yield
            return
        own = {n: p.detach().clone() if self._masters[n] is p else self._masters[n] for n, p in self.named.items()}
        with torch.no_grad():
            self._put(self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                self._put(own)

    @torch.no_grad()
    def settle(self) -> None:
        """Leave the average in the parameters for good, where one is kept; no step may follow."""
        if self._average:
            self._put(self._average)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counts, master weights and their average as a flat table of tensors."""
        tensors: dict[str, Tensor] = self._averaging()
        tensors.update({f"average.{name}": value for name, value in self._average.items()})
        for name, parameter in self.named.items():
            master = self._masters[name]
            if master is not parameter:
                tensors[f"master.{name}"] = master
            for part, value in self.adam.state.get(master, {}).items():
                tensors[f"optim.{name}.{part}"] = torch.as_tensor(value)
        return tensors

    def _averaging(self) -> dict[str, Tensor]:
        """How many steps the average holds, which every rank knows."""
        return {AVERAGED: self._averaged_steps} if self._average else {}

    def shards(self) -> dict[str, Tensor]:
        """State that is spread over ranks, by the same names; empty here, where every rank has all."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], shards: Path | None, origin: object = "checkpoint") -> None:
        """Put back what any number of ranks saved: `tensors`, and the folder of what was spread over them."""
        if shards is not None:
            from .checkpoint.shards import read_whole

            tensors = {**tensors, **read_whole(shards)}
        self.load_state_dict(tensors, origin)

    def load_state_dict(self, tensors: Mapping[str, Tensor], origin: object = "checkpoint") -> None:
        """Put what :meth:`state_dict` gave back. Raises UserError for a tensor of another shape."""
        with torch.no_grad():
            self._restore_averaging(tensors, origin)
            for name, value in self._average.items():
                value.copy_(fitting(tensors, f"average.{name}", value.shape, origin))
            for name, parameter in self.named.items():
                master = self._masters[name]
                if master is not parameter:
                    master.copy_(fitting(tensors, f"master.{name}", master.shape, origin))
                state = {part: tensors.get(f"optim.{name}.{part}") for part in PARTS}
                if all(value is None for value in state.values()):
                    continue
                self.adam.state[master] = {
                    part: fitting(
                        tensors, f"optim.{name}.{part}", torch.Size() if part == "step" else master.shape, origin
                    ).to("cpu" if part == "step" else master.device, copy=True)
                    for part in PARTS
                }

    def _restore_averaging(self, tensors: Mapping[str, Tensor], origin: object) -> None:
        if self._average:
            self._averaged_steps.copy_(fitting(tensors, AVERAGED, torch.Size(), origin))


def _into(master: Gathers) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's new gradient to its master weight, or to whatever has a `grad`."""

    def gather(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return gather


def fitting(tensors: Mapping[str, Tensor], name: str, shape: torch.Size, origin: object) -> Tensor:
    """The tensor `name`. Raises UserError where it is missing or of another shape."""
    value = tensors.get(name)
    if value is None or value.shape != shape:
        found = "missing" if value is None else f"of shape {tuple(value.shape)}"
        raise UserError(f"{origin}: {name} is {found}, this run needs {tuple(shape)}")
    return value
