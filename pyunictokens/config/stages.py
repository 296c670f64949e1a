"""What can be set in the stages that learn a concept's tokens, before any reinforcement.

The defaults are the paper's numbers (section 4.1, appendix F) where it gives any; docs/training.md tells what each is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..utils.errors import UserError
from .limits import MAX_SEED, MOST, above, at_least, within

Stage = Literal["understanding", "generation", "deepening", "joint"]

MAX_TEXT = "it belongs to the model (model.max_text, or max_text at the top of a run's config)"
"""Where a setting that sections had once is now."""


@dataclass(frozen=True)
class StageConfig:
    """The stages in which a concept's tokens are learned, before any reinforcement."""

    RETIRED = (("max_text", MAX_TEXT),)

    stages: tuple[Stage, ...] = ("understanding", "generation")
    """Which stages run, in order. UniCTokens-R1 uses the first two; "deepening" is UniCTokens' third, "joint" is one
    stage of both tasks on all tokens."""
    num_understanding: int = 16
    """K: helper tokens learned from understanding."""
    num_generation: int = 8
    """M: helper tokens learned from generation."""
    num_extra: int = 8
    """Helper tokens that the deepening stage adds."""
    epochs: int = 15
    """Passes over the concept's data in each stage."""
    max_steps: int = 0
    """Upper limit of optimizer steps in each stage; 0 lets `epochs` decide."""
    lr: float = 1e-3
    """AdamW's learning rate in the understanding and deepening stages."""
    lr_generation: float = 1e-3
    """AdamW's learning rate in the generation and joint stages."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up of each stage."""
    weight_decay: float = 1e-3
    """AdamW's weight decay."""
    eps: float = 1e-8
    """AdamW's epsilon (published: 1e-6)."""
    batch_understanding: int = 4
    """Questions a step in the understanding stage."""
    batch_generation: int = 1
    """Images a step in the stages that draw."""
    batch_mixed: int = 1
    """Questions a step in the stages that draw."""
    weight_generation: float = 0.8
    """Weight of the image loss where both tasks are trained; answering has the rest."""
    question_form: Literal["expand", "prefix", "both", "unictokens"] = "both"
    """How a question names the concept: helper tokens before `<name>` (as everywhere after the stages), the published
    sentence "<name> is <token_0>…." before the question, or now one and now the other. unictokens is that sentence with
    the understanding tokens alone and the published wording around it."""
    negatives_per_positive: float = 1.0
    """No-questions kept for each yes-question about images."""
    l2_pull: float = 0.01
    """Strength of the pull that keeps the rows of `<name>` near where the generation stage found them."""
    condition_dropout: float = 0.1
    """Probability that an image prompt is replaced by the empty one, so that guidance keeps working."""
    mask_schedule: str = "cosine"
    """Schedule from which the masking rate of a training image is drawn."""
    crop: float = 1.1
    """Training images are enlarged by this factor and cropped at random; 1 turns it off."""
    flip: bool = True
    """Mirror training images at random."""
    generated_images: int = 20
    """Images drawn by the model between generation and deepening."""
    generated_timesteps: int = 50
    """Timesteps of those images."""
    generated_guidance: float = 5.0
    """Guidance scale of those images."""
    compare_step: float = 0.7
    """Where, as a part of all timesteps, an image is compared with its final codes; codes that still change after it
    are blanked (published: step 35 of 50)."""
    cache_mb: int = 512
    """Memory for keys and values of images, which never change while only concept rows are trained."""
    max_bad_steps: int = 3
    """Steps in a row without a finite loss or gradient before a stage ends with an error."""
    save_every: int = 50
    """Steps between checkpoints inside a stage; 0 writes one only where the run is asked to stop."""
    seed: int = 0
    """Seed of initial rows, order of data, masks and augmentation."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("stages=[]: name at least one of understanding, generation, deepening, joint")
        if len(set(self.stages)) != len(self.stages):
            raise UserError(f"stages={list(self.stages)}: each stage runs once")
        at_least(1, num_understanding=self.num_understanding, epochs=self.epochs, max_bad_steps=self.max_bad_steps)
        at_least(0, num_generation=self.num_generation, num_extra=self.num_extra, max_steps=self.max_steps)
        at_least(1, batch_understanding=self.batch_understanding, batch_generation=self.batch_generation)
        at_least(1, batch_mixed=self.batch_mixed, crop=self.crop, generated_images=self.generated_images)
        at_least(2, generated_timesteps=self.generated_timesteps)
        at_least(0, save_every=self.save_every)
        at_least(0, generated_guidance=self.generated_guidance, weight_decay=self.weight_decay, warmup=self.warmup)
        at_least(0, l2_pull=self.l2_pull, cache_mb=self.cache_mb, negatives_per_positive=self.negatives_per_positive)
        above(0, lr=self.lr, lr_generation=self.lr_generation, eps=self.eps)
        within(0, 1, weight_generation=self.weight_generation, condition_dropout=self.condition_dropout)
        within(0, 1, compare_step=self.compare_step)
        within(0, MAX_SEED, seed=self.seed)
        within(0, MOST, num_understanding=self.num_understanding, num_generation=self.num_generation)
        within(0, MOST, num_extra=self.num_extra, generated_images=self.generated_images)
