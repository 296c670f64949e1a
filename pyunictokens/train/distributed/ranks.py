"""The processes of one run and what they say to each other: shares of rows, gathered records, sums of gradients.

`Ranks()` is a run of one process: every method answers at once and torch.distributed is never touched, so the loop has
no second form. `Ranks.open()` takes torchrun's environment: gloo for records of Python (few bytes, a few times a step),
NCCL for gradients on GPUs. Results do not depend on the number of ranks: who draws what follows from sample ids, and
sums run over all rows. A rank that is gone ends the others (heartbeat.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ...utils import profiling
from ...utils.errors import RankLost, UserError
from ...utils.signals import Stopped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from ..optimizer import Gathers
    from .heartbeat import Watch

T = TypeVar("T")

WAIT = timedelta(hours=12)
"""The longest that ranks wait for each other, as for rank 0's evaluations. Who is gone is found by the watch."""

BUCKET = 1 << 24
"""Numbers that are summed over ranks in one message."""


class Ranks:
    """One process that works alone, and the interface of many."""

    rank, world = 0, 1
    attempt = 0
    """How often torchrun has started this job anew."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    @staticmethod
    def open(device: str = "auto") -> Ranks:
        """The ranks that torchrun started, or this process alone. Use it as a context; its end waits for all.

        device: auto (the GPU of the local rank, else the CPU), cpu, or what a process alone may use.

        Raises:
            UserError: an environment that names ranks but not where they meet; GPUs fewer than ranks on this machine.
        """
        world = _number("WORLD_SIZE", 1)
        if world == 1:
            from ...utils.devices import pick_device

            return Ranks(pick_device(device))
        return _Many.join(world, device)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def share(self, rows: int) -> range:
        """The rows of this rank: contiguous, in rank order, of sizes that differ by one at most; maybe none."""
        size, rest = divmod(rows, self.world)
        start = self.rank * size + min(self.rank, rest)
        return range(start, start + size + (self.rank < rest))

    def gather(self, own: T) -> list[T]:
        """What each rank gives, in rank order, on every rank. For light things: they are pickled."""
        return [own]

    def broadcast(self, own: T) -> T:
        """What rank 0 gives, on every rank."""
        return own

    def any(self, own: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.gather(own))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)

    def learned(self, leaves: Mapping[str, Gathers]) -> list[str]:
        """Names of those that have a gradient on any rank, in the order of `leaves`."""
        have = set().union(*self.gather([name for name, leaf in leaves.items() if leaf.grad is not None]))
        return [name for name in leaves if name in have]

    def sum_gradients(self, leaves: Mapping[str, Tensor]) -> None:
        """Make every leaf's gradient the sum over ranks: once, when the last microbatch of a step is done.

        A rank without a gradient counts as zero; a leaf without one on any rank keeps none.
        """

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over ranks, in place."""
        return value

    @contextmanager
    def taking_turns(self, follow: Callable[[], object]) -> Iterator[Callable[[], None]]:
        """For collective calls that ranks make together, one needing more of them than another: each calls what this
        gives before its own. A rank that has come to its next record (`gather`, `broadcast`) or to the end of the
        context makes them by `follow` for as long as another one goes on."""
        yield lambda: None

    def aside(self) -> Ranks:
        """The same ranks for another thread, whose calls do not meet those of this one."""
        return self

    @property
    def group(self) -> ProcessGroup | None:
        """The process group for records on the CPU; None alone."""
        return None

    def mesh(self) -> DeviceMesh:
        """All ranks as a one-dimensional device mesh, for sharded tensors."""
        raise UserError("a single process has no other ranks to share tensors with")

    def noticing(self) -> AbstractContextManager[None]:
        """Around calls of torch.distributed: one that breaks because a rank is gone raises RankLost."""
        return nullcontext()

    def close(self) -> None:
        """Wait for all ranks and let go of them."""

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends. Raises RankLost where another rank failed first."""

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Stopped):
            self.close()
        else:
            self.fail(error)


class _Many(Ranks):
    """One of several processes."""

    def __init__(
        self,
        rank: int,
        world: int,
        device: torch.device,
        group: ProcessGroup | None,
        spare: ProcessGroup | None,
        watch: Watch,
    ):
        super().__init__(device)
        self.rank, self.world = rank, world
        self.attempt = _number("TORCHELASTIC_RESTART_COUNT", 0)
        self._group, self._spare, self._watch = group, spare, watch
        self._mesh: DeviceMesh | None = None
        self._follow: Callable[[], object] | None = None

    @classmethod
    def join(cls, world: int, device: str) -> _Many:
        """Meet the others where the environment says."""
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        from .heartbeat import Watch

        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(f"WORLD_SIZE={world}, but {', '.join(missing)} is not set: start ranks with torchrun")
        rank, place = _number("RANK", 0), _device(device)
        backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            store, _, _ = next(rendezvous("env://", rank, world, timeout=WAIT))
            # torchrun keeps its store over restarts, and with it the addresses of processes that are gone
            fresh = dist.PrefixStore(f"attempt {_number('TORCHELASTIC_RESTART_COUNT', 0)} of {world}", store)
            dist.init_process_group(backend, store=fresh, rank=rank, world_size=world, timeout=WAIT)
            group, spare = (dist.new_group(backend="gloo", timeout=WAIT) for _ in range(2))
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"rank {rank} of {world} does not reach the others at {where}: {error}") from error

        def share(value: object) -> object:
            values = [value]
            dist.broadcast_object_list(values, src=0, group=group)
            return values[0]

        watch = Watch(rank, world, os.environ["MASTER_ADDR"], share, lambda: dist.barrier(group))
        return cls(rank, world, place, group, spare, watch)

    @profiling.phase("synchronisation")
    def gather(self, own: T) -> list[T]:
        import torch.distributed as dist

        self._end_turns()
        found: list[T] = [own] * self.world
        with self.noticing():
            dist.all_gather_object(found, own, group=self._group)
        return found

    @profiling.phase("synchronisation")
    def broadcast(self, own: T) -> T:
        import torch.distributed as dist

        self._end_turns()
        values: list[T] = [own]
        with self.noticing():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    @profiling.phase("synchronisation")
    def sum_gradients(self, leaves: Mapping[str, Tensor]) -> None:
        bucket: list[Tensor] = []
        for name in self.learned(leaves):
            leaf = leaves[name]
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            bucket.append(leaf.grad)
            if sum(gradient.numel() for gradient in bucket) >= BUCKET:
                self._sum_all(bucket)
                bucket = []
        self._sum_all(bucket)

    def _sum_all(self, tensors: list[Tensor]) -> None:
        if not tensors:
            return
        flat = self.sum(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum(self, value: Tensor) -> Tensor:
        import torch.distributed as dist

        with self.noticing():
            dist.all_reduce(value)
        return value

    @contextmanager
    def taking_turns(self, follow: Callable[[], object]) -> Iterator[Callable[[], None]]:
        def my_turn() -> None:
            self._takes_turn(True)

        self._follow = follow
        try:
            yield my_turn
            self._end_turns()
        finally:
            self._follow = None

    @profiling.phase("synchronisation")
    def _takes_turn(self, own: bool) -> bool:
        """Whether any rank is about to make a call of its own."""
        import torch.distributed as dist

        going = torch.tensor(int(own))
        with self.noticing():
            dist.all_reduce(going, dist.ReduceOp.MAX, group=self._group)
        return bool(going)

    def _end_turns(self) -> None:
        while self._follow is not None and self._takes_turn(False):
            self._follow()

    def aside(self) -> Ranks:
        return _Many(self.rank, self.world, self.device, self._spare, None, self._watch)

    @property
    def group(self) -> ProcessGroup | None:
        return self._group

    def mesh(self) -> DeviceMesh:
        if self._mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            with self.noticing():
                self._mesh = init_device_mesh(self.device.type, (self.world,))
        return self._mesh

    @contextmanager
    def noticing(self) -> Iterator[None]:
        self._watch.check()
        try:
            yield
        except RankLost:
            raise
        except RuntimeError as error:
            lost = self._watch.verdict()
            if lost is None:
                raise
            raise lost from error

    def close(self) -> None:
        import torch.distributed as dist

        self.barrier()
        self._watch.stop()
        self.barrier()  # rank 0 takes its store along: nobody may look into it any more
        dist.destroy_process_group()

    def fail(self, error: BaseException) -> None:
        if isinstance(error, RankLost):
            self._watch.heard()
            return
        if not self._watch.last_words(str(error) or type(error).__name__):
            lost = RankLost(f"another rank failed before rank {self.rank}: {error}")
            lost.quiet = True
            raise lost from error


def _device(name: str) -> torch.device:
    """This rank's device. GPUs are dealt by local rank."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UserError(f"device {name}: with several ranks it must be auto, cuda or cpu: each takes a GPU of its own")
    local, found = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= found:
        raise UserError(f"local rank {local} finds {found} GPUs here: start at most {found} ranks a machine")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        raise UserError(f"{name}={text}: must be a whole number: start ranks with torchrun")
    return int(text)
