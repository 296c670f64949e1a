"""Which codes of a step are masked again where a model's loop does not take the least sure: Lumina-DiMOO's rule.

    masked = the mask_len largest of probability / temperature + Gumbel noise, of the codes that were unknown

The noise is the re-masking noise of `ops.maskgit_step`, keyed by (seed, sample id, step, position).

Shape suffixes: B rows, N image codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import MASK, ops
from ..ops import philox


def most_sure_again(
    out: ops.MaskgitStep,
    codes_BN: Tensor,
    *,
    mask_len_B: Tensor,
    temperature_B: Tensor,
    seed: int,
    sample_ids_B: Tensor,
    step_B: Tensor,
    rank_gumbel_BN: Tensor | None = None,
) -> ops.MaskgitStep:
    """The result of a step with other codes masked again; what was chosen stays. At temperature 0 there is no noise."""
    rows, count = codes_BN.shape
    if rank_gumbel_BN is None:
        place = torch.arange(count, device=codes_BN.device).repeat(rows)
        samples, steps = sample_ids_B.repeat_interleave(count), step_B.repeat_interleave(count)
        rank_gumbel_BN = philox.gumbel(seed, samples, steps, place, 1, philox.STREAM_RANK).view(rows, count)
    chance = out.logp.exp()
    heat = temperature_B[:, None].to(chance.dtype)
    noisy = chance / heat.clamp(min=torch.finfo(chance.dtype).tiny) + rank_gumbel_BN.to(chance.dtype)
    missing = codes_BN == MASK
    score = torch.where(heat > 0, noisy, chance).masked_fill(~missing, -torch.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    masked = missing & (rank < mask_len_B[:, None])
    return ops.MaskgitStep(out.chosen.masked_fill(masked, MASK), out.chosen, out.logp, masked)
