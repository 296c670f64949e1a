"""The streamed update of UniCTask-GRPO: memory that does not depend on the number of timesteps.

The objective (equation 7) is a sum over answer tokens and over the image tokens of all T timesteps:

    loss = −1/R Σ_i Σ_j α_j·( min(D_ij·A_i, clip(D_ij)·A_i) − β·k3_ij ),   D = exp(logp − old_logp)

so it is taken a few rollouts and timesteps at a time: forward, `ops.maskgit_grpo_loss`, backward, next. What the pieces
share (keys and values of prompts, heads that learn) is computed once, cut into leaves that add up gradients, and sent
back once at the end. The sum equals the loss with all graphs alive, gradient by gradient.

Shape suffixes: R rollouts, T timesteps, N image codes, L answer tokens, D width, K codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import ops
from ..models import PromptKV, Showo, answer_hidden, image_hidden, prefill_mmu, prefill_t2i
from ..ops.objectives import token_mask as token_mask
from .logprobs import Leaves, PromptLeaves, text_logprob, text_parts
from .microbatch import Pieces, add_gradients, learning


@dataclass
class ImageTrajectories:
    """R image rollouts as the update sees them. Codes may be of any integer type; −1 is unknown."""

    prompts: list[list[int]]
    """Unpadded drawing prompts (`prompting.t2i_text`), each once."""
    prompt_of_row: list[int]
    """Which prompt each rollout was drawn from."""
    inputs_RTN: Tensor
    chosen_RTN: Tensor
    old_logp_RTN: Tensor
    empty_prompt: list[int]
    """The prompt of the unconditional half."""
    max_text: int
    guidance_scale: float
    ref_logp_RTN: Tensor | None = None
    mask_RTN: Tensor | None = None
    """Tokens that count; None counts all."""
    weight: float = 1.0
    """What each token's term counts for: above 1 where timesteps were left out (:func:`some_timesteps`)."""

    def __len__(self) -> int:
        return self.inputs_RTN.shape[0]


@dataclass
class AnswerTrajectories:
    """R answers to one question about one picture."""

    codes_N: Tensor
    question: list[int]
    """Ids of the question as the model reads it."""
    tokens_RL: Tensor
    """−1 after the end."""
    old_logp_RL: Tensor
    temperature: float = 1.0
    ref_logp_RL: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens_RL.shape[0]

    @property
    def mask_RL(self) -> Tensor:
        return self.tokens_RL >= 0


@dataclass(frozen=True)
class LossSettings:
    """The numbers of the objective, and how large its pieces are."""

    beta: float = 0.01
    clip_low: float = 0.2
    clip_high: float = 0.2
    alpha_answer: float = 0.4
    alpha_image: float = 0.6
    micro_rows: int = 4
    """Rollouts in one piece; 0 takes what the memory at hand allows."""
    micro_timesteps: int = 1
    """Timesteps in one piece; 0 takes what the memory at hand allows."""


@dataclass
class UpdateStats:
    """What an update looked like, over all tokens that count."""

    loss: float = 0.0
    loss_answer: float = 0.0
    loss_image: float = 0.0
    kl: float = 0.0
    clip_fraction: float = 0.0
    ratio_max: float = 0.0
    ratio_mean: float = 0.0
    entropy: float = 0.0
    """Of the image tokens' distributions, in nats."""
    tokens: int = 0
    image_tokens: int = 0
    pieces: int = 0
    """Pieces of the image tokens' part."""
    packed_rows: int = 0
    """Packed (rollout, timestep) rows of its largest piece."""

    @classmethod
    def merged(cls, parts: Sequence[UpdateStats]) -> UpdateStats:
        """Those of an objective whose rows were taken in `parts`: losses add up, means are weighted by tokens."""
        tokens = sum(part.tokens for part in parts)
        drawn = sum(part.image_tokens for part in parts)

        def mean(name: str, weight: str, total: int) -> float:
            return sum(getattr(part, name) * getattr(part, weight) for part in parts) / max(1, total)

        return cls(
            loss=sum(part.loss for part in parts),
            loss_answer=sum(part.loss_answer for part in parts),
            loss_image=sum(part.loss_image for part in parts),
            kl=mean("kl", "tokens", tokens),
            clip_fraction=mean("clip_fraction", "tokens", tokens),
            ratio_max=max((part.ratio_max for part in parts), default=0.0),
            ratio_mean=mean("ratio_mean", "tokens", tokens),
            entropy=mean("entropy", "image_tokens", drawn),
            tokens=tokens,
            image_tokens=drawn,
            pieces=sum(part.pieces for part in parts),
            packed_rows=max((part.packed_rows for part in parts), default=0),
        )


@dataclass
class PieceSizes:
    """Sizes of pieces by kind of work, kept from update to update: found out once, shrunk where memory ran out."""

    images: Pieces | None = None
    answers: Pieces | None = None
    scoring: Pieces | None = None
    """Of log-probs without gradients."""


@dataclass
class _Tally:
    """Sums of statistics, kept on the device until the end."""

    weighted: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    ratio_max: list[Tensor] = field(default_factory=list)
    pieces: int = 0
    packed_rows: int = 0

    def add(self, stats: ops.GrpoStats, count: Tensor) -> None:
        for name in ("kl", "clip_fraction", "ratio_mean", "entropy"):
            value = getattr(stats, name)
            if value is not None:
                self.weighted[name] = self.weighted.get(name, 0.0) + value.detach().float() * count
                self.counts[name] = self.counts.get(name, 0.0) + count
        self.ratio_max.append(stats.ratio_max.detach().float() * (count > 0))

    def mean(self, name: str) -> float:
        return float(self.weighted[name] / self.counts[name].clamp(min=1)) if name in self.weighted else 0.0


def streamed_backward(
    model: Showo,
    advantages_R: Tensor,
    settings: LossSettings,
    images: ImageTrajectories | None = None,
    answers: AnswerTrajectories | None = None,
    sizes: PieceSizes | None = None,
    total_rows: int | None = None,
) -> UpdateStats:
    """Add the gradient of the whole objective to every parameter that learns; returns its value and statistics.

    `total_rows` is R of the objective where these rows are a part of it (other ranks, other groups); by default they
    are all. Gradients are not cleared first. Peak memory grows with micro_rows · micro_timesteps, not with T; a piece
    that does not fit is halved (`sizes` remembers). Raises UserError when one rollout at one timestep does not fit.
    """
    sizes = PieceSizes() if sizes is None else sizes
    tally, loss_image, loss_answer = _Tally(), torch.zeros(()), torch.zeros(())
    with torch.enable_grad():
        if answers is not None and settings.alpha_answer > 0:
            loss_answer = _answers_backward(model, advantages_R, settings, answers, tally, sizes, total_rows)
        if images is not None and settings.alpha_image > 0:
            loss_image = _images_backward(model, advantages_R, settings, images, tally, sizes, total_rows)
    return UpdateStats(
        loss=float(loss_image) + float(loss_answer),
        loss_answer=float(loss_answer),
        loss_image=float(loss_image),
        kl=tally.mean("kl"),
        clip_fraction=tally.mean("clip_fraction"),
        ratio_mean=tally.mean("ratio_mean"),
        ratio_max=float(torch.stack(tally.ratio_max).max()) if tally.ratio_max else 0.0,
        entropy=tally.mean("entropy"),
        tokens=int(tally.counts.get("kl", torch.zeros(()))),
        image_tokens=int(tally.counts.get("entropy", torch.zeros(()))),
        pieces=tally.pieces,
        packed_rows=tally.packed_rows,
    )


# --- images --------------------------------------------------------------------------------------------------------


def some_timesteps(images: ImageTrajectories, fraction: float, seed: int) -> ImageTrajectories:
    """`images` with a random part of their timesteps, the same for all rollouts, at least one.

    Each of the kept ones counts T / kept times, so that loss and gradient are right on average. The choice follows from
    `seed` alone. Draw before reference log-probs are taken: they are then taken for the kept ones only.
    """
    steps = images.inputs_RTN.shape[1]
    kept = max(1, round(fraction * steps))
    if kept >= steps:
        return images
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(seed % 2**63))[:kept].sort().values

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:, order.to(tensor.device)]

    return replace(
        images,
        inputs_RTN=images.inputs_RTN[:, order.to(images.inputs_RTN.device)],
        chosen_RTN=images.chosen_RTN[:, order.to(images.chosen_RTN.device)],
        old_logp_RTN=images.old_logp_RTN[:, order.to(images.old_logp_RTN.device)],
        ref_logp_RTN=part(images.ref_logp_RTN),
        mask_RTN=part(images.mask_RTN),
        weight=images.weight * steps / kept,
    )


def _sizes_for(model: Showo, images: ImageTrajectories, rows: int, timesteps: int, learn: bool) -> Pieces:
    longest = max(len(prompt) for prompt in (*images.prompts, images.empty_prompt))
    return Pieces.choose(
        model,
        rows,
        timesteps,
        prompt=longest,
        count=images.inputs_RTN.shape[2],
        guided=images.guidance_scale > 0,
        learn=learn,
    )


def _image_prompts(model: Showo, images: ImageTrajectories) -> PromptKV:
    """The prompts' keys and values, with guidance the empty prompt's last."""
    prompts = prefill_t2i(model, images.prompts, images.max_text)
    if images.guidance_scale == 0:
        return prompts
    with torch.set_grad_enabled(torch.is_grad_enabled() and not only_rows_learn(model)):
        return prompts + prefill_t2i(model, [images.empty_prompt], images.max_text)


def _piece_hidden(
    model: Showo, images: ImageTrajectories, prompts: PromptKV, rows: slice, steps: slice
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [r, t, N, D] of a piece, and its unconditional half.

    Where only concept rows learn, nothing in the unconditional half does: it is computed apart and without a graph.
    """
    codes = images.inputs_RTN[rows, steps].to(model.device)
    shape = codes.shape
    of_row = [prompt for prompt in images.prompt_of_row[rows] for _ in range(shape[1])]
    flat = codes.flatten(0, 1)
    if images.guidance_scale == 0:
        return image_hidden(model, flat, prompts, of_row).unflatten(0, shape[:2]), None
    empty = [len(prompts) - 1] * len(of_row)
    if torch.is_grad_enabled() and only_rows_learn(model):
        cond = image_hidden(model, flat, prompts, of_row)
        with torch.no_grad():
            uncond = image_hidden(model, flat, prompts, empty)
    else:
        cond, uncond = image_hidden(model, torch.cat([flat, flat]), prompts, of_row + empty).chunk(2)
    return cond.unflatten(0, shape[:2]), uncond.unflatten(0, shape[:2])


def only_rows_learn(model: Showo) -> bool:
    """Whether all weights of the model itself are frozen, so that only an attached concept can learn."""
    return not any(parameter.requires_grad for parameter in model.parameters())


def _images_backward(
    model: Showo,
    advantages: Tensor,
    settings: LossSettings,
    images: ImageTrajectories,
    tally: _Tally,
    sizes: PieceSizes,
    total_rows: int | None,
) -> Tensor:
    prompts = _image_prompts(model, images)
    shared, head = PromptLeaves(prompts), Leaves(*model.image_head())
    params, sums = list(learning(model)), [*shared.leaves, *head.leaves]
    total = torch.zeros((), device=model.device)

    def piece(rows: slice, steps: slice) -> None:
        hidden, uncond = _piece_hidden(model, images, shared()[0], rows, steps)
        weight, bias = head()
        target = images.chosen_RTN[rows, steps].to(model.device, torch.int64)
        mask = None if images.mask_RTN is None else images.mask_RTN[rows, steps].to(model.device)
        loss, _, stats = ops.maskgit_grpo_loss(
            hidden,
            weight,
            target,
            images.old_logp_RTN[rows, steps].to(model.device),
            None if images.ref_logp_RTN is None else images.ref_logp_RTN[rows, steps].to(model.device),
            advantages[rows].to(model.device),
            bias,
            hidden_uncond=uncond,
            guidance_scale=images.guidance_scale,
            alpha=settings.alpha_image * images.weight,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            beta=settings.beta if images.ref_logp_RTN is not None else 0.0,
            mask=mask,
        )
        loss = loss * (
            target.shape[0] / (total_rows or len(images))
        )  # the op divides by its own rows, the objective by all
        add_gradients(loss, params, sums)
        total.add_(loss.detach())
        counted = torch.tensor(float(target.numel())) if mask is None else mask.sum().float()
        tally.add(stats, counted.to(model.device))
        tally.packed_rows = max(tally.packed_rows, target.shape[0] * target.shape[1])

    if sizes.images is None:
        sizes.images = _sizes_for(model, images, settings.micro_rows, settings.micro_timesteps, learn=True)
    rollouts, timesteps = images.inputs_RTN.shape[:2]
    tally.pieces = sizes.images.run(rollouts, timesteps, piece, model.device)
    shared.backward()
    head.backward()
    return total


@torch.no_grad()
def image_logprobs(
    model: Showo,
    images: ImageTrajectories,
    micro_rows: int = 4,
    micro_timesteps: int = 1,
    sizes: PieceSizes | None = None,
) -> Tensor:
    """log p of every chosen code under the model as it is, fp32 [R, T, N]; 0 outside the mask.

    Sizes of pieces as in :func:`streamed_backward`, with four times the timesteps: without a graph, a piece is light.
    """
    sizes = PieceSizes() if sizes is None else sizes
    prompts = _image_prompts(model, images)
    weight, bias = model.image_head()
    logp = torch.zeros(images.inputs_RTN.shape, device=model.device)

    def piece(rows: slice, steps: slice) -> None:
        hidden, uncond = _piece_hidden(model, images, prompts, rows, steps)
        target = images.chosen_RTN[rows, steps].to(model.device, torch.int64)
        kept = torch.ones_like(target, dtype=torch.bool)
        if images.mask_RTN is not None:
            kept = images.mask_RTN[rows, steps].to(model.device)
        found = ops.selected_logprob(
            hidden[kept],
            weight,
            target[kept],
            bias,
            hidden_uncond=None if uncond is None else uncond[kept],
            guidance_scale=images.guidance_scale,
        )
        logp[rows, steps] = logp[rows, steps].masked_scatter(kept, found.float())

    if sizes.scoring is None:
        sizes.scoring = _sizes_for(model, images, micro_rows, 4 * micro_timesteps, learn=False)
    rollouts, timesteps = images.inputs_RTN.shape[:2]
    sizes.scoring.run(rollouts, timesteps, piece, model.device)
    return logp


# --- answers -------------------------------------------------------------------------------------------------------


def _answer_logp(
    model: Showo, answers: AnswerTrajectories, prompts: PromptKV, last: Tensor, rows: slice, head: Sequence[Tensor]
) -> Tensor:
    tokens = answers.tokens_RL[rows].to(model.device)
    hidden = answer_hidden(model, tokens, prompts, last, [0] * tokens.shape[0])
    return text_logprob(model, hidden, tokens.clamp(min=0), temperature=answers.temperature, parts=tuple(head))


def _answer_prefix(model: Showo, answers: AnswerTrajectories) -> tuple[PromptKV, Tensor]:
    return prefill_mmu(model, answers.codes_N[None].to(model.device), [answers.question])


def _answers_backward(
    model: Showo,
    advantages: Tensor,
    settings: LossSettings,
    answers: AnswerTrajectories,
    tally: _Tally,
    sizes: PieceSizes,
    total_rows: int | None,
) -> Tensor:
    prompts, last = _answer_prefix(model, answers)
    shared, head = PromptLeaves(prompts, last), Leaves(*text_parts(model))
    params, sums = list(learning(model)), [*shared.leaves, *head.leaves]
    total = torch.zeros((), device=model.device)

    def piece(rows: slice, _: slice) -> None:
        mask = answers.mask_RL[rows].to(model.device)
        cut, (cut_last,) = shared()
        logp = _answer_logp(model, answers, cut, cut_last, rows, head())
        loss, stats = ops.grpo_loss(
            logp,
            answers.old_logp_RL[rows].to(model.device),
            None if answers.ref_logp_RL is None else answers.ref_logp_RL[rows].to(model.device),
            advantages[rows].to(model.device),
            alpha=settings.alpha_answer,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            beta=settings.beta if answers.ref_logp_RL is not None else 0.0,
            mask=mask,
        )
        loss = loss * (logp.shape[0] / (total_rows or len(answers)))
        add_gradients(loss, params, sums)
        total.add_(loss.detach())
        tally.add(stats, mask.sum().float())

    if sizes.answers is None:
        rows = settings.micro_rows or len(answers)  # an answer is short beside an image
        sizes.answers = Pieces(rows, 1, rows)
    sizes.answers.run(len(answers), 1, piece, model.device)
    shared.backward()
    head.backward()
    return total


@torch.no_grad()
def answer_logprobs(model: Showo, answers: AnswerTrajectories) -> Tensor:
    """log p of every answer token under the model as it is, fp32 [R, L]; 0 after the end."""
    prompts, last = _answer_prefix(model, answers)
    logp = _answer_logp(model, answers, prompts, last, slice(None), text_parts(model))
    return torch.where(answers.mask_RL.to(model.device), logp.float(), 0.0)
