"""The published Show-o loops in plain PyTorch: what the rollout engine and the update are measured and checked against.

Everything the published code computes is computed here: the whole padded sequence at every step, prompt included, with
[cond; uncond] in one batch; the head over the whole vocabulary at every position; guidance on the logits; an answer by
running the whole sequence again for each token; a GRPO update that keeps the graphs of all timesteps until one backward
pass. It uses the plain forward of `Showo` and nothing else of the library's fast paths.

Letters: R rows, L sequence, N image codes, T timesteps, K codebook, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyunictokens.models import Showo
from pyunictokens.models.showo.prompting import SpecialIds, attention_allowed, mmu_prefix, t2i

GumbelNoise = Callable[[int], tuple[Tensor, Tensor]]
"""Step → (token Gumbel [R, N, K], rank Gumbel [R, N]): the noise to use instead of torch's generator."""


def frame(
    model: Showo, texts: Sequence[Sequence[int]], count: int, max_text: int, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """Sequences of [cond; uncond] with all codes unknown, and their masks: made once, as published, for all steps."""
    ids = SpecialIds.of(model)
    both = [*texts, *([[]] * len(texts))] if guidance_scale > 0 else list(texts)
    sequences = torch.stack([t2i(text, None, ids, max_text, count) for text in both]).to(model.device)
    return sequences, attention_allowed(sequences, "t2i", ids)


def guided_logits(
    model: Showo,
    texts: Sequence[Sequence[int]],
    codes: Tensor,
    max_text: int,
    guidance_scale: float,
    made: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Guided logits [R, N, K] of codes int64 [R, N] (−1 unknown) from one forward over [cond; uncond]."""
    ids, count = SpecialIds.of(model), codes.shape[1]
    sequences, allowed = made or frame(model, texts, count, max_text, guidance_scale)
    image = torch.where(codes < 0, ids.mask, codes + ids.first_code).to(model.device)
    sequences[:, -(count + 1) : -1] = torch.cat([image, image]) if guidance_scale > 0 else image
    logits = model(sequences, allowed)
    if guidance_scale > 0:
        cond, uncond = logits.chunk(2)
        logits = (1 + guidance_scale) * cond - guidance_scale * uncond
    return logits[:, -(count + 1) : -1, ids.first_code : ids.first_code + model.config.codebook_size]


@torch.no_grad()
def generate_images(
    model: Showo,
    texts: Sequence[Sequence[int]],
    known: Tensor,
    *,
    max_text: int,
    steps: int,
    guidance_scale: float,
    temperature: float = 1.0,
    noise: GumbelNoise | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The published loop with the cosine schedule, from codes `known` int64 [R, N], −1 where unknown.

    Returns (final codes [R, N], inputs, chosen, log-probs [R, T, N]).
    """
    codes, count = known.clone(), known.shape[1]
    inputs, choices, logps = [], [], []
    chosen, made = codes, frame(model, texts, count, max_text, guidance_scale)
    for step in range(steps):
        inputs.append(codes)
        logits = guided_logits(model, texts, codes, max_text, guidance_scale, made)
        probs = logits.softmax(-1)
        token_noise, rank_noise = noise(step) if noise else (None, None)
        if token_noise is None:
            sampled = torch.multinomial(probs.flatten(0, 1), 1)[:, 0].view_as(codes)
            rank_noise = -torch.log(-torch.log(torch.rand_like(probs[..., 0]).clamp(min=1e-20)))
        else:
            sampled = (probs.log() + token_noise).argmax(-1)
        unknown = codes < 0
        chosen = torch.where(unknown, sampled, codes)
        logp = probs.gather(-1, chosen[..., None])[..., 0].log()
        ratio = (step + 1) / steps
        temperature *= 1 - ratio
        share = torch.cos(torch.tensor(ratio) * math.pi * 0.5)
        wanted = (count * share).floor().long()
        mask_len = torch.minimum(unknown.sum(-1) - 1, wanted).clamp(min=1)
        confidence = torch.where(unknown, logp + temperature * rank_noise, torch.inf)
        cut = confidence.sort(-1).values.gather(-1, mask_len[:, None].clamp(max=count - 1))
        codes = torch.where(confidence < cut, -1, chosen)
        choices.append(chosen)
        logps.append(logp)
    return chosen, torch.stack(inputs, 1), torch.stack(choices, 1), torch.stack(logps, 1)


@torch.no_grad()
def generate_text(
    model: Showo,
    codes: Tensor,
    questions: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    end_id: int | None = None,
    noise: Callable[[int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Answers to questions of one length about codes [R, N]; the whole sequence runs again for every token.

    Stops when every row has drawn `end_id`. `noise(step)` gives Gumbel numbers [R, V] in place of torch's generator;
    temperature 0 takes the likeliest token. Returns (tokens [R, L], log-probs [R, L]), not cut at a row's own end.
    """
    ids = SpecialIds.of(model)
    rows = [mmu_prefix(row.tolist(), question, ids) for row, question in zip(codes, questions, strict=True)]
    sequences = torch.tensor(rows, device=model.device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    tokens, logps = [], []
    for step in range(max_new_tokens):
        logits = model(sequences, attention_allowed(sequences, "mmu", ids))[:, -1]
        logp = torch.log_softmax(logits / (temperature or 1.0), -1)
        allowed = logp
        if top_k:
            allowed = logp.masked_fill(logp < logp.topk(top_k).values[:, -1:], -torch.inf)
        if temperature == 0:
            drawn = logp.argmax(-1)
        elif noise is not None:
            drawn = (allowed + noise(step)).argmax(-1)
        else:
            drawn = torch.multinomial(allowed.exp(), 1)[:, 0]
        sequences = torch.cat([sequences, drawn[:, None]], 1)
        tokens.append(drawn)
        logps.append(logp.gather(1, drawn[:, None])[:, 0])
        if end_id is not None:
            ended |= drawn == end_id
            if bool(ended.all()):
                break
    return torch.stack(tokens, 1), torch.stack(logps, 1)


def grpo_loss(
    model: Showo,
    texts: Sequence[Sequence[int]],
    inputs: Tensor,
    chosen: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    *,
    max_text: int,
    guidance_scale: float,
    alpha: float = 0.6,
    beta: float = 0.01,
    clip: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """The update's loss over recorded steps int [R, T, N], every timestep's graph kept alive at once as published.

    Returns (loss, log-probs [R, T, N]); call ``loss.backward()`` on it.
    """
    logps = []
    for step in range(inputs.shape[1]):
        logits = guided_logits(model, texts, inputs[:, step].long(), max_text, guidance_scale)
        logps.append(torch.log_softmax(logits.float() if logits.dtype == torch.bfloat16 else logits, -1))
    picked = torch.stack(logps, 1).gather(-1, chosen.long()[..., None])[..., 0]
    ratio = (picked - old_logp).exp()
    advantage = advantages[:, None, None]
    value = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    if ref_logp is not None:
        gap = ref_logp - picked
        value = value - beta * (gap.exp() - gap - 1)
    return -(alpha * value).sum() / inputs.shape[0], picked
