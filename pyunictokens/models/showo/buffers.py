"""Image steps whose keys and values lie in buffers that stay: own positions first, the row's prompt behind them.

    keys [B, S, H, E]   | 0 … L−1: the row's own, written in place by every layer | L … L+P−1: its prompt | never read |

Attention without a mask asks nothing of the order of keys (their positions are turned into them), so the own part has
one place in all rows, whatever lengths the prompts have. A prompt's part is written when the step is made and when
other prompts are loaded; nothing is put together or joined in a step, and one call attends over all of a row. Where the
prompts of rows differ in length, or are padded (padding.py), each row's length is a number on the device, so a captured
step serves prompts of all lengths.

Shape suffixes: B rows, H heads, L new positions, P prompt positions, S positions of a buffer, E head width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ...utils.memory import free_bytes
from ...utils.profiling import taken
from ..prefix import Prefix
from ..sdpa import attend
from .attention import PromptAttention, keys_values, runs_of
from .kernels import LengthsKernel, RowLengths, kernel_for, reads_lengths

SHARE = 1 / 16
"""Part of the free memory that one step may take so that each layer has buffers of its own. With more, one pair serves
all layers: the prompts' part is then written in every layer."""

WAY = "one call over buffers"
TORCH = "torch's attention"

SWITCH = "PYUNICTOKENS_BUFFERS"
"""Set to 0 in the environment, steps put keys together or join attention as elsewhere."""


def lengths_kernel(device: torch.device, dtype: torch.dtype, width: int) -> LengthsKernel | None:
    """The kernel that reads no more of each row's keys than a length on the device says; None where there is none."""
    if device.type != "cuda":
        return None
    kernel = kernel_for(torch.empty(1, 1, 1, width, dtype=dtype, device="meta"), device.type)
    return kernel if isinstance(kernel, LengthsKernel) and reads_lengths(kernel, device, dtype) else None


def buffers_serve(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether captured steps are to run over buffers: on a CPU, and on a GPU with such a kernel; where `SWITCH` is 0,
    nowhere. On a CPU a mask hides what a row has not, which is still faster than keys put together."""
    if os.environ.get(SWITCH, "1") == "0":
        return False
    return device.type == "cpu" or lengths_kernel(device, dtype, width) is not None


class BufferedAttention:
    """Row b sees all of prompt `prompt_of_row[b]` and its own L positions, as by `PromptAttention`; without gradients.

    With gradients the step falls back to `PromptAttention`, which keeps nothing.
    """

    def __init__(
        self, prompts: Prefix, prompt_of_row: Sequence[int], new: int, width: int, each_layer: bool | None = None
    ):
        """`new` is L, `width` E. `each_layer`: buffers for each layer, or one pair for all; None: as memory allows."""
        (self._keys_of, self._values_of), self._new, self._width = keys_values(prompts), new, width
        self._apart = PromptAttention(prompts, prompt_of_row)
        first, layers, rows = self._keys_of[0][0], len(self._keys_of[0]), len(prompt_of_row)
        device, dtype = first.device, first.dtype
        self._runs, start = [], 0
        for prompt, count in runs_of(prompt_of_row):
            self._runs.append((slice(start, start + count), prompt))
            start += count
        used = {prompts.lengths[prompt] for prompt in prompt_of_row}
        padded = any(self._keys_of[prompt][0].shape[-1] != width for prompt in prompt_of_row)
        size = (rows, new + max(used), first.shape[0], width)
        pair = 2 * torch.Size(size).numel() * first.element_size()
        if each_layer is None:
            free = free_bytes(device)
            each_layer = free is None or layers * pair <= SHARE * free
        self._each_layer = each_layer
        self._buffers = [
            (torch.zeros(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device))
            for _ in range(layers if each_layer else 1)
        ]
        self._lengths: RowLengths | None = None
        """None: every row has all positions of its buffer."""
        if padded or len(used) > 1:
            self._lengths = RowLengths.make(rows, new, size[1], device)
            self._places = torch.arange(size[1], device=device)
            self._seen = torch.zeros(rows, 1, 1, size[1], dtype=torch.bool, device=device)
        self._kernel = lengths_kernel(device, dtype, width)
        self._way = f"{WAY}: {self._kernel.name if self._kernel is not None else TORCH}"
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take what now lies in the prompts' tensors. Waits for nothing."""
        if self._lengths is not None:
            for rows, prompt in self._runs:
                self._lengths.used[rows] = self._new + self._length(self._keys_of[prompt][0])
            torch.lt(self._places, self._lengths.used[:, None, None, None], out=self._seen)
        if self._each_layer:
            for layer in range(len(self._buffers)):
                self._write_prompts(layer, *self._buffers[layer])

    def _length(self, keys: Tensor) -> int | Tensor:
        """A prompt's own positions, of its keys [H, P, E] or, padded, [H, P, E + 8], where they have no mark."""
        return keys.shape[1] if keys.shape[-1] == self._width else (keys[0, :, self._width] == 0).sum()

    def _write_prompts(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for rows, prompt in self._runs:
            for buffer, part in ((keys, self._keys_of[prompt][layer]), (values, self._values_of[prompt][layer])):
                here = slice(self._new, self._new + part.shape[1])
                buffer[rows, here] = part[..., : self._width].transpose(0, 1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self._apart(layer, q, k, v)
        taken("shared-prefix attention", self._way)
        keys, values = self._buffers[layer if self._each_layer else 0]
        if not self._each_layer:
            self._write_prompts(layer, keys, values)
        keys[:, : self._new], values[:, : self._new] = k.transpose(1, 2), v.transpose(1, 2)
        if self._lengths is not None and self._kernel is not None:
            return self._kernel.over_lengths(q, keys, values, self._lengths)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if self._lengths is not None:
            return attend(q, keys, values, self._seen)
        whole = kernel_for(q) if q.is_cuda else None
        return attend(q, keys, values) if whole is None else whole.forward(q, keys, values, False)[0]
