"""One MaskGIT step that lives on the device: state in tensors that never move, and the function that advances it.

Everything that differs between rows or steps (codes, sample ids, timestep, where a row stops) is read from the device,
so the step can be captured once and run to the next preview without the host (capture.py). A row beyond its stop, and
every row while `keep_going` is 0, stays as it is. Hidden states come from a function; the model has to be a
`CapturableModel`.

Shape suffixes: B rows of the bucket, N image codes, T timesteps, K codebook, D width. Numbers as in rollout/sampler.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import MASK, ops
from ...models import CapturableModel, MaskedModel, Prefix
from ...utils.errors import UserError
from ..head import CodeHead, GuidedStates
from ..sampler import LOGITS_BYTES, LoopSettings, wanted_masks
from .capture import CapturedSteps, GraphPool, Mode

HiddenOf = Callable[[Tensor, Tensor], GuidedStates]
"""codes int64 [B, N] (−1 unknown), timesteps float [B] → hidden states [B, N, D], guided ones twice. It waits for
nothing, so it can be captured."""


@dataclass
class StepState:
    """What a step reads and writes. All tensors keep their places for as long as a capture lives."""

    codes: Tensor
    """int64 [B, N], −1 where unknown: what the next step sees."""
    chosen: Tensor
    """int64 [B, N], all known: what the last step sampled or kept."""
    sample_ids: Tensor
    """int64 [B]."""
    step: Tensor
    """int64 [B]: steps a row has done."""
    stop_at: Tensor
    """int64 [B]: a row with step ≥ stop_at stands still. Its preview or T; 0 for a row nobody uses."""
    urgent: Tensor
    """bool [B]: the run ends when this row reaches its stop (a preview is due), whatever the others do."""
    keep_going: Tensor
    """int32 [1]: 0 when an urgent row has reached its stop, or no row has steps left."""
    broken: Tensor
    """bool [1]: some log-prob was not finite."""
    temperature: Tensor
    """float32 [T]: of the re-masking noise at each step."""
    wanted: Tensor
    """int64 [T]: codes to stay masked after each step (`wanted_masks`)."""
    inputs: Tensor | None = None
    """int16 or int32 [B, T, N]: the codes each step saw."""
    picked: Tensor | None = None
    """Like `inputs`: the codes each step sampled or kept."""
    logp: Tensor | None = None
    """float32 [B, T, N]."""

    @classmethod
    def make(
        cls,
        model: MaskedModel,
        rows: int,
        count: int,
        settings: LoopSettings,
    ) -> StepState:
        """State for a bucket of `rows` rows of `count` codes, none of them in use."""
        steps, device = settings.steps, model.device
        small = torch.int16 if model.codebook_size <= 2**15 else torch.int32
        decay = model.rule.temperatures(settings.temperature, steps)

        def record(dtype: torch.dtype) -> Tensor | None:
            return torch.zeros(rows, steps, count, dtype=dtype, device=device) if settings.record else None

        def whole(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            codes=whole(rows, count),
            chosen=whole(rows, count),
            sample_ids=whole(rows),
            step=whole(rows),
            stop_at=whole(rows),
            urgent=whole(rows, dtype=torch.bool),
            keep_going=whole(1, dtype=torch.int32),
            broken=whole(1, dtype=torch.bool),
            temperature=torch.tensor(decay, dtype=torch.float32, device=device),
            wanted=wanted_masks(settings.schedule, steps, count).to(device),
            inputs=record(small),
            picked=record(small),
            logp=record(torch.float32),
        )

    def start(self, rows: Sequence[int], known: Tensor, sample_ids: Sequence[int], stop_at: int, urgent: bool) -> None:
        """Give `rows` new candidates at step 0 from codes `known` int64 [len(rows), N]."""
        where = torch.tensor(rows, device=self.codes.device)
        self.codes[where] = self.chosen[where] = known.to(self.codes)
        self.sample_ids[where] = torch.tensor(sample_ids, device=self.codes.device)
        self.step[where] = 0
        self.let_go(rows, stop_at, urgent)

    def let_go(self, rows: Sequence[int], stop_at: int, urgent: bool = False) -> None:
        """Move the stop of `rows`: to T for those that passed their preview, to 0 for those that leave."""
        if not 0 <= stop_at <= len(self.wanted):
            raise UserError(f"stop_at={stop_at}: must be between 0 and the {len(self.wanted)} timesteps")
        where = torch.tensor(rows, device=self.codes.device)
        self.stop_at[where] = stop_at
        self.urgent[where] = urgent

    def arm(self) -> None:
        """Let the next run begin, where a row has steps left."""
        self.keep_going.copy_((self.step < self.stop_at).any().to(torch.int32))

    def steps_left(self) -> int:
        """The most steps that any row has before its stop (waits for the device)."""
        return max(0, int((self.stop_at - self.step).max()))


def advance(
    state: StepState,
    hidden_of: HiddenOf,
    head: CodeHead,
    seed: int,
    backend: str | None = None,
) -> None:
    """One step of every row that has one left; then set `keep_going`. Equals one step of `ImageLoop`, row for row.

    The head is read at every step, so that weights that were written in place are seen.
    """
    rows, count = state.codes.shape
    active = (state.step < state.stop_at) & (state.keep_going != 0)
    at = state.step.clamp(max=len(state.wanted) - 1)
    unknown = (state.codes == MASK).sum(-1)
    mask_len = torch.minimum(state.wanted[at], unknown - 1).clamp(min=1)
    temperature = state.temperature[at]
    states = hidden_of(state.codes, at / len(state.wanted))
    part = max(1, LOGITS_BYTES // (count * head.entries * 4))
    index = torch.arange(rows, device=state.codes.device)
    for start in range(0, rows, part):
        some = slice(start, start + part)
        out = ops.maskgit_step(
            head(states.part(start, start + part)),
            state.codes[some],
            mask_len=mask_len[some],
            temperature=temperature[some],
            seed=seed,
            sample_ids=state.sample_ids[some],
            step=at[some],
            backend=backend,
        )
        _write(state, index[some], at[some], active[some], out)
    state.step += active
    reached = active & (state.step >= state.stop_at)
    left = (state.step < state.stop_at).any()
    state.keep_going.copy_((left & ~(reached & state.urgent).any()).to(torch.int32))


def _write(state: StepState, rows: Tensor, at: Tensor, active: Tensor, out: ops.MaskgitStep) -> None:
    on, before = active[:, None], state.codes[rows]
    state.broken |= (active & ~torch.isfinite(out.logp).all(-1)).any()
    if state.inputs is not None and state.picked is not None and state.logp is not None:
        for record, values in ((state.inputs, before), (state.picked, out.chosen), (state.logp, out.logp)):
            record[rows, at] = torch.where(on, values.to(record.dtype), record[rows, at])
    state.codes[rows] = torch.where(on, out.codes, before)
    state.chosen[rows] = torch.where(on, out.chosen, state.chosen[rows])


class GuidedHidden:
    """`HiddenOf` for rows over prompts: row b reads prompt `prompt_of_row[b]`, guided against the last one.

    The tensors of the prompts are copied into ones of its own, so that :meth:`load` can bring others of the same
    lengths under a capture that has been made.
    """

    def __init__(
        self, model: CapturableModel, prompts: Prefix, prompt_of_row: Sequence[int], guidance_scale: float, count: int
    ):
        self.scale, rows = guidance_scale, len(prompt_of_row)
        self.prompts = prompts.with_tensors([tensor.clone() for tensor in prompts.tensors()])
        every = list(prompt_of_row)
        if guidance_scale > 0:
            every += [len(prompts) - 1] * rows
        # Rows of one prompt length stand together, so that attention needs no index made on the host.
        order = sorted(range(len(every)), key=lambda row: (prompts.lengths[every[row]], row))
        self._step = model.image_step(self.prompts, [every[row] for row in order], count)
        device = self.prompts.parts[0][0].device
        self._order = torch.tensor([row % rows for row in order], device=device)
        self._back = torch.tensor([order.index(row) for row in range(len(every))], device=device)

    @torch.no_grad()
    def load(self, prompts: Prefix) -> None:
        """Take the tensors of other prompts of the same lengths, in the same order."""
        mine = self.prompts
        if prompts.lengths != mine.lengths or prompts.next_position != mine.next_position:
            raise UserError(f"prompts of lengths {prompts.lengths}: these hidden states were made for {mine.lengths}")
        torch._foreach_copy_(mine.tensors(), prompts.tensors())
        self._step.refresh()

    def __call__(self, codes: Tensor, timestep: Tensor) -> GuidedStates:
        hidden = self._step(codes[self._order], timestep[self._order])[self._back]
        if self.scale == 0:
            return GuidedStates(hidden)
        own, without = hidden.chunk(2)
        return GuidedStates(own, without, self.scale)


class DeviceLoop:
    """A bucket of rows that run without the host from look to look: state, captured step, and what they cost.

        loop = DeviceLoop(hidden_of, head, StepState.make(model, ...), seed)
        loop.state.start(rows, known, sample_ids, stop_at=preview, urgent=True)
        loop.run()                       # until a preview is due or all rows are done; then decide, start, let_go, run

    `mode`, `pool` and what is chosen are those of :class:`CapturedSteps`.
    """

    def __init__(
        self,
        hidden_of: HiddenOf,
        head: CodeHead,
        state: StepState,
        seed: int,
        *,
        mode: Mode = "auto",
        pool: GraphPool | None = None,
        backend: str | None = None,
    ):
        self.hidden_of, self.state = hidden_of, state
        self.steps = CapturedSteps(
            lambda: advance(state, hidden_of, head, seed, backend), state.keep_going, mode=mode, pool=pool
        )

    def run(self) -> int:
        """Steps until the next look; returns their number."""
        self.state.arm()
        return self.steps.run(self.state.steps_left())

    def close(self) -> None:
        """Give the captured graph back."""
        self.steps.close()


def image_head(model: MaskedModel, kind: str = "auto") -> CodeHead:
    """The head of the codes (`CodeHead`), whose weights are read at every call so that new ones are seen."""
    return CodeHead(model, kind)


def read_by(model: MaskedModel) -> list[Tensor]:
    """What a captured step of `model` reads besides its own state (for `CaptureCache`): weights and concept rows."""
    return [*model.parameters(), *(model.concept.parameters() if model.concept is not None else ())]
