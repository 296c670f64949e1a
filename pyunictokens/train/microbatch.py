"""How large a microbatch of the update is, and what happens when one does not fit: it is halved, and its gradients
exact.

A microbatch is a rectangle of rollouts × timesteps; its packed rows go through the model together. Sizes come from the
settings or, where they are 0, from the memory at hand (the model's costs of a packed row, then what the first
microbatch was measured to take), and so does the number of layers that are recomputed instead of kept. Gradients of a
microbatch are formed apart and added when all of them exist, so a microbatch that runs out of memory leaves nothing
behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models import MaskedModel
from ..utils.errors import UserError
from ..utils.memory import fits, free_bytes

log = logging.getLogger(__name__)

CPU_BYTES = 1 << 30
"""On a CPU a microbatch takes at most this (and at most a quarter of what is free): larger ones are not faster
there."""

USEFUL_ROWS = 4
"""Layers are recomputed only where fewer packed rows than this would fit without: so many keep a GPU busy."""

FREE_SHARE = 0.85
"""Part of the free memory that is planned with; the allocator needs some room between its blocks."""


@dataclass
class Microbatches:
    """The size of the microbatches of one kind of work, kept over a run; it shrinks when memory runs out and stays
    small.

    `rows` and `timesteps` bound the rectangle (0: no bound of its own), `packed` their product.
    """

    rows: int
    timesteps: int
    packed: int
    checkpointed: int = 0
    """Layers whose activations are recomputed."""
    planned_bytes: float = 0.0
    """Of one packed row, by the model of memory; 0 where the size was given."""
    measured_bytes: float = 0.0
    """Of one packed row, as the first microbatch was measured; 0 before, and on a CPU."""
    fixed_bytes: float = 0.0
    """What a microbatch takes whatever its size: a gradient for every weight that learns."""
    free_bytes: float = 0.0
    splits: int = 0
    """How often a microbatch ran out of memory and was halved."""
    fixed: bool = False
    """Whether they may not shrink: layers are spread over ranks, which make the same calls."""
    tried: bool = field(default=True, repr=False)
    """False until an automatic size has been measured."""

    @classmethod
    def choose(
        cls, model: MaskedModel, rows: int, timesteps: int, *, prompt: int, count: int, guided: bool, learn: bool = True
    ) -> Microbatches:
        """Sizes for the settings `rows` and `timesteps`; where one is 0, as much as fits the memory at hand.

        `prompt` is the longest prompt, `count` the codes of an image. Sets `model.checkpoint_layers` where it may and
        must choose.
        """
        if rows and timesteps:
            return cls(rows, timesteps, rows * timesteps, fixed=any(map(is_spread, model.parameters())))
        params = list(learning(model)) if learn else []
        kind = "full" if any(p.requires_grad for p in model.parameters()) else "concept"
        costs = model.costs
        layers = costs.layers
        fixed = float(sum(p.numel() * p.element_size() for p in params))
        free = free_memory(model.device)

        def row(checkpointed: int) -> float:
            if not learn:
                return costs.scoring_bytes(prompt, count, guided)
            return costs.activation_bytes(prompt, count, guided, kind, checkpointed)

        room = max(0.0, free - fixed)
        set_by_hand = int(model.checkpoint_layers) if model.checkpoint_layers is not True else layers
        checkpointed = set_by_hand
        while learn and checkpointed < layers and room < USEFUL_ROWS * row(checkpointed):
            checkpointed += 1
        if checkpointed != set_by_hand:
            model.checkpoint_layers = checkpointed
        packed = max(1, int(room / row(checkpointed)))
        if rows or timesteps:
            packed = max(packed, rows, timesteps)
        made = cls(rows, timesteps, packed, checkpointed, row(checkpointed), 0.0, fixed, free)
        if model.device.type == "cuda":
            made.packed, made.tried = max(1, packed // 2), False
        log.info("%s", made.report(layers))
        return made

    def report(self, layers: int) -> str:
        """One line for people: how large microbatches are and why."""
        line = f"microbatches of at most {self.packed} packed rows (rollout × timestep)"
        if not self.planned_bytes:
            return f"{line}, as set"
        size, gib = self.measured_bytes or self.planned_bytes, 2.0**30
        source = "measured" if self.measured_bytes else "planned"
        line += f": {size / gib:.2f} GiB a row ({source}), {self.fixed_bytes / gib:.2f} GiB of gradients, "
        line += f"{self.free_bytes / gib:.1f} GiB free"
        if self.checkpointed:
            line += f"; {self.checkpointed} of {layers} layers are recomputed"
        return line + (f"; halved {self.splits} times" if self.splits else "")

    # --- running ---------------------------------------------------------------------------------------------------

    def run(self, rows: int, timesteps: int, work: Callable[[slice, slice], None], device: torch.device) -> int:
        """Call `work(rows, timesteps)` on slices that cover rows × timesteps once; returns the number of microbatches.

        `work` must change nothing when it raises `torch.OutOfMemoryError`; its slice is then halved and taken again.
        Raises UserError when one rollout at one timestep does not fit.
        """
        done, waiting = 0, [(slice(0, rows), slice(0, timesteps))]
        while waiting:
            some, steps = waiting.pop()
            cut = self._cut(some, steps)
            if cut is None and not self._fits(work, some, steps, device):
                size = (some.stop - some.start) * (steps.stop - steps.start)
                if self.fixed:
                    raise UserError(
                        f"a microbatch of {size} packed rows does not fit into memory, and with grpo.shard=full all "
                        "ranks need equal ones: lower grpo.micro_rows or grpo.micro_timesteps, or set "
                        "grpo.checkpoint_layers=true"
                    )
                if size == 1:
                    raise UserError(
                        "one rollout at one timestep does not fit into memory: set grpo.checkpoint_layers=true, train "
                        "less (grpo.trainable=lora or concept), or use dtype=bfloat16"
                    )
                self.packed, self.splits = max(1, size // 2), self.splits + 1
                log.warning("out of memory with %d packed rows: going on with at most %d", size, self.packed)
                cut = self._cut(some, steps)
            if cut is None:
                done += 1
            else:
                waiting += reversed(cut)
        return done

    def _cut(self, rows: slice, steps: slice) -> list[tuple[slice, slice]] | None:
        """None where the rectangle may run as it is, else its parts in order: first rows apart, then timesteps."""
        wide, long = rows.stop - rows.start, steps.stop - steps.start
        most_rows = min(wide, self.rows or wide, self.packed)
        most_steps = min(long, self.timesteps or long, max(1, self.packed // most_rows))
        if (most_rows, most_steps) == (wide, long):
            return None
        if most_rows < wide:
            starts = range(rows.start, rows.stop, most_rows)
            return [(slice(start, min(start + most_rows, rows.stop)), steps) for start in starts]
        starts = range(steps.start, steps.stop, most_steps)
        return [(rows, slice(start, min(start + most_steps, steps.stop))) for start in starts]

    def _fits(self, work: Callable[[slice, slice], None], rows: slice, steps: slice, device: torch.device) -> bool:
        measure = not self.tried and device.type == "cuda"
        before = 0
        if measure:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        if fits(lambda: work(rows, steps), device):
            if measure:
                size = (rows.stop - rows.start) * (steps.stop - steps.start)
                self._learn(torch.cuda.max_memory_allocated(device) - before, size, device)
            return True
        self.tried = True
        return False

    def _learn(self, taken: float, size: int, device: torch.device) -> None:
        """Take the size from what a microbatch of `size` packed rows was measured to need."""
        self.tried = True
        # Never below a quarter of the plan: the first microbatch may find memory that was cached.
        self.measured_bytes = max(0.25 * self.planned_bytes, (taken - self.fixed_bytes) / size)
        self.free_bytes = free_memory(device)
        self.packed = max(1, int((self.free_bytes - self.fixed_bytes) / self.measured_bytes))
        log.info(
            "microbatches of at most %d packed rows: %.2f GiB a row measured",
            self.packed,
            self.measured_bytes / 2**30,
        )


def free_memory(device: torch.device) -> float:
    """Bytes that a microbatch may plan with on `device`."""
    free = free_bytes(device)
    if device.type == "cuda":
        return FREE_SHARE * (free or 0)
    return float(min(CPU_BYTES, CPU_BYTES if free is None else free // 4))


def learning(model: MaskedModel) -> Iterable[Tensor]:
    """The parameters that learn: the model's, and those of an attached concept."""
    concept = model.concept.parameters() if model.concept is not None else ()
    return (p for p in (*model.parameters(), *concept) if p.requires_grad)


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def add_gradients(loss: Tensor, parameters: Iterable[Tensor], sums: Iterable[Tensor] = ()) -> None:
    """Add d loss / d leaf to every leaf's gradient, all of them or (when memory runs out) none.

    Gradients are formed apart first; by the time they are added the graph is gone, so that adding finds room. Hooks on
    `parameters` run as in a usual backward pass; `sums` are leaves that nobody else watches, and are added to at once.
    """
    watched = [leaf for leaf in parameters if leaf.requires_grad]
    if any(map(is_spread, watched)):  # their gradients appear in a usual backward pass alone
        if loss.requires_grad:
            loss.backward()
        return
    own = [leaf for leaf in sums if leaf.requires_grad]
    if not (loss.requires_grad and (watched or own)):
        return
    gradients = list(torch.autograd.grad(loss, [*watched, *own], allow_unused=True))
    first = [(leaf, new) for leaf, new in zip(own, gradients[len(watched) :], strict=True) if new is not None]
    later = [(leaf.grad, new) for leaf, new in first if leaf.grad is not None]
    for leaf, new in first:
        if leaf.grad is None:
            leaf.grad = new
    if later:
        torch._foreach_add_([grad for grad, _ in later], [new for _, new in later])
    gradients = gradients[: len(watched)][::-1]
    del first, later
    for leaf in watched:
        gradient = gradients.pop()  # let go of one by one
        if gradient is not None:
            torch.autograd.backward([leaf], [gradient])
