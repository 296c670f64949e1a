"""The objective with every graph alive, over full padded sequences: what the streamed update must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from pyunictokens.models import Showo
from pyunictokens.models.showo import prompting
from pyunictokens.train.trajectories import AnswerTrajectories, ImageTrajectories
from pyunictokens.train.update import LossSettings


def image_logp(model: Showo, images: ImageTrajectories) -> Tensor:
    """[R, T, N], row by row through the plain path."""
    ids, config = prompting.SpecialIds.of(model), model.config
    out = []
    for row in range(len(images)):
        prompt = images.prompts[images.prompt_of_row[row]]
        steps = []
        for step in range(images.inputs_RTN.shape[1]):
            codes = images.inputs_RTN[row, step].long()
            shown = torch.where(codes < 0, ids.mask, codes + ids.first_code)
            logits = []
            for text in (prompt, images.empty_prompt):
                padding = [ids.pad] * (model.max_text + 1 - len(text))
                sequence = torch.tensor([*padding, *text, ids.soi, *shown.tolist(), ids.eoi])[None]
                full = model(sequence, prompting.attention_allowed(sequence, "t2i", ids))
                logits.append(full[0, -(len(codes) + 1) : -1, ids.first_code : ids.first_code + config.codebook_size])
            scale = images.guidance_scale
            guided = (1 + scale) * logits[0] - scale * logits[1]
            chosen = images.chosen_RTN[row, step].long()
            steps.append(guided.log_softmax(-1).gather(-1, chosen[:, None])[:, 0])
        out.append(torch.stack(steps))
    return torch.stack(out)


def answer_logp(model: Showo, answers: AnswerTrajectories) -> Tensor:
    """[R, L], row by row; 0 after the end."""
    ids = prompting.SpecialIds.of(model)
    prefix = prompting.mmu_prefix(answers.seen.tolist(), answers.question, ids)
    out = []
    for row in answers.tokens_RL:
        tokens = row[row >= 0]
        sequence = torch.tensor([*prefix, *tokens.tolist()])[None]
        logits = model(sequence, prompting.attention_allowed(sequence, "mmu", ids))[0, len(prefix) - 1 : -1]
        logp = (logits / answers.temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        out.append(torch.cat([logp, torch.zeros(len(row) - len(tokens))]))
    return torch.stack(out)


def objective(
    logp: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    alpha: float,
    settings: LossSettings,
    mask: Tensor,
) -> Tensor:
    advantage = advantages.view(-1, *[1] * (logp.ndim - 1))
    ratio = (logp - old).exp()
    value = torch.min(ratio * advantage, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantage)
    if ref is not None:
        value = value - settings.beta * ((ref - logp).exp() - (ref - logp) - 1)
    return -(alpha * value * mask).sum() / logp.shape[0]


def loss(
    model: Showo,
    advantages: Tensor,
    settings: LossSettings,
    images: ImageTrajectories | None,
    answers: AnswerTrajectories | None,
) -> Tensor:
    total = torch.zeros(())
    if images is not None:
        logp = image_logp(model, images)
        mask = torch.ones_like(logp) if images.mask_RTN is None else images.mask_RTN
        total = total + objective(
            logp, images.old_logp_RTN, images.ref_logp_RTN, advantages, settings.alpha_image, settings, mask
        )
    if answers is not None:
        total = total + objective(
            answer_logp(model, answers),
            answers.old_logp_RL,
            answers.ref_logp_RL,
            advantages,
            settings.alpha_answer,
            settings,
            answers.mask_RL,
        )
    return total
