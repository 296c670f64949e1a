"""What a rollout leaves behind: plain records of tensors, enough for the update and the report and nothing else.

An `ImageRollout` holds every step's codes before and after sampling with their log-probs; a `TextRollout` holds answers
token by token. Unknown codes are −1 (`pyunictokens.MASK`).

Letters: R rollouts (rows), P prompts, N image codes, T timesteps, L answer tokens, H×W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class DsogReport:
    """What dynamic scaling of the group did in one call of `generate_images` (paper, section 3.3.1)."""

    accepted: int
    """Previews that scored above the threshold. Each belongs to one row of the rollout."""
    previewed: int
    """Candidates that ran to the preview step, accepted or not."""
    filled: int
    """Rows taken from the best rejected previews because the cap on candidates was reached."""
    pass_rate: float
    """accepted / previewed."""
    threshold: float
    """The threshold these previews were held against."""
    next_threshold: float
    """The threshold after equations 9 and 10; the same as before where a number was given."""
    scores: Tensor
    """float32 [R]: the preview score of each row's candidate (−inf where the scorer failed and the row was filled)."""
    attempts: Tensor
    """int64 [R]: how many candidates this row's place had started before the one it ended with."""
    preview_codes: Tensor
    """int [R, N]: the codes the preview was decoded from."""
    row_steps: int = 0
    """Steps that candidates of this process took, those that were rejected included."""
    errors: list[str] = field(default_factory=list)
    """One line for each scorer call that raised, or returned something that is not one number a preview."""

    @property
    def rejected(self) -> int:
        """Previews that did not pass."""
        return self.previewed - self.accepted


@dataclass
class ImageRollout:
    """Images of one call, rows prompt-major: row ``p * samples + g`` is sample g of prompt p."""

    codes: Tensor
    """int64 [R, N], all known."""
    pixels: Tensor | None
    """float [R, 3, H, W], about [−1, 1]; None with ``decode=False``."""
    inputs: Tensor | None
    """int16 or int32 [R, T, N]: the codes before each step, −1 where unknown; None with ``record=False``."""
    chosen: Tensor | None
    """int16 or int32 [R, T, N]: the codes sampled (or kept) at each step; None with ``record=False``."""
    logp: Tensor | None
    """float32 [R, T, N]: log p(chosen) under the guided distribution; None with ``record=False``."""
    prompt_index: Tensor
    """int64 [R], on the CPU."""
    sample_ids: Tensor
    """int64 [R], on the CPU: with the seed the key of all noise. The same id and seed draw the same image again."""
    prompt_ids: list[list[int]]
    """Text ids of each prompt, without special ids (what `MaskedModel.prompt_ids` takes)."""
    seed: int
    steps: int
    guidance_scale: float
    """As it was asked for: the model's rule says what it means."""
    temperature: float
    grid: tuple[int, int]
    """Codes in height and width."""
    dsog: DsogReport | None = None
    concepts: list[str | None] = field(default_factory=list)
    """The resident concept each prompt's ids belong to; None for the model as it is."""

    def __len__(self) -> int:
        return self.codes.shape[0]


class RolloutInterrupted(KeyboardInterrupt):
    """Ctrl-C during `generate_images`. `rollout` holds the rows that were finished, and may have none."""

    def __init__(self, rollout: ImageRollout, rows: list[int]):
        super().__init__(f"stopped with {len(rows)} finished images")
        self.rollout = rollout
        self.rows = rows
        """Which rows of the whole call they are."""


@dataclass
class TextSteps:
    """The steps of texts that were unmasked block by block, as an image's steps are recorded."""

    inputs: Tensor
    """int [R, T, L]: the tokens before each step, −1 where unknown."""
    chosen: Tensor
    """int [R, T, L]: the tokens sampled in the step's block, those that stand elsewhere; 0 where none does yet."""
    logp: Tensor
    """float32 [R, T, L]: log p(chosen) at the temperature of sampling, 0 where the step sampled nothing."""
    block: int
    """Tokens of a block."""

    @property
    def sampled(self) -> Tensor:
        """bool [R, T, L]: the tokens that each step sampled, kept or not: what was unknown of the first block with
        anything unknown in it."""
        unknown = self.inputs < 0
        end = (unknown.int().argmax(-1, keepdim=True) // self.block + 1) * self.block
        return unknown & (torch.arange(unknown.shape[-1], device=unknown.device) < end)


@dataclass
class TextRollout:
    """Answers of one call, rows prompt-major: row ``p * samples + g`` is sample g of question p."""

    texts: list[str]
    """The answers as text; empty without a tokenizer."""
    tokens: Tensor
    """int64 [R, L], the end token included where one was drawn, −1 after it."""
    logp: Tensor
    """float32 [R, L]: log-prob of each token under the full distribution at the sampling temperature (at temperature 1
    for greedy answers), 0 after the end."""
    lengths: Tensor
    """int64 [R]: tokens of each answer, the end token included."""
    prompt_index: Tensor
    """int64 [R], on the CPU."""
    sample_ids: Tensor
    """int64 [R], on the CPU."""
    question_ids: list[list[int]]
    """Ids of each question as the model read them, its wrapping included."""
    image_codes: Tensor | None
    """int64 [P, N]: the image of each question; None where the model looked at features."""
    seed: int
    temperature: float
    top_k: int
    concepts: list[str | None] = field(default_factory=list)
    """The resident concept each question's ids belong to; None for the model as it is."""
    image_features: Tensor | None = None
    """[P, patches, E]: the same for a model that looks at features of an image encoder."""
    steps: TextSteps | None = None
    """Where the text was unmasked by blocks and its steps were recorded."""

    def __len__(self) -> int:
        return self.tokens.shape[0]
