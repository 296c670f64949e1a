"""The MaskGIT loop over a batch of rows: prompts once, image rows and code columns only, guidance before the head.

Every row has its own sample id, timestep, temperature and mask length, so rows at different timesteps share a batch: a
row whose preview fails starts again at step 0 beside rows that are further on (DESIGN, levers 1 to 3 and 7). State is
tensors indexed by row; the host knows only which candidate runs where. It takes ids and tensors that engine.py has
checked; it does not know tokenizers, pixels (a callback decodes previews) or rewards.

Shape suffixes: R rows, B rows of one step, N image codes, T timesteps, K codebook, D width.
Source of the step: Show-o's `t2i_generate` after MaskGIT (Chang et al., 2022); DESIGN, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import MASK, ops, profiling
from ..models import PromptKV, Showo, image_hidden
from .dsog import Candidate, Selection

LOGITS_BYTES = 512 << 20
"""Largest logits tensor held at once; more rows than fit go through head and step in parts."""

Noise = Callable[[list[int], list[int]], tuple[Tensor, Tensor]]
"""(sample ids, steps) of a batch → token Gumbel [B, N, K] and rank Gumbel [B, N], in place of the Philox noise."""


@dataclass(frozen=True)
class LoopSettings:
    """The numbers of one generation, equal for all its rows."""

    steps: int
    guidance_scale: float
    temperature: float
    schedule: str
    seed: int
    record: bool
    max_rows: int
    backend: str | None = None


@dataclass
class Preview:
    """When candidates are looked at, and by whom: (codes [B, N], rows) → one score a row."""

    at: int
    score: Callable[[Tensor, list[int]], list[float]]
    selection: Selection


class ImageLoop:
    """Draws all rows from `known` int64 [R, N] (−1 unknown). After :meth:`run` the public tensors hold the rollout.

    `prompts` holds the distinct prompts and, when guidance is on, the empty one last; row r reads `prompt_of_row[r]`.
    """

    def __init__(
        self,
        model: Showo,
        prompts: PromptKV,
        prompt_of_row: Sequence[int],
        kinds: Sequence[int],
        known: Tensor,
        sample_ids: Sequence[int],
        settings: LoopSettings,
        preview: Preview | None = None,
        progress: Callable[[int, int], None] | None = None,
        noise: Noise | None = None,
    ):
        self.model, self.prompts, self.prompt_of_row, self.kinds = model, prompts, list(prompt_of_row), list(kinds)
        self.settings, self.preview, self.progress, self.noise = settings, preview, progress, noise
        rows, count = known.shape
        steps, device = settings.steps, known.device
        self._known = known
        self._codes = known.clone()
        self.codes = known.clone()
        self.preview_codes = known.clone() if preview else None
        self.candidates = [Candidate(row, sample_ids[row], settled=preview is None) for row in range(rows)]
        self.inputs: Tensor | None = None
        self.chosen: Tensor | None = None
        self.logp: Tensor | None = None
        if settings.record:
            small = torch.int16 if model.config.codebook_size <= 2**15 else torch.int32
            self.inputs = torch.empty(rows, steps, count, dtype=small, device=device)
            self.chosen = torch.empty_like(self.inputs)
            self.logp = torch.empty(rows, steps, count, device=device)
        self.row_steps = 0
        """Model evaluations so far, in rows."""
        self._broken = torch.zeros((), dtype=torch.bool, device=device)
        temperature, temperatures = settings.temperature, []
        for step in range(steps):
            temperature *= 1.0 - (step + 1) / steps  # published: it decays as a product
            temperatures.append(temperature)
        self._temperature = torch.tensor(temperatures, dtype=torch.float32, device=device)
        self._wanted = wanted_masks(settings.schedule, steps, count).to(device)
        self._head = image_head_fp32(model)
        self._chunk = max(1, LOGITS_BYTES // (count * model.config.codebook_size * 4))

    @profiling.phase("rollout steps")
    def run(self) -> bool:
        """Run every row to its last step. Returns False when the model gave log-probs that are not finite."""
        settings = self.settings
        order = sorted(
            range(len(self.candidates)), key=lambda row: (self.prompts.lengths[self.prompt_of_row[row]], row)
        )
        place = {row: index for index, row in enumerate(order)}
        pending = [self.candidates[row] for row in reversed(order)]
        active: list[Candidate] = []
        while pending or active:
            while pending and len(active) < settings.max_rows:
                active.append(pending.pop())
            active.sort(key=lambda candidate: place[candidate.row])
            self._step(active)
            if self.preview:
                active = self._look(active)
                if not pending and all(candidate.settled for candidate in active):
                    pending = [candidate for candidate in self._fill() if candidate.step < settings.steps]
            active = [candidate for candidate in active if candidate.step < settings.steps]
            self._report()
        return not bool(self._broken)

    # --- one step --------------------------------------------------------------------------------------------------

    def _step(self, active: list[Candidate]) -> None:
        """Advance every candidate of `active` by one timestep, each at its own."""
        device, settings = self._codes.device, self.settings
        host = torch.tensor([[c.row, c.sample_id, c.step] for c in active])
        rows, samples, steps = host.to(device, non_blocking=True).unbind(1)
        codes = self._codes[rows]
        guided, of_row = self._guided_hidden(active, codes)
        unknown = (codes == MASK).sum(-1)
        mask_len = torch.minimum(self._wanted[steps], unknown - 1).clamp(min=1)
        noise = None
        if self.noise is not None:
            noise = self.noise([c.sample_id for c in active], [c.step for c in active])
        for start in range(0, len(active), self._chunk):
            part = slice(start, start + self._chunk)
            hidden = guided if of_row is None else guided[of_row]
            out = ops.maskgit_step(
                F.linear(hidden[part], *self._head),
                codes[part],
                mask_len=mask_len[part],
                temperature=self._temperature[steps[part]],
                seed=settings.seed,
                sample_ids=samples[part],
                step=steps[part],
                token_gumbel=None if noise is None else noise[0][part],
                rank_gumbel=None if noise is None else noise[1][part],
                backend=settings.backend,
            )
            self._store(rows[part], steps[part], codes[part], out)
        self.row_steps += len(active)
        for candidate in active:
            candidate.step += 1

    def _store(self, rows: Tensor, steps: Tensor, codes: Tensor, out: ops.MaskgitStep) -> None:
        self._codes[rows] = out.codes
        self.codes[rows] = out.chosen
        self._broken |= ~torch.isfinite(out.logp).all()
        if self.inputs is not None and self.chosen is not None and self.logp is not None:
            self.inputs[rows, steps] = codes.to(self.inputs.dtype)
            self.chosen[rows, steps] = out.chosen.to(self.chosen.dtype)
            self.logp[rows, steps] = out.logp.to(self.logp.dtype)

    def _guided_hidden(self, active: list[Candidate], codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states ready for the head, and which of them each row reads (None: row by row).

        Candidates of one kind at step 0 look alike, so they are computed once.
        """
        looks = [self.kinds[c.row] if c.step == 0 else -1 - i for i, c in enumerate(active)]
        unique: dict[int, int] = {}
        of_row = [unique.setdefault(look, len(unique)) for look in looks]
        pick = [looks.index(look) for look in unique]
        prompt_of = [self.prompt_of_row[active[i].row] for i in pick]
        shared = len(pick) < len(active)
        if shared:
            codes = codes[torch.tensor(pick, device=codes.device)]
        scale = self.settings.guidance_scale
        if scale == 0:
            hidden = exact(image_hidden(self.model, codes, self.prompts, prompt_of))
        else:
            empty = [len(self.prompts) - 1] * len(pick)
            both = image_hidden(self.model, torch.cat([codes, codes]), self.prompts, prompt_of + empty)
            cond, uncond = exact(both).chunk(2)
            hidden = (1 + scale) * cond - scale * uncond
        return hidden, torch.tensor(of_row, device=codes.device) if shared else None

    # --- previews --------------------------------------------------------------------------------------------------

    def _look(self, active: list[Candidate]) -> list[Candidate]:
        """Judge the candidates that reached their preview; rows of those that failed start afresh or fall vacant."""
        preview = self.preview
        assert preview is not None and self.preview_codes is not None
        due = [c for c in active if not c.settled and c.step == preview.at]
        if not due:
            return active
        rows = [c.row for c in due]
        self.preview_codes[rows] = self.codes[rows]
        with profiling.phase("previews"):
            scores = preview.score(self.codes[rows], rows)
        following: list[Candidate] = [c for c in active if c.settled or c.step != preview.at]
        for candidate, score in zip(due, scores, strict=True):
            heir = preview.selection.judge(candidate, score, partial(self._save, candidate))
            if heir is None:
                continue
            if heir is not candidate:
                self._codes[heir.row] = self._known[heir.row]
                self.candidates[heir.row] = heir
            following.append(heir)
        return following

    def _save(self, candidate: Candidate) -> tuple[Tensor | None, ...]:
        row, done = candidate.row, candidate.step
        records = (self.inputs, self.chosen, self.logp)
        state = (self._codes[row], self.codes[row], *(r if r is None else r[row, :done] for r in records))
        return tuple(tensor if tensor is None else tensor.clone() for tensor in state)

    def _fill(self) -> list[Candidate]:
        """Vacant rows take the best rejected candidates, which go on from where their preview left them."""
        assert self.preview is not None and self.preview_codes is not None
        filled = []
        for candidate, (codes, chosen, *records) in self.preview.selection.fill():
            row, done = candidate.row, candidate.step
            self.candidates[row] = candidate
            self._codes[row], self.codes[row], self.preview_codes[row] = codes, chosen, chosen
            for record, saved in zip((self.inputs, self.chosen, self.logp), records, strict=True):
                if record is not None:
                    record[row, :done] = saved
            filled.append(candidate)
        return filled

    def _report(self) -> None:
        if self.progress is not None:
            done = sum(c.step for c in self.candidates if c.settled)
            self.progress(done, len(self.candidates) * self.settings.steps)


def exact(hidden: Tensor) -> Tensor:
    """At least float32: guidance, head and softmax of half-precision models run there (DESIGN, lever 10)."""
    return hidden if hidden.dtype == torch.float64 else hidden.float()


def image_head_fp32(model: Showo) -> tuple[Tensor, Tensor]:
    """The head of the codes in the precision of :func:`exact`."""
    weight, bias = model.image_head()
    return exact(weight.detach()), exact(bias.detach())


def wanted_masks(schedule: str, steps: int, count: int) -> Tensor:
    """int64 [T]: codes to stay masked after each step, before the row's own number of unknown codes limits it."""
    return torch.tensor([ops.mask_len(schedule, count, count + 1, step, steps) for step in range(steps)])
