"""Scaled dot-product attention of every model, in the arithmetic that is fast where it runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(scale · q kᵀ) v for q [B, H, L, E], k and v [B, H, P, E], in the dtype of q.

    mask: boolean [B or 1, 1, L, P], True where a position may look, or what is added to the logits; causal: a position
    sees those up to its own, no mask needed; scale: E^−½ by default. On a CPU 16-bit operands are attended in float32:
    torch's 16-bit kernels are slower there, the way back five times (docs/measured-facts.md).
    """
    half = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    if not half:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    whole = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, scale=scale
    )
    return whole.to(q.dtype)
