"""The `cuda` backend: `maskgit_step` as one launch of the compiled core on the current stream of torch.

Nothing waits for the device and nothing is read back, so a call can be captured in a CUDA graph: step, mask_len,
temperature and sample ids are read by the kernel when it runs; a replay sees what they hold then. Where the core has no
CUDA part or no device is there, the backend is marked unavailable, with the reason.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..registry import Entry, mark_unavailable, offer
from . import cpu as _native

_counters: dict[tuple[int, int], Tensor] = {}
"""Per device and stream: zeros that a launch counts up and leaves as zeros. Launches on one stream never overlap."""


def objection(build: dict[str, Any]) -> str:
    """Why the core described by `build` (:func:`_native.build_info`) cannot run on a GPU here; empty if it can."""
    if not build:
        return "the compiled core is not there; build it: pip install -e ."
    cuda = build["cuda"]
    if cuda is None:
        return "the compiled core has no CUDA part; build it with nvcc: PYUNICTOKENS_CUDA=on pip install -e ."
    if not cuda["device_count"]:
        return f"the compiled core finds no CUDA device ({cuda['error']})"
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    return ""


def maskgit_step(
    logits: Tensor,
    codes: Tensor,
    mask_len: Tensor,
    temperature: Tensor,
    seed: int,
    sample_ids: Tensor,
    step: Tensor,
    token_gumbel: Tensor | None,
    rank_gumbel: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, chosen, logp, masked); float32, bfloat16 and float16 logits are read once, in their own dtype."""
    core = _native.core()
    assert core is not None
    device = logits.device
    with torch.cuda.device(device):
        per_sample = (_narrow(mask_len), _narrow(temperature.float()), _narrow(sample_ids), _narrow(step))
        call = _native._StepCall(logits, codes, per_sample, seed, token_gumbel, rank_gumbel, stream)
        keys = torch.empty(codes.shape, dtype=torch.int32, device=device)
        queue = torch.cuda.current_stream(device).cuda_stream
        done = counters(len(codes), device, queue)
        core.maskgit_step_cuda(call.fields, call.strides, keys.data_ptr(), done.data_ptr(), device.index, queue)
    return call.results


def counters(count: int, device: torch.device, stream: int) -> Tensor:
    """`count` zeros for one launch. Under capture the graph owns and clears its own: it may be replayed anywhere."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    found = _counters.get((device.index, stream))
    if found is None or len(found) < count:
        found = torch.zeros(max(count, 256), dtype=torch.int32, device=device)
        _counters[device.index, stream] = found
    return found


def _narrow(values: Tensor) -> Tensor:
    """[B] with stride 0 (one number for all samples) or 1."""
    return values if values.stride(0) in (0, 1) or len(values) == 1 else values.contiguous()


@cache
def _reason() -> str:
    return objection(_native.build_info())


mark_unavailable("cuda", _reason)
offer("maskgit_step", "cuda", Entry(maskgit_step, devices=("cuda",), dtypes=_native.NARROW))
