"""Calls every operation once with every backend that can run, at small odd shapes: what a memory checker watches.

compute-sanitizer python -m tests.gpu.small_calls cuda
"""

from __future__ import annotations

import sys

import torch

from pyunictokens.ops import registry as _dispatch
from pyunictokens.utils.errors import UserError
from tests.gpu import support


def _can(operation: str, backend: str, device: str, dtype: torch.dtype) -> bool:
    try:
        _dispatch.choose(operation, backend, torch.device(device), dtype)
    except UserError:
        return False
    return True


def main(device: str) -> int:
    """The number of calls."""
    count = 0
    for backend in ("reference", "cpu", "triton", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            for variant in ("bias", "guided", "masked guided"):
                h = support.head(device, dtype, (2, 3, 7, 33, 71), **support.VARIANTS[variant])
                if "mask" not in variant and _can("selected_logprob", backend, device, dtype):
                    support.gradients(support.logprob(h, backend), h)
                    count += 1
                if _can("maskgit_grpo_loss", backend, device, dtype):
                    support.gradients(support.fused(h, backend)[0], h)
                    count += 1
                if dtype == torch.float32 and _can("grpo_loss", backend, device, dtype):
                    logp = (h["old"] + 0.1).requires_grad_()
                    torch.autograd.grad(support.tokens_loss(logp, h, backend), logp)
                    count += 1
            if _can("maskgit_step", backend, device, dtype):
                support.step(device, dtype, (3, 37, 1003))(backend)
                count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    print(f"{main(sys.argv[1])} calls")
