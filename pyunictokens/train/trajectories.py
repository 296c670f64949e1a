"""Rollouts as the update sees them, and which of an image's timesteps it looks at.

An image rollout is T actions: at each timestep the codes before it, the codes chosen at it, and their log-probs under
the policy that chose. `choose_timesteps` takes some of them; `remask` puts in their place the finished sample under
random masks, as the objective `final_sample` scores it (UDM-GRPO, MaskFocus). Texts that were unmasked by blocks are
the same: their codes are token ids, N their length (:meth:`ImageTrajectories.of_texts`).

Shape suffixes: R rollouts, T timesteps, k kept timesteps, N image codes, L answer tokens, K codebook, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..models import MaskedModel, WritingModel
from ..rollout.types import ImageRollout, TextRollout
from ..utils.errors import UserError


@dataclass
class ImageTrajectories:
    """R image rollouts as the update sees them. Codes may be of any integer type; −1 is unknown."""

    prompts: list[list[int]]
    """Image prompts (`MaskedModel.prompt_ids`), each once."""
    prompt_of_row: list[int]
    """Which prompt each rollout was drawn from."""
    inputs_RTN: Tensor
    chosen_RTN: Tensor
    old_logp_RTN: Tensor
    """Empty where no rollout recorded them: they are then those of the policy as it is."""
    empty_prompt: list[int]
    """The prompt of the unconditional half."""
    guidance_scale: float
    """s in (1 + s)·cond − s·uncond (`SamplingRule.strength`)."""
    ref_logp_RTN: Tensor | None = None
    mask_RTN: Tensor | None = None
    """Tokens that count; None counts all."""
    weight: float = 1.0
    """What each timestep counts for: above 1 where others were left out (:func:`choose_timesteps`)."""
    timestep_RT: Tensor | None = None
    """float32: the part of the steps that was done before each, as `MaskedModel.image_hidden` takes it. Where it is not
    given, the T timesteps are all there were, in their order."""
    temperature: float = 1.0
    """Of the distribution that the choices were drawn from."""
    kept_RN: Tensor | None = None
    """bool: the positions that are part of the sample at all, where that is not all (a text ends)."""
    prompt_mask_id: int | None = None
    """`MaskedModel.prompt_mask_id`."""

    def __post_init__(self) -> None:
        if self.timestep_RT is None:
            rows, steps = self.inputs_RTN.shape[:2]
            self.timestep_RT = (torch.arange(steps, device=self.inputs_RTN.device) / steps).expand(rows, steps)

    @classmethod
    def of(cls, model: MaskedModel, rollout: ImageRollout, mask_RTN: Tensor | None = None) -> ImageTrajectories:
        """What the update needs of a recorded rollout of `model`. Raises UserError where it was not recorded."""
        if rollout.inputs is None or rollout.chosen is None or rollout.logp is None:
            raise UserError("this rollout was not recorded: draw it with record=True")
        distinct: dict[tuple[int, ...], int] = {}
        of_prompt = [distinct.setdefault(tuple(model.prompt_ids(text)), len(distinct)) for text in rollout.prompt_ids]
        return cls(
            prompts=[list(prompt) for prompt in distinct],
            prompt_of_row=[of_prompt[index] for index in rollout.prompt_index.tolist()],
            inputs_RTN=rollout.inputs,
            chosen_RTN=rollout.chosen,
            old_logp_RTN=rollout.logp,
            empty_prompt=model.prompt_ids([]),
            guidance_scale=model.rule.strength(rollout.guidance_scale),
            mask_RTN=mask_RTN,
            prompt_mask_id=model.prompt_mask_id,
        )

    @classmethod
    def of_texts(cls, model: WritingModel, rollout: TextRollout, scope: str = "newly_unmasked") -> ImageTrajectories:
        """What the update needs of recorded texts of `model`; what follows an end token never counts, nor what a step
        could not sample yet (its block comes later).

        Log-probs were recorded of the tokens that a step made known; with another `scope` they are still to be taken
        (`old_logp_RTN` is empty). Raises UserError where nothing was recorded.
        """
        if rollout.steps is None:
            raise UserError("these texts were not recorded: write them with record=True")
        inputs = rollout.steps.inputs
        place = torch.arange(inputs.shape[2], device=inputs.device)
        kept_RN = place < rollout.lengths.to(inputs.device)[:, None]
        counted = kept_RN[:, None] & (rollout.steps.sampled | (inputs >= 0))
        scoped = ops.token_mask(inputs, scope)
        distinct: dict[tuple[int, ...], int] = {}
        of_prompt = [distinct.setdefault(tuple(model.prompt_ids(ids)), len(distinct)) for ids in rollout.question_ids]
        return cls(
            prompts=[list(prompt) for prompt in distinct],
            prompt_of_row=[of_prompt[index] for index in rollout.prompt_index.tolist()],
            inputs_RTN=inputs,
            chosen_RTN=rollout.steps.chosen,
            old_logp_RTN=rollout.steps.logp if scope == "newly_unmasked" else torch.empty(0),
            empty_prompt=model.prompt_ids([]),
            guidance_scale=0.0,
            mask_RTN=counted if scoped is None else scoped & counted,
            temperature=rollout.temperature or 1.0,
            kept_RN=kept_RN,
            prompt_mask_id=model.prompt_mask_id,
        )

    def __len__(self) -> int:
        return self.inputs_RTN.shape[0]

    @property
    def mask(self) -> Tensor | None:
        return self.mask_RTN

    @property
    def kept(self) -> Tensor:
        """bool [R, N]: the positions that are part of the sample."""
        if self.kept_RN is not None:
            return self.kept_RN
        return torch.ones_like(self.inputs_RTN[:, 0], dtype=torch.bool)

    @property
    def shape(self) -> torch.Size:
        return self.inputs_RTN.shape

    def rows(self, rows: Sequence[int]) -> ImageTrajectories:
        """Some rollouts, whole."""
        at = list(rows)

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[at]

        return replace(
            self,
            prompt_of_row=[self.prompt_of_row[row] for row in at],
            inputs_RTN=self.inputs_RTN[at],
            chosen_RTN=self.chosen_RTN[at],
            old_logp_RTN=self.old_logp_RTN[at] if len(self.old_logp_RTN) else self.old_logp_RTN,
            ref_logp_RTN=cut(self.ref_logp_RTN),
            mask_RTN=cut(self.mask_RTN),
            timestep_RT=cut(self.timestep_RT),
            kept_RN=cut(self.kept_RN),
        )

    def part(self, rows: slice, steps: slice, device: torch.device) -> ImageTrajectories:
        """Some rollouts at some timesteps, on `device`."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows, steps].to(device)

        return replace(
            self,
            prompt_of_row=self.prompt_of_row[rows],
            inputs_RTN=self.inputs_RTN[rows, steps].to(device),
            chosen_RTN=self.chosen_RTN[rows, steps].to(device),
            old_logp_RTN=self.old_logp_RTN[rows, steps].to(device) if len(self.old_logp_RTN) else self.old_logp_RTN,
            ref_logp_RTN=cut(self.ref_logp_RTN),
            mask_RTN=cut(self.mask_RTN),
            timestep_RT=cut(self.timestep_RT),
            kept_RN=None if self.kept_RN is None else self.kept_RN[rows].to(device),
        )


@dataclass
class AnswerTrajectories:
    """R answers to one question about one image."""

    seen: Tensor
    """The image: codes int64 [N], or features [patches, E] where the model takes those."""
    question: list[int]
    """Ids of the question as the model reads it."""
    tokens_RL: Tensor
    """−1 after the end."""
    old_logp_RL: Tensor
    temperature: float = 1.0
    ref_logp_RL: Tensor | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return self.tokens_RL.shape[0]

    @classmethod
    def of(cls, rollout: TextRollout) -> AnswerTrajectories:
        """What the update needs of answers to one question."""
        seen = rollout.image_codes if rollout.image_codes is not None else rollout.image_features
        if seen is None or len(rollout.question_ids) != 1:
            raise UserError("answers must be to one question about an image")
        return cls(
            seen=seen[0],
            question=rollout.question_ids[0],
            tokens_RL=rollout.tokens,
            old_logp_RL=rollout.logp,
            temperature=rollout.temperature,
        )

    @property
    def mask_RL(self) -> Tensor:
        return self.tokens_RL >= 0

    @property
    def mask(self) -> Tensor | None:
        return self.mask_RL

    @property
    def shape(self) -> torch.Size:
        return self.tokens_RL.shape

    def rows(self, rows: Sequence[int]) -> AnswerTrajectories:
        """Some answers."""
        at = list(rows)
        return replace(
            self,
            tokens_RL=self.tokens_RL[at],
            old_logp_RL=self.old_logp_RL[at],
            ref_logp_RL=None if self.ref_logp_RL is None else self.ref_logp_RL[at],
        )

    def part(self, rows: slice, device: torch.device) -> AnswerTrajectories:
        """Some answers, on `device`."""
        return replace(
            self,
            tokens_RL=self.tokens_RL[rows].to(device),
            old_logp_RL=self.old_logp_RL[rows].to(device),
            ref_logp_RL=None if self.ref_logp_RL is None else self.ref_logp_RL[rows].to(device),
        )


# --- which timesteps -----------------------------------------------------------------------------------------------


def choose_timesteps(
    images: ImageTrajectories, choice: str, fraction: float, *, seed: int, embedding_KD: Tensor | None = None
) -> ImageTrajectories:
    """`images` with round(fraction·T) of their timesteps, at least one; each of them counts T / kept times.

    choice: "all" leaves them as they are; "random" takes the same for all rollouts, by `seed` alone, so that loss and
    gradient are right on average; "largest_change" takes each rollout's own, by :func:`changes` between embeddings of
    codes (`embedding_KD`). Choose before log-probs are taken: they are then taken for the kept ones only.
    """
    rows, steps = images.inputs_RTN.shape[:2]
    kept = max(1, round(fraction * steps))
    if choice == "all" or kept >= steps:
        return images
    if choice == "random":
        order = torch.randperm(steps, generator=torch.Generator().manual_seed(seed % 2**63))[:kept].sort().values
        order_Rk = order.expand(rows, kept)
    else:
        assert embedding_KD is not None
        found = changes(images.chosen_RTN, embedding_KD)
        order_Rk = found.sort(dim=1, descending=True, stable=True).indices[:, :kept].sort(1).values.cpu()

    def part(tensor_RTN: Tensor) -> Tensor:
        place = order_Rk.to(tensor_RTN.device)[..., None].expand(-1, -1, tensor_RTN.shape[2])
        return tensor_RTN.gather(1, place)

    assert images.timestep_RT is not None
    return replace(
        images,
        inputs_RTN=part(images.inputs_RTN),
        chosen_RTN=part(images.chosen_RTN),
        old_logp_RTN=part(images.old_logp_RTN) if len(images.old_logp_RTN) else images.old_logp_RTN,
        ref_logp_RTN=None if images.ref_logp_RTN is None else part(images.ref_logp_RTN),
        mask_RTN=None if images.mask_RTN is None else part(images.mask_RTN),
        timestep_RT=part(images.timestep_RT[..., None])[..., 0],
        weight=images.weight * steps / kept,
    )


@torch.no_grad()
def changes(chosen_RTN: Tensor, embedding_KD: Tensor) -> Tensor:
    """How much each timestep changes the image, float32 [R, T]: the mean over positions of 1 − cosine between the
    embedding of the code chosen at it and of the one chosen at the timestep before.

    The first timestep changes everything (1): before it there is no image. A rollout's numbers depend on it alone.
    """
    unit_KD = F.normalize(embedding_KD.float(), dim=-1)
    chosen = chosen_RTN.to(unit_KD.device, torch.int64)
    found = torch.ones(chosen.shape[:2], device=unit_KD.device)
    for step in range(1, chosen.shape[1]):  # a timestep at a time: embeddings of all would not fit
        before, now = chosen[:, step - 1], chosen[:, step]
        similarity = (F.embedding(before, unit_KD) * F.embedding(now, unit_KD)).sum(-1)
        found[:, step] = torch.where(before == now, 0.0, 1 - similarity).mean(-1)
    return found


# --- the finished sample -------------------------------------------------------------------------------------------


def remask(images: ImageTrajectories, sample_RN: Tensor, keys: Sequence[Sequence[int]]) -> ImageTrajectories:
    """The finished samples in place of the recorded steps: as many positions masked as at each timestep, but random
    ones; those count, and their old log-probs are still to be taken (`old_logp_RTN` is empty).

    `keys` holds one seed (some numbers) a rollout: its masks follow from that alone.
    """
    steps, count = images.inputs_RTN.shape[1:]
    kept_RN = images.kept.cpu()
    noise = np.stack([np.random.default_rng(list(key)).random((steps, count)) for key in keys])
    rank_RTN = torch.from_numpy(np.where(kept_RN[:, None], noise, 2.0).argsort(-1).argsort(-1))
    hidden = (images.inputs_RTN < 0) & images.kept[:, None]
    mask_RTN = rank_RTN.to(hidden.device) < hidden.sum(-1, keepdim=True)
    return replace(masked_views(images, sample_RN, mask_RTN), timestep_RT=images.timestep_RT, weight=images.weight)


def masked_views(images: ImageTrajectories, sample_RN: Tensor, mask_RTN: Tensor) -> ImageTrajectories:
    """The finished samples under masks bool [R, T, N] in place of the recorded steps: T is the number of views.

    What is masked counts, where it is part of the sample; its old log-probs are still to be taken. A model that knows
    the time is told the part of the positions that is known.
    """
    rows, views, count = mask_RTN.shape
    chosen_RTN = sample_RN[:, None].expand(rows, views, count).to(images.chosen_RTN)
    return replace(
        images,
        inputs_RTN=chosen_RTN.masked_fill(mask_RTN, -1),
        chosen_RTN=chosen_RTN,
        old_logp_RTN=torch.empty(0),
        ref_logp_RTN=None,
        mask_RTN=mask_RTN & images.kept[:, None],
        timestep_RT=1.0 - mask_RTN.float().mean(-1),
        weight=1.0,
    )


def random_masks(
    images: ImageTrajectories, parts_R: Sequence[float], generators: Sequence[np.random.Generator]
) -> Tensor:
    """bool [R, N]: of each rollout's sample round(part · its positions) at random places, at least one."""
    masks = torch.zeros(images.kept.shape, dtype=torch.bool)
    for row, (part, generator) in enumerate(zip(parts_R, generators, strict=True)):
        places = images.kept[row].nonzero().flatten().cpu().numpy()
        wanted = min(max(1, round(part * len(places))), len(places))
        masks[row, torch.from_numpy(generator.permutation(places)[:wanted])] = True
    return masks.to(images.inputs_RTN.device)
