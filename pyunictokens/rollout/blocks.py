"""Text unmasked block after block: LLaDA's loop (Nie et al., 2025) over many prompts at once.

    for each block, for each of its steps:  every unknown token of the block is sampled; the likeliest stay

    token = argmax(logits + temperature·Gumbel)      confidence = softmax(logits)[token]

Only the block's positions go through the last layer and the head. Before the first step rows of one prompt are equal,
and one is computed for all. What stands in a finished block never changes, so a row whose text has ended leaves after
that block: what would follow is not part of it. Noise is keyed by (seed, sample id, step, position in the block), so a
text is the same in any batch.

Shape suffixes: B rows, R all rows, T steps, L tokens, b tokens of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import MASK, ops
from ..models import BlockRule, Prefix, WritingModel
from ..utils.errors import NotFinite
from ..utils.memory import RowLimit
from .head import CodeHead, GuidedStates
from .sampler import LOGITS_BYTES, empty_records
from .types import TextSteps


@dataclass(frozen=True)
class BlockSettings:
    """The numbers of one call, equal for all its rows (`BlockRule.plan`)."""

    length: int
    block: int
    steps: int
    temperature: float
    seed: int
    record: bool
    max_rows: int
    backend: str | None = None
    head: str = "auto"
    """How the head is applied (head.py)."""


@dataclass
class Written:
    """What :func:`write` gives."""

    tokens: Tensor
    """int64 [R, L], −1 after the end token."""
    logp: Tensor
    """float32 [R, L]: of each token at the step that made it known; 0 after the end."""
    lengths: Tensor
    """int64 [R], the end token included."""
    steps: TextSteps | None


def write(
    model: WritingModel,
    prompts: Prefix,
    prompt_of_row: Sequence[int],
    sample_ids: Sequence[int],
    settings: BlockSettings,
    limit: RowLimit | None = None,
) -> Written:
    """Texts of all rows, `max_rows` of them at once."""
    rows = len(prompt_of_row)
    order = sorted(range(rows), key=lambda row: (prompts.lengths[prompt_of_row[row]], prompt_of_row[row], row))
    parts = [order[start : start + settings.max_rows] for start in range(0, rows, settings.max_rows)]
    made = [
        _Writer(model, prompts, [prompt_of_row[r] for r in part], [sample_ids[r] for r in part], settings, limit).run()
        for part in parts
    ]
    back = torch.tensor(order, device=model.device).argsort()

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))[back]

    recorded = [each.steps for each in made if each.steps is not None]
    steps = None
    if recorded:
        inputs = joined([each.inputs for each in recorded])
        chosen = joined([each.chosen for each in recorded])
        logp = joined([each.logp for each in recorded])
        steps = TextSteps(inputs, chosen, logp, settings.block)
    return Written(
        joined([each.tokens for each in made]),
        joined([each.logp for each in made]),
        joined([each.lengths for each in made]),
        steps,
    )


class _Writer:
    """The texts of some rows at once."""

    def __init__(
        self,
        model: WritingModel,
        prompts: Prefix,
        prompt_of_row: list[int],
        sample_ids: list[int],
        settings: BlockSettings,
        limit: RowLimit | None,
    ):
        self.model, self.prompts, self.prompt_of_row, self.settings = model, prompts, prompt_of_row, settings
        device, rows, length = model.device, len(prompt_of_row), settings.length
        self._samples = torch.tensor(sample_ids, dtype=torch.int64, device=device)
        self._ends = torch.tensor(model.end_ids, device=device)
        self._head = CodeHead(model, settings.head, keep=True)
        self._limit = limit or RowLimit()
        self._row_bytes = model.costs.step_bytes(length + max(prompts.lengths))
        self._chunk = max(1, LOGITS_BYTES // (settings.block * model.codebook_size * 4))
        self.tokens = torch.full((rows, length), MASK, dtype=torch.int64, device=device)
        self.logp = torch.zeros(rows, length, device=device)
        self.records: tuple[Tensor, ...] = ()
        if settings.record:
            self.records = empty_records(rows, settings.steps, length, model.codebook_size, device)
            for record in self.records:
                record.zero_()
        self._broken = torch.zeros((), dtype=torch.bool, device=device)

    def run(self) -> Written:
        settings = self.settings
        count = settings.length // settings.block
        each = settings.steps // count
        wanted = BlockRule.unknown_after(settings.block, each)
        going = torch.arange(len(self.tokens), device=self.tokens.device)
        for number in range(count):
            place = slice(number * settings.block, (number + 1) * settings.block)
            for step, unknown in enumerate(wanted):
                self._step(going, place, number * each + step, unknown)
            ended = torch.isin(self.tokens[going, place], self._ends).any(1)
            done, going = going[ended], going[~ended]
            self._leave(done, (number + 1) * settings.block, (number + 1) * each)
            if not len(going):
                break
        if bool(self._broken):
            raise NotFinite(
                "the model gave log-probs that are not finite: its weights or activations hold NaN, or overflow in "
                "float16 (use bfloat16 or float32)"
            )
        lengths = lengths_of(self.tokens, self._ends)
        past = torch.arange(settings.length, device=lengths.device) >= lengths[:, None]
        steps = None
        if self.records:
            inputs, chosen, logp = self.records
            steps = TextSteps(inputs, chosen, logp, settings.block)
        return Written(self.tokens.masked_fill(past, MASK), self.logp.masked_fill(past, 0.0), lengths, steps)

    def _leave(self, rows: Tensor, start: int, step: int) -> None:
        """Rows whose text has ended: the rest is filled with the end token, and nothing more is sampled."""
        if not len(rows):
            return
        self.tokens[rows, start:] = self._ends[0]
        for record in self.records[:2]:
            record[rows, step:] = self.tokens[rows][:, None].to(record.dtype)

    def _step(self, going: Tensor, place: slice, step: int, unknown: int) -> None:
        """One step of the rows `going` in one block, after which `unknown` of its tokens are unknown."""
        tokens = self.tokens[going]
        rows = [self.prompt_of_row[row] for row in going.tolist()]
        if step == 0:  # nothing is known: rows of one prompt are equal
            distinct, of_row = torch.unique(torch.tensor(rows), return_inverse=True)
            first = tokens[:1].expand(len(distinct), -1)
            hidden = self._hidden(first, distinct.tolist(), place)[of_row.to(tokens.device)]
        else:
            hidden = self._hidden(tokens, rows, place)
        for start in range(0, len(going), self._chunk):
            part = slice(start, start + self._chunk)
            own, codes = going[part], tokens[part, place]
            chosen, logp, confidence = self._sampled(self._head(GuidedStates(hidden[part])), codes, own, step)
            self._broken |= ~torch.isfinite(logp).all()
            missing = codes == MASK
            order = confidence.masked_fill(~missing, torch.inf).argsort(dim=1, stable=True)
            least = torch.zeros_like(missing).scatter_(1, order[:, :unknown], True)
            kept = missing & ~least
            if self.records:
                inputs, sampled, chances = self.records
                inputs[own, step] = tokens[part].to(inputs.dtype)
                sampled[own, step] = tokens[part].clamp(min=0).to(sampled.dtype)
                sampled[own, step, place] = chosen.to(sampled.dtype)
                chances[own, step, place] = torch.where(missing, logp, 0.0).to(chances.dtype)
            self.tokens[own, place] = torch.where(kept, chosen, codes)
            self.logp[own, place] = torch.where(kept, logp.to(self.logp.dtype), self.logp[own, place])

    def _hidden(self, tokens: Tensor, prompts: list[int], place: slice) -> Tensor:
        """Hidden states [B, b, D] of one block, of rows with these prompts."""
        return self._limit.split(
            len(tokens),
            self._row_bytes,
            tokens.device,
            lambda part: self.model.block_hidden(tokens[part], self.prompts, prompts[part], place),
        )

    def _sampled(self, logits: Tensor, codes: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, log-probs at the temperature, log of the confidence), each [B, b]. Greedy tokens have log-probs at
        temperature 1."""
        heat = self.settings.temperature
        scaled = logits if heat in (0.0, 1.0) else logits / heat
        out = ops.maskgit_step(
            scaled,
            codes,
            mask_len=0,
            temperature=0.0,
            seed=self.settings.seed,
            sample_ids=self._samples[rows],
            step=step,
            token_gumbel=scaled.new_zeros(1, 1, 1).expand_as(scaled) if heat == 0 else None,
            backend=self.settings.backend,
        )
        if scaled is logits:
            return out.chosen, out.logp, out.logp
        confidence = logits.log_softmax(-1).gather(-1, out.chosen[..., None])[..., 0]
        return out.chosen, out.logp, confidence


def lengths_of(tokens_RL: Tensor, ends: Tensor) -> Tensor:
    """int64 [R]: tokens up to the first end token, which counts; all where there is none."""
    ended = torch.isin(tokens_RL, ends)
    first = ended.int().argmax(1)
    return torch.where(ended.any(1), first + 1, tokens_RL.shape[1])
