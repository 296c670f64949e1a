"""The public `maskgit_step` and `sample_categorical`: validate, choose a backend, register with torch.library.

One MaskGIT step as published (Chang et al., "MaskGIT", and Show-o): sample unknown codes from softmax of the logits,
keep the known ones, put the least confident back. The caller passes final logits (guidance applied), a number of codes
to mask and this step's re-masking temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.errors import NotFinite, UserError
from . import philox
from . import validate as check
from .registry import choose, entry
from .transforms import no_autocast, refuse_transforms
from .types import Argument, MaskgitStep

_MASK = -1
_SEED_MAX = (1 << 63) - 1
_MASK_LEN_MAX = 1 << 62
_STREAM_MAX = 15


def maskgit_step(
    logits: Tensor,
    codes: Tensor,
    *,
    mask_len: Tensor | int,
    temperature: Tensor | float,
    seed: int,
    sample_ids: Tensor,
    step: Tensor | int,
    token_gumbel: Tensor | None = None,
    rank_gumbel: Tensor | None = None,
    backend: str | None = None,
) -> MaskgitStep:
    """Sample every unknown code and put the least confident back to MASK.

    chosen = argmax_k(log softmax(logits)_k + Gumbel_k) where `codes` is MASK (−1), which samples softmax(logits), else
    the code that stands there. logp = log p(chosen) under softmax(logits). confidence = logp + temperature·Gumbel on
    unknown positions; known ones are never masked. masked = the min(mask_len, number unknown) least confident, among
    equals the lowest position. `codes` of the result is `chosen` with `masked` put back to MASK.

    Args:
        logits: [B, N, K] float32, bfloat16, float16 or float64, guidance already applied. Any strides; no copy is made
            where the last one is 1. −inf rules an entry out.
        codes: [B, N], any integer type, −1 where unknown, else 0 … K−1.
        mask_len: int, or integer tensor [B]: how many codes are masked after this step.
        temperature: float, 0-d tensor or [B], ≥ 0: of the re-masking noise (0: the least probable are masked).
        seed: 0 … 2⁶³−1. With `sample_ids`, `step` and the position it fixes the noise (layout: `ops.philox`), on every
            backend and in any batch.
        sample_ids: integer tensor [B], ≥ 0: the caller's own number of each sample, not its place in the batch.
        step: int or integer tensor [B], 0 … 65535.
        token_gumbel: [B, N, K] explicit Gumbel noise of the choice, instead of the generator's.
        rank_gumbel: [B, N] explicit Gumbel noise of the re-masking.
        backend: None (the best that can run), "reference", "cpu" or "cuda".

    Returns:
        MaskgitStep: codes and chosen int64, logp float32 (float64 for float64 logits), masked bool, each [B, N]. Not
        differentiable.

    Raises:
        UserError: a wrong shape, dtype, device or value; on the CPU also NaN or +inf in the logits. On a GPU values are
            not looked at, because that would wait for the device.
    """
    refuse_transforms("maskgit_step")
    codes = _checked(logits, codes, seed, sample_ids, token_gumbel, rank_gumbel)
    if not isinstance(temperature, Tensor):
        check.number("temperature", temperature, 0.0, hint="0 turns the re-masking noise off")
    if not isinstance(mask_len, Tensor):
        check.integer("mask_len", mask_len, 0, _MASK_LEN_MAX)
    if not isinstance(step, Tensor):
        check.integer("step", step, 0, philox.MAX_STEP)
    return MaskgitStep(
        *_maskgit_step(
            logits.detach(),
            codes,
            _per_sample("mask_len", mask_len, logits, torch.int64),
            _per_sample("temperature", temperature, logits, torch.float32),
            seed,
            sample_ids.to(torch.int64),
            _per_sample("step", step, logits, torch.int64),
            None if token_gumbel is None else token_gumbel.detach(),
            None if rank_gumbel is None else rank_gumbel.detach(),
            philox.STREAM_TOKEN,
            choose("maskgit_step", backend, logits.device, logits.dtype),
        )
    )


def _checked(
    logits: Tensor,
    codes: Tensor,
    seed: int,
    sample_ids: Tensor,
    token_gumbel: Tensor | None,
    rank_gumbel: Tensor | None,
) -> Tensor:
    """Check what a step takes, numbers of each sample left out. Returns codes as int64."""
    check.tensor("logits", logits, check.FLOATS)
    codes = check.codes("codes", codes, logits)
    if logits.dim() != 3 or 0 in logits.shape:
        raise UserError(f"logits: shape {tuple(logits.shape)}, must be [B, N, K] with every dimension ≥ 1")
    batch, positions, entries = logits.shape
    check.shape("codes", codes, (batch, positions), "[B, N]")
    if positions > philox.MAX_POSITION + 1 or entries > philox.MAX_LANES:
        raise UserError(
            f"logits: shape {tuple(logits.shape)}: N must be ≤ {philox.MAX_POSITION + 1} and K ≤ {philox.MAX_LANES}, "
            "the room of the noise counter"
        )
    if token_gumbel is not None:
        check.tensor("token_gumbel", token_gumbel, check.FLOATS, logits)
        check.shape("token_gumbel", token_gumbel, (batch, positions, entries), "[B, N, K]")
    if rank_gumbel is not None:
        check.tensor("rank_gumbel", rank_gumbel, check.FLOATS, logits)
        check.shape("rank_gumbel", rank_gumbel, (batch, positions), "[B, N]")
    check.tensor("sample_ids", sample_ids, check.INTEGERS, logits)
    check.shape("sample_ids", sample_ids, (batch,), "[B]")
    check.integer("seed", seed, 0, _SEED_MAX)
    return codes


def sample_categorical(
    logits: Tensor,
    *,
    seed: int,
    sample_ids: Tensor,
    step: Tensor | int,
    temperature: float = 1.0,
    top_k: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one entry per row, as text decoding does, with the noise of (seed, sample id, step) in any batch.

    ids = argmax(logits/temperature + Gumbel), which samples softmax(logits/temperature); with top_k > 0 among the
    entries that reach the k-th largest logit. temperature = 0 takes the largest logit (the first among equals). The
    noise is a stream of its own: image and text rollouts with the same sample id do not share numbers.

    Args:
        logits: [B, V], any float dtype.
        seed, sample_ids, step: as in `maskgit_step`; `step` is the number of the token in its answer.
        temperature: ≥ 0.
        top_k: 0 (off) or more.
        backend: None (the best that can run), "reference", "cpu" or "cuda".

    Returns:
        (ids int64 [B], logp [B] float32, float64 for float64 logits): logp under the full softmax(logits/temperature),
        whatever top_k is, and under softmax(logits) for temperature 0. Not differentiable.

    Raises:
        UserError: a wrong shape, dtype, device or value.
    """
    refuse_transforms("sample_categorical")
    check.tensor("logits", logits, check.FLOATS)
    if logits.dim() != 2 or 0 in logits.shape:
        raise UserError(f"logits: shape {tuple(logits.shape)}, must be [B, V] with both ≥ 1")
    temperature = check.number("temperature", temperature, 0.0, hint="0 takes the most probable entry")
    top_k = check.integer("top_k", top_k, 0, _MASK_LEN_MAX)
    seed = check.integer("seed", seed, 0, _SEED_MAX)
    check.tensor("sample_ids", sample_ids, check.INTEGERS, logits)
    check.shape("sample_ids", sample_ids, logits.shape[:1], "[B]")
    if not isinstance(step, Tensor):
        check.integer("step", step, 0, philox.MAX_STEP)
    step_B = _per_sample("step", step, logits, torch.int64)
    scaled = logits.detach().to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    scaled = scaled if temperature == 0.0 else scaled / temperature
    narrow = scaled
    if top_k == 1 or temperature == 0.0:
        ids = scaled.argmax(-1)
    else:
        if 0 < top_k < logits.shape[1]:
            narrow = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], -torch.inf)
        zeros = torch.zeros_like(step_B)
        _, chosen, logp, _ = _maskgit_step(
            narrow[:, None],
            torch.full_like(step_B, _MASK)[:, None],
            zeros,
            zeros.to(torch.float32),
            seed,
            sample_ids.to(torch.int64),
            step_B,
            None,
            None,
            philox.STREAM_TEXT,
            choose("maskgit_step", backend, scaled.device, scaled.dtype),
        )
        if narrow is scaled:
            return chosen[:, 0], logp[:, 0]
        ids = chosen[:, 0]
    return ids, scaled.gather(-1, ids[:, None])[:, 0] - scaled.logsumexp(-1)


def _per_sample(name: str, value: Tensor | float, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A number, a 0-d tensor or [B] as a tensor [B] on the device of the logits."""
    batch = logits.shape[0]
    if not isinstance(value, Tensor):
        return torch.full((batch,), value, dtype=dtype, device=logits.device)
    allowed = check.INTEGERS if dtype == torch.int64 else check.FLOATS
    check.tensor(name, value, allowed, logits)
    if value.dim() != 0:
        check.shape(name, value, (batch,), "[B] (or a single number)")
    return value.detach().to(dtype).expand(batch)


@torch.library.custom_op(
    "pyunictokens::maskgit_step",
    mutates_args=(),
    schema="(Tensor logits, Tensor codes, Tensor mask_len, Tensor temperature, int seed, Tensor sample_ids, "
    "Tensor step, Tensor? token_gumbel, Tensor? rank_gumbel, int stream, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _maskgit_step(*arguments: Argument) -> tuple[Tensor, ...]:
    logits, codes, mask_len, temperature, seed, sample_ids, step, token_gumbel, rank_gumbel, stream, backend = arguments
    # once more: torch.ops is a door of its own, and behind it addresses cross into compiled code
    codes = _checked(logits, codes, seed, sample_ids, token_gumbel, rank_gumbel)
    mask_len, step, temperature = (
        _per_sample(name, value, logits, dtype)
        for name, value, dtype in (
            ("mask_len", mask_len, torch.int64),
            ("step", step, torch.int64),
            ("temperature", temperature, torch.float32),
        )
    )
    sample_ids = sample_ids.to(torch.int64)
    check.integer("stream", stream, 0, _STREAM_MAX)
    backend = choose("maskgit_step", backend, logits.device, logits.dtype)
    check.value_range("codes", codes, _MASK, logits.shape[-1] - 1, "-1 is MASK")
    check.value_range("mask_len", mask_len, 0, _MASK_LEN_MAX)
    check.value_range("temperature", temperature, 0.0, torch.finfo(torch.float32).max)
    check.value_range("sample_ids", sample_ids, 0, _SEED_MAX)
    check.value_range("step", step, 0, philox.MAX_STEP)
    for name, noise in (("token_gumbel", token_gumbel), ("rank_gumbel", rank_gumbel)):
        if noise is not None and check.on_cpu(noise) and bool(noise.isnan().any()):
            raise UserError(f"{name}: holds NaN")
    with no_autocast(logits):
        result = entry("maskgit_step", backend).forward(
            logits, codes, mask_len, temperature, seed, sample_ids, step, token_gumbel, rank_gumbel, stream
        )
    logp = result[2]
    if check.on_cpu(logp) and bool(logp.isnan().any()):
        sample, position = (int(x) for x in logp.isnan().nonzero()[0])
        raise NotFinite(
            f"logits: NaN, +inf or only -inf at sample {sample}, position {position}: no distribution to sample from"
        )
    return result


@_maskgit_step.register_fake
def _(logits: Tensor, codes: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    new = codes.new_empty(codes.shape)
    return new, torch.empty_like(new), torch.empty_like(new, dtype=dtype), torch.empty_like(new, dtype=torch.bool)
