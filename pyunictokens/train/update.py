"""The streamed update: memory that does not depend on the number of timesteps, and the exact gradient.

The objective (objective.py) is a sum over rollouts, and most are sums over timesteps too, so it is taken a few rollouts
and timesteps at a time: forward, loss, backward, next. Where it is no sum over timesteps (a ratio of whole rollouts),
log-probs of everything come first, without a graph; the loss of those gives the slope of each, and the microbatches
then send slope · logp back. What microbatches share (prompts, heads that learn) is computed once, cut into leaves that
add up gradients, and sent back once at the end. Either way the sum equals the loss with all graphs alive, gradient by
gradient.

Shape suffixes: R rollouts, T timesteps, N image codes, L answer tokens, D width, K codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..models import AnsweringModel, MaskedModel, Prefix, answering
from .logprobs import Leaves, PrefixLeaves, exact
from .microbatch import Microbatches, add_gradients, learning
from .objective import Loss, Objective, UniCTask
from .statistics import Tally, UpdateStats
from .trajectories import AnswerTrajectories, ImageTrajectories

_ALL = slice(None)


@dataclass(frozen=True)
class LossSettings:
    """The objective with its numbers, and how large its microbatches are."""

    beta: float = 0.01
    clip_low: float = 0.2
    clip_high: float = 0.2
    alpha_answer: float = 0.4
    alpha_image: float = 0.6
    micro_rows: int = 4
    """Rollouts in one microbatch; 0 takes what the memory at hand allows."""
    micro_timesteps: int = 1
    """Timesteps in one microbatch; 0 takes what the memory at hand allows."""
    objective: Objective = field(default_factory=UniCTask)


@dataclass
class MicrobatchSizes:
    """Sizes of microbatches by kind of work, kept from update to update: found out once, shrunk where memory ran
    out."""

    images: Microbatches | None = None
    answers: Microbatches | None = None
    scoring: Microbatches | None = None
    """Of log-probs without gradients."""


def streamed_backward(
    model: MaskedModel,
    advantages_R: Tensor,
    settings: LossSettings,
    images: ImageTrajectories | None = None,
    answers: AnswerTrajectories | None = None,
    sizes: MicrobatchSizes | None = None,
    total_rows: int | None = None,
) -> UpdateStats:
    """Add the gradient of the whole objective to every parameter that learns; returns its value and statistics.

    `total_rows` is R of the objective where these rows are a part of it (other ranks, other groups); by default they
    are all. Gradients are not cleared first. Peak memory grows with micro_rows · micro_timesteps, not with T; a
    microbatch that does not fit is halved (`sizes` remembers). Raises UserError when one rollout at one timestep does
    not fit.
    """
    sizes = MicrobatchSizes() if sizes is None else sizes
    tally, loss_image, loss_answer = Tally(), torch.zeros(()), torch.zeros(())
    with torch.enable_grad():
        if answers is not None and settings.alpha_answer > 0:
            loss_answer = _answers_backward(answering(model), advantages_R, settings, answers, tally, sizes, total_rows)
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
        entropy=tally.mean("entropy") if "entropy" in tally.weighted else None,
        tokens=int(tally.counts.get("kl", torch.zeros(()))),
        image_tokens=int(tally.counts.get("entropy", torch.zeros(()))),
        microbatches=tally.microbatches,
        packed_rows=tally.packed_rows,
    )


# --- images --------------------------------------------------------------------------------------------------------


def _sizes_for(model: MaskedModel, images: ImageTrajectories, rows: int, timesteps: int, learn: bool) -> Microbatches:
    longest = max(len(prompt) for prompt in (*images.prompts, images.empty_prompt))
    return Microbatches.choose(
        model,
        rows,
        timesteps,
        prompt=longest,
        count=images.inputs_RTN.shape[2],
        guided=images.guidance_scale > 0,
        learn=learn,
    )


def _image_prompts(model: MaskedModel, images: ImageTrajectories) -> Prefix:
    """The prompts computed, with guidance the empty one last."""
    prompts = model.prefill(images.prompts)
    if images.guidance_scale == 0:
        return prompts
    with torch.set_grad_enabled(torch.is_grad_enabled() and not only_rows_learn(model)):
        return prompts + model.prefill([images.empty_prompt])


def _microbatch_hidden(
    model: MaskedModel, images: ImageTrajectories, prompts: Prefix, rows: slice, steps: slice
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [r, t, N, D] of a microbatch, and its unconditional half.

    Where only concept rows learn, nothing in the unconditional half does: it is computed apart and without a graph.
    """
    codes = images.inputs_RTN[rows, steps].to(model.device)
    assert images.timestep_RT is not None
    at = images.timestep_RT[rows, steps].flatten().to(model.device)
    shape = codes.shape
    of_row = [prompt for prompt in images.prompt_of_row[rows] for _ in range(shape[1])]
    flat = codes.flatten(0, 1)
    if images.guidance_scale == 0:
        return model.image_hidden(flat, prompts, of_row, at).unflatten(0, shape[:2]), None
    empty = [len(prompts) - 1] * len(of_row)
    if torch.is_grad_enabled() and only_rows_learn(model):
        cond = model.image_hidden(flat, prompts, of_row, at)
        with torch.no_grad():
            uncond = model.image_hidden(flat, prompts, empty, at)
    else:
        both = torch.cat([flat, flat]), prompts, of_row + empty, torch.cat([at, at])
        cond, uncond = model.image_hidden(*both).chunk(2)
    return cond.unflatten(0, shape[:2]), uncond.unflatten(0, shape[:2])


def only_rows_learn(model: MaskedModel) -> bool:
    """Whether all weights of the model itself are frozen, so that only an attached concept can learn."""
    return not any(parameter.requires_grad for parameter in model.parameters())


def _images_backward(
    model: MaskedModel,
    advantages: Tensor,
    settings: LossSettings,
    images: ImageTrajectories,
    tally: Tally,
    sizes: MicrobatchSizes,
    total_rows: int | None,
) -> Tensor:
    objective, weights = settings.objective, settings.objective.weights(images)
    whole = total_rows or len(images)  # the operations divide by their own rows, the objective by all
    total = torch.zeros((), device=model.device, dtype=exact(model.image_head()[0]))
    slope: Tensor | None = None

    def count(found: Loss, rows: int) -> None:
        total.add_(found.loss.detach() * (rows / whole))
        tally.add(found.stats, found.ratios)

    if not objective.splits_timesteps:
        logp = image_logprobs(model, images, settings.micro_rows, settings.micro_timesteps, sizes).requires_grad_()
        part = images.part(_ALL, _ALL, model.device)
        found = _image_loss(settings, logp, part, advantages, _cut(weights, logp, _ALL))
        (slope,) = torch.autograd.grad(found.loss * (len(images) / whole), logp)
        count(found, len(images))
    prompts = _image_prompts(model, images)
    shared, head = PrefixLeaves(prompts), Leaves(*(part for part in model.image_head() if part is not None))
    params, sums = list(learning(model)), [*shared.leaves, *head.leaves]

    def microbatch(rows: slice, steps: slice) -> None:
        hidden, uncond = _microbatch_hidden(model, images, shared()[0], rows, steps)
        part, own = images.part(rows, steps, model.device), advantages[rows]
        weight, *bias_only = head()
        bias = bias_only[0] if bias_only else None
        if slope is not None:
            logp = _selected(part, hidden, uncond, weight, bias)
            add_gradients((logp * slope[rows, steps]).sum(), params, sums)
        else:
            cut = _cut(weights, hidden, rows, steps)
            if objective.per_token:
                found = _token_loss(settings, part, hidden, uncond, weight, bias, own, cut)
            else:
                logp = _selected(part, hidden, uncond, weight, bias)
                found = _image_loss(settings, logp, part, own, cut)
            add_gradients(found.loss * (len(part) / whole), params, sums)
            count(found, len(part))
        tally.packed_rows = max(tally.packed_rows, len(part) * part.shape[1])

    if sizes.images is None:
        sizes.images = _sizes_for(model, images, settings.micro_rows, settings.micro_timesteps, learn=True)
    rollouts, timesteps = images.inputs_RTN.shape[:2]
    tally.microbatches = sizes.images.run(rollouts, timesteps, microbatch, model.device)
    shared.backward()
    head.backward()
    return total


def _cut(weights: Tensor | float, like: Tensor, rows: slice, steps: slice = _ALL) -> Tensor | float:
    """A microbatch's part of what terms count for, where `like` is."""
    if not isinstance(weights, Tensor):
        return weights
    part = weights[rows, steps] if weights.dim() > 1 and weights.shape[1] > 1 else weights[rows]
    return part.to(like.device, exact(like))


def _token_loss(
    settings: LossSettings,
    part: ImageTrajectories,
    hidden: Tensor,
    uncond: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    advantages: Tensor,
    weights: Tensor | float,
) -> Loss:
    """The loss of a microbatch whose ratios are of tokens: head, log-probs and loss in one operation."""
    old = part.old_logp_RTN
    if not len(old):
        with torch.no_grad():
            old = _selected(part, hidden, uncond, weight, bias)
    loss, _, stats = ops.maskgit_grpo_loss(
        hidden,
        weight,
        part.chosen_RTN.long(),
        old,
        part.ref_logp_RTN,
        advantages.to(hidden.device),
        bias,
        hidden_uncond=uncond,
        guidance_scale=part.guidance_scale,
        temperature=part.temperature,
        alpha=settings.alpha_image * weights,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        beta=settings.beta if part.ref_logp_RTN is not None else 0.0,
        mask=part.mask_RTN,
    )
    ratios = torch.tensor(float(part.shape.numel())) if part.mask_RTN is None else part.mask_RTN.sum().float()
    return Loss(loss, stats, ratios.to(hidden.device))


def _image_loss(
    settings: LossSettings, logp: Tensor, part: ImageTrajectories, advantages: Tensor, weights: Tensor | float
) -> Loss:
    return settings.objective.loss(
        logp,
        part.old_logp_RTN if len(part.old_logp_RTN) else logp.detach(),
        part.ref_logp_RTN,
        advantages.to(logp.device),
        weights=settings.alpha_image * weights,
        mask=part.mask_RTN,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        beta=settings.beta,
    )


@torch.no_grad()
def image_logprobs(
    model: MaskedModel,
    images: ImageTrajectories,
    micro_rows: int = 4,
    micro_timesteps: int = 1,
    sizes: MicrobatchSizes | None = None,
) -> Tensor:
    """log p of every chosen code under the model as it is, fp32 (fp64 of such a model) [R, T, N]; 0 outside the mask.

    Sizes of microbatches as in :func:`streamed_backward`, with four times the timesteps: without a graph, a microbatch
    is light.
    """
    sizes = MicrobatchSizes() if sizes is None else sizes
    prompts = _image_prompts(model, images)
    weight, bias = model.image_head()
    logp = torch.zeros(images.inputs_RTN.shape, device=model.device, dtype=exact(weight))

    def microbatch(rows: slice, steps: slice) -> None:
        hidden, uncond = _microbatch_hidden(model, images, prompts, rows, steps)
        part = images.part(rows, steps, model.device)
        logp[rows, steps] = _selected(part, hidden, uncond, weight, bias)

    if sizes.scoring is None:
        sizes.scoring = _sizes_for(model, images, micro_rows, 4 * micro_timesteps, learn=False)
    rollouts, timesteps = images.inputs_RTN.shape[:2]
    sizes.scoring.run(rollouts, timesteps, microbatch, model.device)
    return logp


def _selected(
    part: ImageTrajectories, hidden: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """log p of a microbatch's chosen codes [r, t, N], 0 outside the mask, where tokens cost nothing."""
    target, kept = part.chosen_RTN.long(), part.mask_RTN
    if kept is None:
        kept = torch.ones_like(target, dtype=torch.bool)
    found = ops.selected_logprob(
        hidden[kept],
        weight,
        target[kept],
        bias,
        hidden_uncond=None if uncond is None else uncond[kept],
        guidance_scale=part.guidance_scale,
        temperature=part.temperature,
    )
    return torch.zeros(target.shape, device=found.device, dtype=found.dtype).masked_scatter(kept, found)


# --- answers -------------------------------------------------------------------------------------------------------


def _answer_logp(
    model: AnsweringModel,
    answers: AnswerTrajectories,
    prompts: Prefix,
    last: Tensor,
    rows: slice,
    head: Sequence[Tensor],
) -> Tensor:
    tokens = answers.tokens_RL[rows].to(model.device)
    hidden = model.answer_hidden(tokens, prompts, last, [0] * tokens.shape[0])
    return model.text_logprob(hidden, tokens.clamp(min=0), temperature=answers.temperature, parts=head)


def _answer_prefix(model: AnsweringModel, answers: AnswerTrajectories) -> tuple[Prefix, Tensor]:
    return model.prefill_questions(answers.seen[None].to(model.device), [answers.question])


def _answers_backward(
    model: AnsweringModel,
    advantages: Tensor,
    settings: LossSettings,
    answers: AnswerTrajectories,
    tally: Tally,
    sizes: MicrobatchSizes,
    total_rows: int | None,
) -> Tensor:
    objective, weights = settings.objective, settings.objective.weights(answers)
    prompts, last = _answer_prefix(model, answers)
    shared, head = PrefixLeaves(prompts, last), Leaves(*model.text_parts())
    params, sums = list(learning(model)), [*shared.leaves, *head.leaves]
    total = torch.zeros((), device=model.device, dtype=exact(last))

    def microbatch(rows: slice, _: slice) -> None:
        part = answers.part(rows, model.device)
        cut, (cut_last,) = shared()
        logp = _answer_logp(model, answers, cut, cut_last, rows, head())
        found = objective.loss(
            logp,
            part.old_logp_RL,
            part.ref_logp_RL,
            advantages[rows].to(model.device),
            weights=settings.alpha_answer * _cut(weights, logp, rows),
            mask=part.mask_RL,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            beta=settings.beta,
        )
        loss = found.loss * (len(part) / (total_rows or len(answers)))
        add_gradients(loss, params, sums)
        total.add_(loss.detach())
        tally.add(found.stats, found.ratios)

    if sizes.answers is None:
        rows = settings.micro_rows or len(answers)  # an answer is short beside an image
        sizes.answers = Microbatches(rows, 1, rows)
    sizes.answers.run(len(answers), 1, microbatch, model.device)
    shared.backward()
    head.backward()
    return total


@torch.no_grad()
def answer_logprobs(model: AnsweringModel, answers: AnswerTrajectories) -> Tensor:
    """log p of every answer token under the model as it is, fp32 (fp64 of such a model) [R, L]; 0 after the end."""
    prompts, last = _answer_prefix(model, answers)
    logp = _answer_logp(model, answers, prompts, last, slice(None), model.text_parts())
    return torch.where(answers.mask_RL.to(model.device), logp, 0.0)
