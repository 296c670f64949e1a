"""Slots whose steps run without the host: the state of device_step.py behind the interface of `EagerSlots`.

A stretch of steps (to the next preview, or until a candidate is done) is one run of captured steps. What a capture has
fixed is kept between calls and used again where it fits: the number of slots, the settings, and the structure of the
prompts. Of structures there are few: either all slots read one prompt, or each has its own, equal ones twice; and
prompts of different lengths are padded to one (`CapturableModel.padded`), so that the tensors of any other prompts can
be copied in. In mode "auto" a structure that was not met before is left to the host, because a capture costs about
three steps; not so where calls repeat, as in training. Numbers equal those of `EagerSlots` up to the rounding of sums.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...models import CapturableModel, Prefix
from ...utils import profiling
from ...utils.memory import RowLimit
from ..sampler import EagerSlots, LoopSettings
from ..scheduler import Candidate
from .capture import CaptureCache, GraphPool, Mode
from .device_step import DeviceLoop, GuidedHidden, StepState, image_head, read_by

log = logging.getLogger(__name__)

STRUCTURES = 4
"""Captures of one bucket that are kept."""

SEEN = 256
"""Structures of one bucket that are remembered without a capture."""

Structure = tuple[tuple[int, ...], tuple[int, ...], int]
"""(prompt number of each slot: all 0, or 0, 1, 2, …; lengths of these prompts, padding included; position behind)."""


class Bucket:
    """The state of a number of slots, and a captured loop over it for each structure of prompts met so far."""

    def __init__(
        self,
        model: CapturableModel,
        slots: int,
        count: int,
        settings: LoopSettings,
        mode: Mode,
        pool: GraphPool | None,
        repeats: bool = False,
    ):
        self.repeats = repeats
        self.model, self.count, self.settings, self.mode, self.pool = model, count, settings, mode, pool
        self.state = StepState.make(model, slots, count, settings)
        self._loops: OrderedDict[Structure, DeviceLoop] = OrderedDict()
        self._seen: OrderedDict[Structure, None] = OrderedDict()

    def loop(self, prompts: Prefix, of_slot: Sequence[int], may_capture: bool = True) -> DeviceLoop | None:
        """The loop for slots that read `prompts` (with guidance the empty one last), loaded with them.

        None in mode "auto" at first sight unless calls repeat: it is not certain that a capture would be earned back.
        None as well where one would have to be made and `may_capture` is false.
        """
        structure = (tuple(of_slot), tuple(prompts.lengths), prompts.next_position[0])
        if not may_capture and structure not in self._loops:
            return None
        found = self._loops.pop(structure, None)
        if found is None and self.mode == "auto" and not self.repeats and structure not in self._seen:
            self._seen[structure] = None
            while len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            return None
        if found is None:
            while len(self._loops) >= STRUCTURES:
                self._loops.popitem(last=False)[1].close()
            hidden = GuidedHidden(self.model, prompts, of_slot, self.settings.guidance_scale, self.count)
            settings, head = self.settings, image_head(self.model, self.settings.head)
            found = DeviceLoop(
                hidden,
                head,
                self.state,
                settings.seed,
                mode=self.mode,
                pool=self.pool,
                backend=settings.backend,
            )
            log.info("steps of %d slots: %s", len(of_slot), found.steps.report())
        else:
            assert isinstance(found.hidden_of, GuidedHidden)
            found.hidden_of.load(prompts)
        self._loops[structure] = found
        return found

    def close(self) -> None:
        """Give all captures back."""
        while self._loops:
            self._loops.popitem()[1].close()


class CapturedSlots(EagerSlots):
    """Slots that run whole stretches. Takes what `EagerSlots` takes, the cache of captures, a mode, and whether calls
    like this one come again and again."""

    def __init__(
        self,
        model: CapturableModel,
        prompts: Prefix,
        prompt_of_row: Sequence[int],
        look_of_row: Sequence[int],
        slots: int,
        count: int,
        settings: LoopSettings,
        cache: CaptureCache[Bucket],
        mode: Mode = "auto",
        *,
        repeats: bool = False,
        limit: RowLimit | None = None,
        keep_first: bool = True,
    ):
        unrecorded = replace(settings, record=False)
        super().__init__(
            model, prompts, prompt_of_row, look_of_row, slots, count, unrecorded, limit=limit, keep_first=keep_first
        )
        self.settings = settings
        self._capturable = model
        self._bucket = cache.get(
            (mode, slots, count, replace(settings, max_rows=0)),
            read_by(model),
            model.device,
            lambda pool: Bucket(model, slots, count, settings, mode, pool, repeats),
        )
        state = self._bucket.state
        state.stop_at.zero_()
        state.broken.zero_()
        self.codes, self.chosen, self._broken = state.codes, state.chosen, state.broken
        if state.inputs is not None and state.picked is not None and state.logp is not None:
            self.records = (state.inputs, state.picked, state.logp)
        self._prompt_of_slot = [self._prompt_of_row[0]] * slots
        self._loop: tuple[tuple[int, ...], DeviceLoop | None] | None = None
        self._by_the_host = False

    @property
    def stretch(self) -> int:  # type: ignore[override]
        """Steps that one call of :meth:`run` may take: all there are, or one where the host runs them."""
        return 1 if self._loop_now() is None else 1 << 16

    def place(self, candidate: Candidate, known: Tensor) -> None:
        super().place(candidate, known)
        self._prompt_of_slot[candidate.slot] = self._prompt_of_row[candidate.row]

    def run(self, active: Sequence[Candidate], steps: int = 1) -> None:
        loop, rows_of = self._loop_now(), steps * len(active)
        profiling.share("row-steps that ran captured", 0 if loop is None else rows_of, rows_of)
        if loop is None:
            super().run(active, steps)
            return
        state, device = self._bucket.state, self.codes.device
        rows = [[0, 0, 0] for _ in self._prompt_of_slot]
        for candidate in active:
            rows[candidate.slot] = [candidate.sample_id, candidate.step, candidate.step + steps]
        host = torch.tensor(rows).to(device)
        state.sample_ids.copy_(host[:, 0])
        state.step.copy_(host[:, 1])
        state.stop_at.copy_(host[:, 2])
        loop.run()

    def _loop_now(self) -> DeviceLoop | None:
        """The loop for the prompts that the slots read now, or None where the host runs the steps."""
        now = tuple(self._prompt_of_slot)
        if self._by_the_host:
            return None
        if self._loop is None or self._loop[0] != now:
            one = len(set(now)) == 1
            of_slot = [0] * len(now) if one else list(range(len(now)))
            try:
                prompts = self._padded(now[:1] if one else now)
                found = self._bucket.loop(prompts, of_slot, self.may_capture)
                if found is None and not self.may_capture:
                    return None  # this step alone: the next one may
                self._loop = now, found
            except torch.OutOfMemoryError:
                log.warning("no memory for captured steps of %d slots: the host runs them", len(now))
                self._by_the_host = True
                return None
        return self._loop[1]

    def _padded(self, of_slot: Sequence[int]) -> Prefix:
        """The prompts `of_slot` in the few shapes that captures are made for, and with guidance the empty one."""
        distinct = list(dict.fromkeys(of_slot))
        padded = self._capturable.padded(self.prompts.select(distinct))
        prompts = padded.select([distinct.index(prompt) for prompt in of_slot])
        return prompts + self.prompts.select([len(self.prompts) - 1]) if self.settings.guidance_scale > 0 else prompts
