"""Judging previews: codes are decoded in one batch, scored, and what goes wrong is written down.

Where the scorer allows it (`Dsog.overlap`), decoding and scoring run in a thread of their own, on a GPU on a stream of
its own, while the other rows take a step. The verdict is always waited for at the same place, so the rollout is the
same however long the scorer takes. What follows from a score is scheduler.py's business.

Letters: P previews, N image codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..utils import profiling

Verdict = Callable[[], list[float]]
"""Waits for the scores of one batch of previews; NaN where the scorer failed."""


class Previews:
    """The previews of one generation. Use it as a context manager: leaving it ends the thread."""

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        scorer: Callable[[Tensor, Tensor], Tensor],
        prompt_index: Tensor,
        overlap: bool = False,
    ):
        self.overlap = overlap
        self.errors: list[str] = []
        """One line for each call of the scorer that raised, or gave something else than one finite number a preview."""
        self._decode, self._scorer, self._prompt_index = decode, scorer, prompt_index
        self._thread = ThreadPoolExecutor(1, "previews") if overlap else None
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> Previews:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def begin(self, codes: Tensor, rows: list[int]) -> Verdict:
        """Have codes int64 [P, N] of `rows` judged; call what is returned for the scores."""
        if self._thread is None:
            scores = self._score(codes, rows)
            return lambda: scores
        ready = None
        if codes.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(codes.device))
        return self._thread.submit(self._apart, codes, rows, ready).result

    def _apart(self, codes: Tensor, rows: list[int], ready: torch.cuda.Event | None) -> list[float]:
        with torch.no_grad():
            if ready is None:
                return self._score(codes, rows)
            if self._stream is None:
                self._stream = torch.cuda.Stream(codes.device)
            with torch.cuda.device(codes.device), torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                codes.record_stream(self._stream)
                return self._score(codes, rows)

    @profiling.phase("previews")
    def _score(self, codes: Tensor, rows: list[int]) -> list[float]:
        failed = [math.nan] * len(rows)
        pixels = self._decode(codes)
        try:
            scores = torch.as_tensor(self._scorer(pixels, self._prompt_index[rows])).detach().float().cpu()
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            return failed
        if scores.shape != (len(rows),):
            self.errors.append(f"scores of shape {tuple(scores.shape)}: must be one for each of {len(rows)} previews")
            return failed
        bad = int((~torch.isfinite(scores)).sum())
        if bad:
            self.errors.append(f"{bad} of {len(rows)} scores are not finite")
        return scores.tolist()
