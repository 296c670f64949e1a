"""One MaskGIT step over a batch of rows: prompts once, image rows and code columns only, guidance within the head.

Every row has its own sample id, timestep, temperature and mask length, so rows at different timesteps share a batch.
The state of a trajectory lies in its slot; who runs in which slot is loop.py's business. Everything taken here has been
checked by engine.py.

At step 0 all candidates of one prompt and one set of known codes look alike, and without their prompt even all with the
same known codes: their hidden states are computed once a call and kept where others may want them.

Shape suffixes: S slots, B rows of one step, N image codes, T timesteps, K codebook, D width.
Source of the step: MaskGIT (Chang et al., 2022); where the loops of models differ, their `SamplingRule` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import MASK, ops
from ..models import MaskedModel, Prefix
from ..utils.memory import RowLimit
from .head import CodeHead, GuidedStates
from .remasking import most_sure_again
from .scheduler import Candidate

LOGITS_BYTES = 512 << 20
"""Largest logits tensor held at once; more rows than fit go through head and step in parts. Where each row has guidance
of its own and the head's products are of 16 bits there are two such tensors for a moment."""

FIRST_BYTES = 256 << 20
"""Most bytes of hidden states of step 0 that are kept for candidates that begin later."""

Noise = Callable[[list[int], list[int]], tuple[Tensor, Tensor]]
"""(sample ids, steps) of a batch → token Gumbel [B, N, K] and rank Gumbel [B, N], in place of the Philox noise."""


@dataclass(frozen=True)
class LoopSettings:
    """The numbers of one generation, equal for all its rows."""

    steps: int
    guidance_scale: float
    """s in (1 + s)·cond − s·uncond, whatever the model's convention (`SamplingRule.strength`)."""
    temperature: float
    """Of the re-masking noise before it decays (`SamplingRule.temperatures`)."""
    schedule: str
    seed: int
    record: bool
    max_rows: int
    backend: str | None = None
    head: str = "auto"
    """How the head of the codes is applied (head.py)."""


@dataclass
class Trajectory:
    """What a slot holds of one candidate after t steps."""

    codes: Tensor
    """int64 [N], −1 where unknown."""
    chosen: Tensor
    """int64 [N], all known: what the last step sampled or kept."""
    records: tuple[Tensor, ...] = ()
    """(inputs, chosen, logp), each [t, N]; empty where nothing is recorded."""


@dataclass(frozen=True)
class StepNumbers:
    """What the rows of one step are sampled with, each [B]."""

    timestep: Tensor
    """float32: the part of its steps that a row has done."""
    wanted: Tensor
    """int64: codes to stay masked, before the row's own number of unknown codes limits it."""
    temperature: Tensor
    """float32: of the re-masking noise."""


class EagerSlots:
    """Slots whose step is run by the host, over the rows that are in use and no others."""

    stretch: int = 1
    """Steps that one call of :meth:`run` may take: after each the host wants to look."""

    may_capture: bool = True
    """False while another thread uses the device: a step must not be captured then."""

    def __init__(
        self,
        model: MaskedModel,
        prompts: Prefix,
        prompt_of_row: Sequence[int],
        look_of_row: Sequence[int],
        slots: int,
        count: int,
        settings: LoopSettings,
        *,
        limit: RowLimit | None = None,
        keep_first: bool = True,
        noise: Noise | None = None,
    ):
        self.model, self.prompts, self.settings = model, prompts, settings
        self._prompt_of_row, self._look_of_row, self._noise = list(prompt_of_row), list(look_of_row), noise
        self._limit = limit or RowLimit()
        self._keep_first = keep_first
        self._first: dict[tuple[int, int], Tensor] = {}
        device, steps = model.device, settings.steps
        self.codes = torch.zeros(slots, count, dtype=torch.int64, device=device)
        self.chosen = torch.zeros_like(self.codes)
        self.records: tuple[Tensor, ...] = ()
        if settings.record:
            self.records = empty_records(slots, steps, count, model.codebook_size, device)
        self._broken = torch.zeros((), dtype=torch.bool, device=device)
        decay = model.rule.temperatures(settings.temperature, steps)
        self._temperature = torch.tensor(decay, dtype=torch.float32, device=device)
        self._wanted = wanted_masks(settings.schedule, steps, count).to(device)
        self._head = CodeHead(model, settings.head, keep=True)
        self._chunk = max(1, LOGITS_BYTES // (count * model.codebook_size * 4))
        self._row_bytes = model.costs.step_bytes(count)

    @property
    def finite(self) -> bool:
        """Whether all log-probs so far were finite."""
        return not bool(self._broken)

    def place(self, candidate: Candidate, known: Tensor) -> None:
        """Put a candidate into its slot: at step 0 from `known` int64 [N], or as it was saved."""
        slot, saved = candidate.slot, candidate.state
        if saved is None:
            self.codes[slot] = self.chosen[slot] = known
            return
        self.codes[slot], self.chosen[slot] = saved.codes, saved.chosen
        for record, its in zip(self.records, saved.records, strict=True):
            record[slot, : len(its)] = its

    def save(self, candidate: Candidate) -> Trajectory:
        """A copy of what the candidate's slot holds."""
        held = self.held(candidate)
        return Trajectory(held.codes.clone(), held.chosen.clone(), tuple(record.clone() for record in held.records))

    def held(self, candidate: Candidate) -> Trajectory:
        """What the candidate's slot holds, as views."""
        slot = candidate.slot
        records = tuple(record[slot, : candidate.step] for record in self.records)
        return Trajectory(self.codes[slot], self.chosen[slot], records)

    def look(self, candidates: Sequence[Candidate]) -> Tensor:
        """int64 [B, N]: the sampled codes of `candidates`, all known."""
        return self.chosen[[candidate.slot for candidate in candidates]]

    def run(self, active: Sequence[Candidate], steps: int = 1) -> None:
        """Advance every candidate of `active` by `steps` timesteps, each at its own."""
        active = sorted(active, key=self._order)
        for ahead in range(steps):
            self._step(active, [candidate.step + ahead for candidate in active])

    def _order(self, candidate: Candidate) -> tuple[int, ...]:
        """Where a candidate stands in the batch: rows of one prompt, and of prompts of one length, side by side."""
        prompt = self._prompt_of_row[candidate.row]
        return self.prompts.lengths[prompt], prompt, candidate.slot

    # --- one step --------------------------------------------------------------------------------------------------

    def _step(self, active: Sequence[Candidate], at: list[int]) -> None:
        device = self.codes.device
        host = torch.tensor([[c.slot, c.sample_id, step] for c, step in zip(active, at, strict=True)])
        slots, samples, steps = host.to(device, non_blocking=True).unbind(1)
        codes = self.codes[slots]
        numbers = self._numbers(active, at, steps)
        states = self._states(active, at, codes, numbers.timestep)
        unknown = (codes == MASK).sum(-1)
        mask_len = torch.minimum(numbers.wanted, unknown - 1).clamp(min=1)
        noise = None if self._noise is None else self._noise([c.sample_id for c in active], at)
        for start in range(0, len(active), self._chunk):
            part = slice(start, start + self._chunk)
            gumbel = (None, None) if noise is None else (noise[0][part], noise[1][part])
            logits = self._head(states.part(start, start + self._chunk))
            for rows, seed in self._seeds(active[part]):
                out = ops.maskgit_step(
                    logits[rows],
                    codes[part][rows],
                    mask_len=mask_len[part][rows],
                    temperature=numbers.temperature[part][rows],
                    seed=seed,
                    sample_ids=samples[part][rows],
                    step=steps[part][rows],
                    token_gumbel=gumbel[0],
                    rank_gumbel=gumbel[1],
                    backend=self.settings.backend,
                )
                if self.model.rule.remasking == "most_sure":
                    out = most_sure_again(
                        out,
                        codes[part][rows],
                        mask_len_B=mask_len[part][rows],
                        temperature_B=numbers.temperature[part][rows],
                        seed=seed,
                        sample_ids_B=samples[part][rows],
                        step_B=steps[part][rows],
                        rank_gumbel_BN=gumbel[1],
                    )
                self._store(slots[part][rows], steps[part][rows], codes[part][rows], out)

    def _numbers(self, active: Sequence[Candidate], at: list[int], steps: Tensor) -> StepNumbers:
        """What the rows of `active` are sampled with at the timesteps `at`, which `steps` int64 [B] are as well."""
        return StepNumbers(steps / self.settings.steps, self._wanted[steps], self._temperature[steps])

    def _seeds(self, active: Sequence[Candidate]) -> list[tuple[slice, int]]:
        """Runs of rows with one seed of the noise."""
        return [(slice(None), self.settings.seed)]

    def _store(self, slots: Tensor, steps: Tensor, codes: Tensor, out: ops.MaskgitStep) -> None:
        self.codes[slots] = out.codes
        self.chosen[slots] = out.chosen
        self._broken |= ~torch.isfinite(out.logp).all()
        for record, values in zip(self.records, (codes, out.chosen, out.logp), strict=False):
            record[slots, steps] = values.to(record.dtype)

    def _states(self, active: Sequence[Candidate], at: list[int], codes: Tensor, timestep: Tensor) -> GuidedStates:
        """What the head is applied to, of every row; `timestep` [B] as the model takes it."""
        scale, rows = self.settings.guidance_scale, range(len(active))
        looks = [-1 - row if at[row] else self._look_of_row[active[row].row] for row in rows]
        cond = [(self._prompt_of_row[active[row].row], looks[row]) for row in rows]
        if scale == 0:
            return GuidedStates(self._hidden_of(cond, codes, timestep))
        empty = len(self.prompts) - 1
        hidden = self._hidden_of(cond + [(empty, look) for look in looks], codes, timestep)
        own, without = hidden.chunk(2)
        return GuidedStates(own, without, scale)

    def _hidden_of(self, wanted: list[tuple[int, int]], codes: Tensor, timestep: Tensor) -> Tensor:
        """Hidden states of (prompt, look) pairs, those that are equal computed once. Look −1 − b is row b's own."""
        rows = codes.shape[0]
        first_place: dict[tuple[int, int], int] = {}
        for place, key in enumerate(wanted):
            if key not in self._first:
                first_place.setdefault(key, place)
        lengths = self.prompts.lengths
        order = sorted(first_place, key=lambda key: (lengths[key[0]], key[0], first_place[key]))
        found = dict(self._first)
        if order:
            which = [first_place[key] % rows for key in order]
            some, at = (codes, timestep) if which == list(range(rows)) else (codes[which], timestep[which])
            prompts = [prompt for prompt, _ in order]
            hidden = self._limit.split(
                len(order),
                self._row_bytes,
                codes.device,
                lambda part: self.model.image_hidden(some[part], self.prompts, prompts[part], at[part]),
            )
            if order == wanted:
                self._remember(order, hidden)
                return hidden
            found.update(zip(order, hidden, strict=True))
            self._remember(order, hidden)
        return torch.stack([found[key] for key in wanted])

    def _remember(self, keys: Sequence[tuple[int, int]], hidden: Tensor) -> None:
        for key, its in zip(keys, hidden, strict=True):
            room = (len(self._first) + 1) * its.numel() * its.element_size() <= FIRST_BYTES
            if self._keep_first and key[1] >= 0 and room:
                self._first[key] = its.clone()


def empty_records(rows: int, steps: int, count: int, codebook: int, device: torch.device) -> tuple[Tensor, ...]:
    """Room for (inputs, chosen, logp) [rows, T, N] of trajectories."""
    small = torch.int16 if codebook <= 2**15 else torch.int32
    shape = (rows, steps, count)
    codes = (torch.empty(shape, dtype=small, device=device) for _ in range(2))
    return (*codes, torch.empty(shape, dtype=torch.float32, device=device))


def wanted_masks(schedule: str, steps: int, count: int) -> Tensor:
    """int64 [T]: codes to stay masked after each step, before the row's own number of unknown codes limits it."""
    return torch.tensor([ops.mask_len(schedule, count, count + 1, step, steps) for step in range(steps)])
