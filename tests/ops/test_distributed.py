"""The losses under DDP and FSDP2: two gloo processes on the CPU give the gradients of one process with all rollouts."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pyunictokens as uct
from pyunictokens.utils.errors import UserError

WORLD, R, T, N, D, K = 2, 4, 2, 3, 8, 11

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)


class Policy(nn.Module):
    """Codes → loss. The loss is formed in forward, where wrappers have the whole parameters at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(K + 1, D)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, K)

    def hidden(self, codes: Tensor) -> Tensor:
        return self.mix(self.embed(codes + 1))

    def forward(self, codes: Tensor, target: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        return loss_of(self.hidden(codes), self.head.weight, self.head.bias, codes, target, old, advantages)


def loss_of(
    hidden: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, target: Tensor, old: Tensor, advantages: Tensor
) -> Tensor:
    return uct.ops.maskgit_grpo_loss(
        hidden, weight, target, old, old - 0.1, advantages, bias, beta=0.05, mask=codes == uct.MASK
    )[0]


def problem() -> tuple[Policy, tuple[Tensor, ...]]:
    torch.manual_seed(5)
    policy = Policy()
    codes = torch.where(torch.rand(R, T, N) < 0.6, uct.MASK, torch.randint(0, K, (R, T, N)))
    return policy, (codes, torch.randint(0, K, (R, T, N)), -2.5 + 0.3 * torch.randn(R, T, N), torch.randn(R))


def work(rank: int, folder: str, port: int) -> None:
    """What one process does: its half of the rollouts under each wrapper; rank 0 writes the gradients."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        mesh = dist.init_device_mesh("cpu", (WORLD,))
        start, batch = problem()
        mine = tuple(x.chunk(WORLD)[rank] for x in batch)
        found: dict[str, dict[str, Tensor]] = {}

        wrapped = DistributedDataParallel(copy.deepcopy(start))
        wrapped(*mine).backward()
        found["DDP"] = {name: p.grad for name, p in wrapped.module.named_parameters()}

        policy = copy.deepcopy(start)
        fully_shard(policy.mix, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        policy(*mine).backward()
        found["FSDP2"] = {name: p.grad.full_tensor() for name, p in policy.named_parameters()}

        # A head that is wrapped apart and used outside of its forward: whole on request, its gradient averaged back.
        head = copy.deepcopy(start.head)
        fully_shard(head, mesh=mesh)
        codes, target, old, advantages = mine
        hidden = start.hidden(codes)
        with pytest.raises(UserError, match=r"weight: a DTensor; .*full_tensor"):
            loss_of(hidden, head.weight, head.bias, codes, target, old, advantages)
        average = [Partial("avg")]
        weight, bias = (p.full_tensor(grad_placements=average) for p in (head.weight, head.bias))
        loss_of(hidden, weight, bias, codes, target, old, advantages).backward()
        found["full_tensor"] = {f"head.{name}": p.grad.full_tensor() for name, p in head.named_parameters()}
        if rank == 0:
            torch.save(found, Path(folder) / "gradients.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(str(tmp_path), port), nprocs=WORLD)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    policy, batch = problem()
    policy(*batch).backward()
    wanted = {name: p.grad for name, p in policy.named_parameters()}
    assert set(found) == {"DDP", "FSDP2", "full_tensor"} and set(found["DDP"]) == set(found["FSDP2"]) == set(wanted)
    for wrapper, gradients in found.items():
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6), (wrapper, name)
