"""How many rows go through the transformer at once: all of them, or as many as memory holds.

The number follows from an estimate of what a row needs and from what is free; where the estimate was too bold and the
device runs out, it is halved and the call repeated. The split is said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError

_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on `device`, what this process may not take left out; None where the system does not
    say."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - torch.cuda.memory_allocated(device)
        return max(0, min(allowed, free + cached_bytes(device)))
    if not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def cached_bytes(device: torch.device) -> int:
    """What torch's allocator keeps on `device` and can hand out again.

    Not what lies unused in the private pool of a captured CUDA graph: that is the graph's scratch at every replay and
    never becomes free for anything else.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment.get("segment_pool_id", ())) in ((), (0, 0))
    )


def refuse_beyond_free(what: str, needed: int, device: torch.device) -> None:
    """Raise UserError where `what` needs more bytes than `device` has free: ahead of an allocation that the system may
    grant and then end whoever is at hand for."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise UserError(
            f"{what} would need {needed / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free on {device}: ask for fewer "
            "at once"
        )


def fits(call: Callable[[], None], device: torch.device) -> bool:
    """Whether `call()` went through; False where memory ran out, and what it held is free again. Other errors pass."""
    try:
        call()
        return True
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
    # Not inside the block: there the error still holds the frames, and they hold the memory.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return False


class RowLimit:
    """The limit of one engine. What it learned by running out of memory it keeps."""

    def __init__(self) -> None:
        self._most: int | None = None
        self._proven = 0
        """Bytes, as estimated, that went well at once."""
        self._said = False

    def split(self, count: int, row_bytes: int, device: torch.device, call: Callable[[slice], Tensor]) -> Tensor:
        """``call(slice)`` over all of `count` rows, in as few parts as fit, joined in their order.

        Raises:
            UserError: not even one row fits.
        """
        while True:
            part, made = self._part(count, row_bytes, device), list[Tensor]()

            def run(part: int = part, made: list[Tensor] = made) -> None:
                parts = [call(slice(start, min(start + part, count))) for start in range(0, count, part)]
                made.append(parts[0] if len(parts) == 1 else torch.cat(parts))

            if fits(run, device):
                self._proven = max(self._proven, part * row_bytes)
                return made[0]
            if part == 1:
                raise UserError(
                    "one row alone needs more memory than the device has: use a smaller grid, a smaller dtype, or "
                    "another device"
                )
            self._most = part // 2
            self._say(self._most, count)

    def _part(self, count: int, row_bytes: int, device: torch.device) -> int:
        most = count if self._most is None else min(count, self._most)
        if most * row_bytes <= self._proven:
            return most
        free = free_bytes(device)
        if free is not None and most * row_bytes > free // 2:
            most = max(1, free // 2 // row_bytes)
            self._say(most, count)
        return most

    def _say(self, part: int, count: int) -> None:
        if not self._said:
            warnings.warn(f"{count} rows need more memory than is free: they are run {part} at a time", stacklevel=6)
        self._said = True
