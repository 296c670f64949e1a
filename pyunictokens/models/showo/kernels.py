"""Flash kernels that give their log-sum-exp, and which of them a device takes: cuDNN's, flash-attn 3's, flash-attn 2's,
or torch's own.

`PYUNICTOKENS_ATTENTION=auto|cudnn|flash3|flash2|torch` chooses by hand. By itself a GPU of compute capability 9 takes
flash-attn 3, then cuDNN; a newer one cuDNN; an older one flash-attn 2; torch's kernel where none of these is to be had.
With gradients torch's runs in any case. Before another kernel is used on a device it is asked for values that are
known; one that raises or gives others is left out, and `pyunictokens doctor` and the log say so.

Shape suffixes: B rows, H heads, L new positions, P prompt positions, S positions of a buffer, E head width.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ...utils.errors import UserError

log = logging.getLogger(__name__)

_aten = torch.ops.aten

Extra: TypeAlias = tuple[object, ...]
"""What a kernel's backward pass wants beside its output."""


class Kernel(Protocol):
    """A flash kernel: out [B, H, L, E], log-sum-exp [B, H, L], and what its backward pass wants besides."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Extra]:
        """`scale` of the scores; by default E^-½."""
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        extra: Extra,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class RowLengths:
    """How many of a buffer's positions each row has. The tensors stay where they are; `used` may be written anew."""

    used: Tensor
    """int32 [B]."""
    new_starts: Tensor
    """int32 [B + 1]: 0, L, 2 L, …"""
    buffer_starts: Tensor
    """int32 [B + 1]: 0, S, 2 S, …"""

    @classmethod
    def make(cls, rows: int, new: int, size: int, device: torch.device) -> RowLengths:
        """For `rows` rows of `new` queries over buffers of `size` positions, of which none is used yet."""
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        return cls(torch.zeros(rows, dtype=torch.int32, device=device), starts * new, starts * size)


@runtime_checkable
class LengthsKernel(Protocol):
    """A flash kernel that reads of each row's keys as many as a number on the device says. It gives no gradients."""

    name: str

    def over_lengths(self, q: Tensor, keys: Tensor, values: Tensor, lengths: RowLengths) -> Tensor:
        """q [B, H, L, E] over keys and values [B, S, H, E]: [B, H, L, E]."""
        ...


class CpuKernel:
    """Torch's flash kernel of the CPU; any dtype."""

    name = "torch's flash kernel (CPU)"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Extra]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse, ()

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        extra: Extra,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)


class CudaKernel:
    """Torch's flash kernel of a GPU; 16-bit dtypes, head widths that are multiples of 8 up to 256."""

    name = "torch's flash kernel"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Extra]:
        out, lse, *rest = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse, tuple(rest[:6])  # cumulative lengths, longest lengths, the two parts of the generator's state

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        extra: Extra,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lengths, noise = extra[:4], extra[4:]
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, *lengths, 0.0, causal, *noise
        )

    def over_lengths(self, q: Tensor, keys: Tensor, values: Tensor, lengths: RowLengths) -> Tensor:
        rows, _, new, _ = q.shape
        packed = q.transpose(1, 2).flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        starts = lengths.new_starts, lengths.buffer_starts
        out = _aten._flash_attention_forward(
            *packed, *starts, new, keys.shape[1], 0.0, False, False, seqused_k=lengths.used
        )[0]
        return out.unflatten(0, (rows, new)).transpose(1, 2)


class FlashAttnKernel(CudaKernel):
    """The package flash-attn 2 (`pip install pyunictokens[flash]`) where no gradient is wanted; otherwise torch's."""

    name = "flash-attn 2, with gradients torch's flash kernel"
    module = "flash_attn"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Extra]:
        package = _package(self.module)
        if isinstance(package, str) or torch.is_grad_enabled():
            return super().forward(q, k, v, causal, scale)
        turned = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, lse = package.flash_attn_with_kvcache(*turned, softmax_scale=scale, causal=causal, return_softmax_lse=True)
        return out.transpose(1, 2), lse, ()

    def over_lengths(self, q: Tensor, keys: Tensor, values: Tensor, lengths: RowLengths) -> Tensor:
        package = _package(self.module)
        if isinstance(package, str):
            return super().over_lengths(q, keys, values, lengths)
        out = package.flash_attn_with_kvcache(q.transpose(1, 2), keys, values, cache_seqlens=lengths.used)
        return out.transpose(1, 2)


class FlashAttn3Kernel(FlashAttnKernel):
    """The package flash-attn 3 (module flash_attn_interface, for Hopper) where no gradient is wanted."""

    name = "flash-attn 3, with gradients torch's flash kernel"
    module = "flash_attn_interface"


class CudnnKernel(CudaKernel):
    """cuDNN's where no gradient is wanted and there are many queries over keys of their own; otherwise torch's.

    It makes a plan for each shape, which pays where a shape comes again and again, not for a few queries of a text.
    Keys that rows share and lengths on the device are beyond it as torch calls it.
    """

    name = "cuDNN; over shared or padded keys, for few queries and with gradients torch's flash kernel"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Extra]:
        shared = len(k) > 1 and k.stride(0) == 0
        if torch.is_grad_enabled() or shared or q.shape[2] < MANY_QUERIES or q.shape[-1] > 128:
            return super().forward(q, k, v, causal, scale)
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out, lse.reshape(q.shape[:3]), ()


MANY_QUERIES = 64
"""Queries from which on cuDNN's plans are worth making."""

SWITCH = "PYUNICTOKENS_ATTENTION"
KERNELS: dict[str, type[CudaKernel]] = {
    "cudnn": CudnnKernel,
    "flash3": FlashAttn3Kernel,
    "flash2": FlashAttnKernel,
    "torch": CudaKernel,
}

_found: dict[tuple[str, torch.device, torch.dtype], str] = {}
"""What :func:`_what_is_wrong` found."""
_chosen: dict[tuple[str, torch.device, torch.dtype], tuple[CudaKernel, list[str]]] = {}
"""What :func:`_on_gpu` found, by what was wanted."""


@functools.cache
def _package(module: str) -> ModuleType | str:
    """The package, or why it cannot be used."""
    name = "flash-attn 3" if module == FlashAttn3Kernel.module else "flash-attn 2"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        return f"{name} is not installed" if missing else f"{name} does not load: {error}"


def _wanted() -> str:
    found = os.environ.get(SWITCH, "auto") or "auto"
    if found != "auto" and found not in KERNELS:
        raise UserError(f"{SWITCH}={found}: must be auto, {', '.join(KERNELS)}")
    return found


def order(capability: tuple[int, int]) -> list[str]:
    """Names of kernels for a GPU of this compute capability, the best first."""
    if capability[0] == 9:
        return ["flash3", "cudnn", "flash2", "torch"]
    return ["cudnn", "flash2", "torch"] if capability[0] >= 10 else ["flash2", "torch"]


def _objection(name: str, capability: tuple[int, int]) -> str:
    """Why a kernel cannot be had on such a GPU, by what is installed; empty if it can."""
    if name == "flash3" and capability[0] != 9:
        return f"flash-attn 3 is for compute capability 9.x, this GPU has {capability[0]}.{capability[1]}"
    if name == "cudnn":
        if capability[0] < 8:
            return f"cuDNN's attention needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        return "" if torch.backends.cudnn.is_available() else "this torch has no cuDNN"
    module = {"flash3": FlashAttn3Kernel.module, "flash2": FlashAttnKernel.module}.get(name)
    package = _package(module) if module else ""
    return package if isinstance(package, str) else ""


def choose(capability: tuple[int, int]) -> tuple[str, list[str]]:
    """The kernel to take on a GPU of this compute capability, and why not the others that were preferred.

    Raises:
        UserError: the one that was asked for by `PYUNICTOKENS_ATTENTION` is unknown or cannot be had.
    """
    wanted = _wanted()
    if wanted != "auto":
        if reason := _objection(wanted, capability):
            raise UserError(f"{SWITCH}={wanted}: {reason}; set another or auto")
        return wanted, [f"{SWITCH}={wanted}"]
    reasons: list[str] = []
    for name in order(capability):
        reason = _objection(name, capability)
        if not reason:
            return name, reasons
        reasons.append(reason)
    return "torch", reasons


def kernel_for(q: Tensor, device: str | None = None) -> Kernel | None:
    """The kernel that takes tensors like `q` [B, H, L, E] (on another type of `device`); None where there is none that
    gives its log-sum-exp."""
    place = q.device if device is None or device == q.device.type else torch.device(device)
    if place.type == "cpu":
        return CpuKernel()
    width = q.shape[-1]
    if place.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256:
        return _on_gpu(place, q.dtype)[0]
    return None


def _on_gpu(device: torch.device, dtype: torch.dtype) -> tuple[CudaKernel, list[str]]:
    """The kernel and the reasons of :func:`choose`; torch's where the chosen one does not give the right values."""
    key = (_wanted(), device, dtype)
    if key in _chosen:
        return _chosen[key]
    if not torch.cuda.is_available():  # shapes alone are followed, nothing is computed
        return KERNELS[choose((8, 0))[0]](), choose((8, 0))[1]
    name, reasons = choose(torch.cuda.get_device_capability(device))
    kernel = KERNELS[name]()
    wrong = "" if name == "torch" else _what_is_wrong(kernel, device, dtype)
    found = (CudaKernel(), [*reasons, wrong]) if wrong else (kernel, reasons)
    if not wrong or (kernel.name, device, dtype) in _found:  # else it is asked later
        _chosen[key] = found
    return found


def reads_lengths(kernel: Kernel | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `kernel` reads as many keys of each row as a number on the device says, and rightly."""
    if not isinstance(kernel, LengthsKernel):
        return False
    return not torch.cuda.is_available() or not _what_is_wrong(kernel, device, dtype)


def _what_is_wrong(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    """Why `kernel` cannot be used on `device`; empty if it can. Asked once, and never in or before a capture."""
    key = (kernel.name, device, dtype)
    if key in _found:
        return _found[key]
    if torch.cuda.is_initialized() and (
        torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() != 0
    ):
        return f"{kernel.name.partition(';')[0].partition(',')[0]} was not asked yet, and asking waits for the device"
    try:
        with unset_fake_temporarily(), torch.no_grad():
            far = _distance(kernel, device, dtype)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    else:
        reason = "" if far <= 8 * torch.finfo(dtype).eps else f"its values are {far:.1e} off"
    if reason:
        reason = f"{kernel.name.partition(';')[0].partition(',')[0]} cannot be used on {device}: {reason}"
        log.warning("%s", reason)
    _found[key] = reason
    return reason


def _distance(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    """How far the kernel's outputs and log-sum-exps are from one softmax in float32, on a small problem."""
    noise = torch.Generator().manual_seed(0)
    queries, size, width = MANY_QUERIES + 6, 2 * MANY_QUERIES + 5, 64
    q, k, v = (torch.randn(2, 2, rows, width, generator=noise).to(device, dtype) for rows in (queries, size, size))
    scores = q.float() @ k.float().transpose(-1, -2) * width**-0.5
    out, lse, _ = kernel.forward(q, k, v, False)
    off = [out.float() - scores.softmax(-1) @ v.float(), lse - scores.logsumexp(-1)]
    if isinstance(kernel, LengthsKernel):
        lengths = RowLengths.make(2, queries, size, device)
        lengths.used.copy_(torch.tensor([queries + 1, size], dtype=torch.int32))
        hidden = torch.arange(size, device=device) >= lengths.used[:, None, None, None]
        exact = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.float()
        keys, values = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        off.append(kernel.over_lengths(q, keys, values, lengths).float() - exact)
    return max(float(each.abs().max()) for each in off)


def attention_way(device: torch.device) -> tuple[str, str]:
    """Which kernel attends on `device` in bfloat16 where no gradient is wanted, and why it is that one."""
    wanted = _wanted()
    if device.type != "cuda":
        more = "" if wanted == "auto" else f", and so is {SWITCH}={wanted}"
        return (
            TOGETHER,
            f"the tensors are on {device.type}; kernels that read a prompt where it lies are for GPUs{more}",
        )
    kernel, reasons = _on_gpu(device, torch.bfloat16)
    return kernel.name, "; ".join(reasons) or "it is the fastest of those that the project knows for this GPU"


TOGETHER = "torch's attention, keys put together"
"""What is used where no kernel gives its log-sum-exp, and on a CPU, where it is the faster."""
