"""What can be set in training, and the presets to start from: `paper` is the paper's step as it can be run.

Numbers that the paper gives (section 4.1, appendix F) are the defaults of each field. What it leaves open stays at the
plain choice there, so that stored settings of older versions keep their meaning, and is set as the authors have it in
the preset; docs/method.md lists every deviation. Each dataclass is frozen and checks itself, so a bad value stops a run
before it starts. How settings are read from files and words is settings.py's business; what they do is told in
docs/training.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from ..utils.errors import UserError
from .limits import MAX_SEED, MOST, above, at_least, within
from .settings import from_mapping, load_yaml, save_yaml, with_overrides
from .stages import MAX_TEXT, StageConfig

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "none"]


_SHARD = "grpo.shard says it now: none for never, optimizer for always"


@dataclass(frozen=True)
class DsogConfig:
    """Dynamic scaling of the group: previews that score below a moving threshold are drawn anew (equations 9, 10)."""

    enabled: bool = True
    """Whether previews are judged at all."""
    initial: float | Literal["auto"] = 0.5
    """The threshold of the first step; auto looks at previews of the first tasks and starts where `target_pass_rate` of
    them pass, whatever scale the judge has."""
    target_pass_rate: float = 0.25
    """TPR: the part of previews that should pass."""
    mu: float = 0.12
    """How strongly the gap to the target moves the threshold."""
    eta: float = 0.8
    """How long the threshold's trend remembers."""
    epsilon0: float = 2.0
    """How strongly the trend works against a turn."""
    preview_step: int = 0
    """Timestep of the preview; 0 takes a fifth of all timesteps."""
    max_candidates: int = 8
    """Candidates for each image of the group; past it the best rejected one takes the image's place."""

    def __post_init__(self) -> None:
        if not isinstance(self.initial, str):
            within(0.01, 0.99, initial=self.initial)
        within(0, 1, target_pass_rate=self.target_pass_rate)
        if not 0 < self.eta < 1:
            raise UserError(f"eta={self.eta}: must be between 0 and 1, both left out")
        at_least(0, mu=self.mu, epsilon0=self.epsilon0, preview_step=self.preview_step)
        at_least(1, max_candidates=self.max_candidates)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the transformer's linear layers (peft)."""

    rank: int = 8
    """Width of the adapters."""
    alpha: float = 16.0
    """Their scale: the adapter's output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
    """Which linear layers get one; left as it is, those of the model at hand (`MaskedModel.lora_targets`)."""
    base: Literal["same", "nf4"] = "same"
    """The weights below them: as they are, or in four bits (`pip install 'pyunictokens[quant]'`), which adapters then
    learn on."""

    def __post_init__(self) -> None:
        at_least(1, rank=self.rank)
        above(0, alpha=self.alpha)


@dataclass(frozen=True)
class HeldOutConfig:
    """Prompts that never train, drawn every few steps with the same noise; used where held-out prompts are given."""

    every: int = 10
    """Steps between two measurements; the beginning and the end are always measured."""
    images: int = 2
    """Images of each held-out prompt."""
    by: str = "reward"
    """What decides which step is the best: reward, one of the reward models, or a metric, by name."""
    patience: int = 3
    """The run ends after this many measurements in a row that lie below the best by more than the standard error of
    the difference; 0 never ends it."""

    def __post_init__(self) -> None:
        at_least(1, every=self.every, images=self.images)
        at_least(0, patience=self.patience)
        if not self.by.strip():
            raise UserError("held_out.by is empty: must be reward, or the name of a reward model or metric")


OBJECTIVES = ("unictask", "mask_grpo", "gspo", "final_sample", "unigrpo", "diffu_grpo", "coupled")
"""Names of `train/objective.py: REGISTRY`."""


@dataclass(frozen=True)
class GrpoConfig:
    """UniCTask-GRPO: answers and images of one rollout share one reward and one advantage (equation 7)."""

    RETIRED = (("max_text", MAX_TEXT), ("shard_optimizer", _SHARD), ("shard_optimiser", _SHARD))

    steps: int = 100
    """Optimizer steps."""
    group_size: int = 9
    """G: rollouts of one question."""
    groups: int = 0
    """Questions in one optimizer step; each has its group of G rollouts, and the gradient is their mean. 0: one, or
    with several ranks the fewest with which at most an eighth of their time is idle (four of nine rollouts on eight); a
    run keeps the number that it began with."""
    groups_kept: float = 1.0
    """Part of a step's groups that the update learns from: those whose rewards differ most. A group whose rollouts are
    all equally good teaches nothing and costs an update as dear as any (dynamic sampling, as in DAPO)."""
    rollouts_kept: float = 1.0
    """Part of each group's rollouts, at least two, that the update learns from: those of the highest and the lowest
    rewards, whose variance is the largest, with advantages among themselves (PODS, arXiv 2504.13818). What lies between
    teaches little, and an update costs more than a rollout."""
    lr: float = 1e-6
    """AdamW's learning rate."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """How the learning rate goes on after the warm-up."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 1e-3
    """AdamW's weight decay. Concept rows are never decayed: their scale carries meaning."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    ema_decay: float = 0.0
    """Decay of the average of the weights over optimizer steps, as 0.95; 0 keeps none. With it held-out prompts are
    measured on the average, which is what best/ and final/ hold; rollouts take the weights of the last step."""
    beta: float = 0.01
    """Weight of the divergence from the reference policy; 0 leaves the reference pass out."""
    clip_low: float = 0.2
    """The ratio counts down to 1 − clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""
    alpha_answer: float = 0.4
    """Weight of the answer's tokens."""
    alpha_image: float = 0.6
    """Weight of the image's tokens."""
    objective: str = "unictask"
    """What is maximised: unictask (the paper), mask_grpo, gspo, final_sample; of text diffusion unigrpo, diffu_grpo and
    coupled; or MODULE:CLASS of your own."""
    advantage: Literal["mean", "std", "leave_one_out"] = "mean"
    """What a reward is compared with: the mean of its group (the paper), the same over the group's standard deviation,
    or the mean of the others."""
    reduction: Literal["auto", "sum", "mean"] = "auto"
    """Whether a rollout's terms are summed (unictask, final_sample) or averaged (mask_grpo, and those of text
    diffusion); auto is the objective's own."""
    token_scope: Literal["all", "masked", "newly_unmasked"] = "all"
    """Which image tokens of each timestep count: all, those unknown before it, or those it made known. For unictask and
    gspo; mask_grpo takes those made known, the others those they mask. Of texts, all means the tokens that a step made
    known."""
    inner_epochs: int = field(default=1, metadata={"was": "inner_updates"})
    """Optimizer steps on one set of rollouts; the first has ratio 1, so clipping acts from the second on."""
    visual_ratio: float = 0.5
    """Part of the steps that ask about an image; the others ask for a fact in text alone."""
    reasoning: bool = True
    """Whether the model answers before it draws. Without it images are drawn from the prompts alone, the reward takes
    the true answer for each, and nothing but image generation is trained (paper, table 2)."""
    compound: Literal["answer", "info"] = "answer"
    """What joins the prompt before an image is drawn: the model's answer (the paper), or also what info says, with the
    concept's token in place of its class word in the answer (the authors' code)."""
    question_form: Literal["auto", "ours", "unictokens"] = "auto"
    """How the model is told of the concept: as our stages train it, or as UniCTokens' code does ("<name> is
    <token_0>…." before a question, "USER: " without a line break, helpers before every `<name>` of a prompt). auto:
    unictokens where the run begins with tokens of that form, or its stages teach them so; else ours."""
    judged_prompt: Literal["compound", "truth"] = "compound"
    """What the image is judged against: the prompt it was drawn from (the paper), or the same with the true answer."""
    judged_as: Literal["class", "info"] = "class"
    """What the judges of images read for the concept's token: the class word, or what info says it is. A text encoder
    that is told "a cat" may score another cat above this one."""
    guidance_scale: float = 5.0
    """Classifier-free guidance s: (1 + s)·cond − s·uncond; 0 turns it off."""
    timesteps: int = 50
    """T: MaskGIT timesteps of an image."""
    temperature: float = 1.0
    """Temperature of the re-masking noise."""
    max_new_tokens: int = 100
    """Longest answer or text."""
    answer_temperature: float = 1.0
    """Temperature answers and texts are sampled at."""
    block_length: int = 0
    """Tokens of a block, for a model that writes by blocks; 0 takes the model's own, or less where max_new_tokens is no
    multiple of it."""
    text_steps: int = 0
    """Steps in which such a text is written; 0 takes the model's own number, in proportion to its length."""
    top_k: int = 0
    """Answers are drawn from the k likeliest tokens; 0 takes the full distribution, for which the ratios are exact."""
    trainable: Literal["concept", "lora", "full"] = "concept"
    """What learns: the concept's rows, adapters, or all weights."""
    train_concept: bool = True
    """Whether the concept's rows learn as well when `trainable` is lora or full."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, used when `trainable` is lora."""
    dsog: DsogConfig = field(default_factory=DsogConfig)
    """Previews and their threshold."""
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """Measuring on held-out prompts (`reinforce`)."""
    timestep_choice: Literal["all", "random", "largest_change"] = "random"
    """Which timesteps of an image the update looks at where it is not all of them: random ones, drawn anew each step
    and the same for a group, or for each image those that change it most."""
    timestep_fraction: float = 1.0
    """Part of an image's timesteps that the update looks at; those taken count the more."""
    micro_rows: int = 4
    """Rollouts in one microbatch of the update; memory grows with micro_rows · micro_timesteps, never with T. 0 takes
    what fits."""
    micro_timesteps: int = 1
    """Timesteps in one microbatch of the update; 0 takes what fits."""
    checkpoint_layers: bool = False
    """Recompute all layers in the backward pass instead of keeping their activations. Where a size above is 0, some are
    recomputed when memory is short."""
    checkpoint_every: int = 10
    """Steps between checkpoints; 0 writes one at the end only."""
    keep_last: int = 2
    """Newest checkpoints that stay on disk."""
    keep_best: int = 0
    """Checkpoints that stay beside them: those whose steps since the checkpoint before had the highest mean reward."""
    save_in_background: bool = False
    """Write checkpoints beside the steps that follow, from copies in the host's memory."""
    shard: Literal["auto", "none", "optimizer", "full"] = "auto"
    """What several ranks share out (docs/distributed.md): nothing, the optimizer's state, or the weights of layers as
    well (FSDP2; llada, mmada). auto shares the optimizer's state with trainable=full."""
    offload: bool = False
    """With shard=full, hold weights, gradients and optimizer state of the layers in the host's memory."""
    rollout_gather: Literal["auto", "once", "ahead"] = "auto"
    """With shard=full, gather the layers' weights once for a step's rollouts, or each layer as it runs, the next two on
    their way. auto: once where it fits the GPUs, as --plan counts."""
    sample_every: int = 10
    """Steps between images in samples/; 0 turns them off."""
    report_to: tuple[Tracker, ...] = ("tensorboard",)
    """Where numbers and images are reported to while stages and reinforcement run: tensorboard, wandb, trackio, mlflow,
    several of these, or none."""
    max_bad_steps: int = 3
    """Steps in a row without a finite reward, loss or gradient before the run ends with an error."""
    reward_timeout: float = field(default=0.0, metadata={"was": "expert_timeout"})
    """Seconds that the reward models may take for a group before the run ends with an error; 0 waits for ever."""
    capture: Literal["auto", "loop", "replay", "eager", "off"] = "auto"
    """How image steps run: auto captures them on a GPU and lets the host run them elsewhere; loop, replay and eager
    choose by name; off lets the host run them always. Prompts are padded (and exactly masked), so that one capture
    serves all groups."""
    rollout_products: Literal["same", "fp8"] = "same"
    """Precision of the blocks' linear layers while images and answers are drawn: the model's own, or e4m3 with a scale
    a row (a GPU of compute capability 8.9 or newer; emulated elsewhere). The ratio of the update corrects for it,
    because old log-probs are those that the rollout recorded."""
    rollout_head: Literal["auto", "float32", "16bit"] = "auto"
    """How the head of the codes is applied while images are drawn: 16bit multiplies 16-bit hidden states with and
    without the prompt and guides the float32 logits, float32 guides hidden states and multiplies in float32; the same
    numbers up to float32 rounding. auto is 16bit on a GPU where the transformer is of 16 bits."""
    rollout_blocks: Literal["eager", "compiled"] = "eager"
    """How the blocks of image steps run while images are drawn: operation by operation, or what stands between two
    attentions compiled by torch.compile (the first step waits for the compiler; weights are shared with the update,
    which stays eager)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the transformer; sums, softmax, loss and optimizer stay in float32. auto is bfloat16 on a GPU that
    computes in it (the toy keeps float32), else float32; a run's config.yaml holds what it came to. float16 is refused
    for new runs: its range is too small for gradients."""
    seed: int = 0
    """Seed of every draw of the run: questions, answers, images."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise UserError(f"group_size={self.group_size}: must be ≥ 2: an advantage needs a group")
        if not self.guidance_scale >= 0:
            raise UserError(f"guidance_scale={self.guidance_scale}: must be ≥ 0 (0 turns guidance off)")
        at_least(1, steps=self.steps, timesteps=self.timesteps, inner_epochs=self.inner_epochs)
        at_least(1, max_new_tokens=self.max_new_tokens, keep_last=self.keep_last, max_bad_steps=self.max_bad_steps)
        at_least(0, groups=self.groups, block_length=self.block_length, text_steps=self.text_steps)
        at_least(0, micro_rows=self.micro_rows, micro_timesteps=self.micro_timesteps)
        parts = {name: getattr(self, name) for name in ("timestep_fraction", "groups_kept", "rollouts_kept")}
        above(0, **parts)
        within(0, 1, **parts)
        if self.objective not in OBJECTIVES and ":" not in self.objective:
            raise UserError(
                f"objective={self.objective!r}: must be one of {', '.join(OBJECTIVES)}, or MODULE:CLASS of your own"
            )
        if self.timestep_choice == "all" and self.timestep_fraction < 1:
            raise UserError(
                f"timestep_fraction={self.timestep_fraction} with timestep_choice=all: set timestep_choice=random or "
                "largest_change, or leave the fraction at 1"
            )
        if self.timestep_choice == "largest_change" and self.timestep_fraction == 1:
            raise UserError(
                "timestep_fraction=1 with timestep_choice=largest_change: say how many timesteps, e.g. "
                "timestep_fraction=0.2"
            )
        above(0, lr=self.lr, max_grad_norm=self.max_grad_norm, answer_temperature=self.answer_temperature)
        at_least(0, warmup=self.warmup, weight_decay=self.weight_decay, beta=self.beta, temperature=self.temperature)
        at_least(0, alpha_answer=self.alpha_answer, alpha_image=self.alpha_image, top_k=self.top_k)
        if self.alpha_image == 0 and (self.alpha_answer == 0 or not self.reasoning):
            raise UserError("alpha_image=0 and no answer that counts: nothing would be learned; raise one of the two")
        at_least(0, checkpoint_every=self.checkpoint_every, sample_every=self.sample_every)
        at_least(0, keep_best=self.keep_best, reward_timeout=self.reward_timeout, clip_high=self.clip_high)
        within(0, 1, visual_ratio=self.visual_ratio, clip_low=self.clip_low)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay}: must be ≥ 0 and < 1 (0 keeps no average of the weights)")
        within(0, MAX_SEED, seed=self.seed)
        within(1, MOST, group_size=self.group_size, groups=self.groups or 1, timesteps=self.timesteps)
        within(1, MOST, max_new_tokens=self.max_new_tokens)
        if len(set(self.report_to)) != len(self.report_to) or ("none" in self.report_to and len(self.report_to) > 1):
            raise UserError(f"report_to={','.join(self.report_to)}: name each tracker once, and none alone")
        if self.shard != "full" and (self.offload or self.rollout_gather == "ahead"):
            raise UserError(f"offload or rollout_gather=ahead with shard={self.shard}: set shard=full, or neither")
        if self.shard == "full" and self.rollouts_kept < 1:
            raise UserError(
                f"rollouts_kept={self.rollouts_kept} with shard=full: all ranks must take as many passes; set "
                "shard=optimizer or rollouts_kept=1"
            )
        if self.rollout_products == "fp8" and self.shard == "full":
            raise UserError(
                "rollout_products=fp8 with shard=full: fp8 products need whole weights; use shard=optimizer or "
                "rollout_products=same"
            )
        if self.rollout_blocks == "compiled" and (self.shard == "full" or self.rollout_products == "fp8"):
            other = "shard=full" if self.shard == "full" else "rollout_products=fp8"
            raise UserError(
                f"rollout_blocks=compiled with {other}: compiled blocks need plain layers; use one of the two"
            )
        if self.dsog.enabled and self.dsog.preview_step > self.timesteps:
            raise UserError(f"preview_step={self.dsog.preview_step}: must be ≤ timesteps={self.timesteps}")

    @property
    def rollouts_taken(self) -> int:
        """Rollouts of a group that the update takes."""
        return max(2, round(self.rollouts_kept * self.group_size))


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `pyunictokens train` can be told."""

    stages: StageConfig = field(default_factory=StageConfig)
    """Learning the concept's tokens."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    """Reinforcement."""

    @classmethod
    def preset(cls, name: str) -> TrainConfig:
        """ "paper" (all weights learn), "unictokens" (its stages as published), "fast", "quality", or "toy" (the
        shipped toy world on two CPU cores)."""
        if name not in PRESETS:
            raise UserError(f"preset {name!r}: must be one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> TrainConfig:
        """Read a YAML file (its key ``preset`` says what it starts from, or the paper), apply ``key=value`` words."""
        values = load_yaml(path)
        base = cls.preset(str(values.pop("preset", "paper")))
        return from_mapping(cls, values, base=base, origin=str(path)).override(overrides)

    def override(self, words: Iterable[str]) -> TrainConfig:
        """A copy with ``key=value`` words applied, e.g. ``grpo.steps=20`` or, where it is clear, ``group_size=4``."""
        return with_overrides(self, words)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write all settings as YAML, whole or not at all."""
        save_yaml(path, self)


_PAPER = GrpoConfig(trainable="full", warmup=10, temperature=1.8, dsog=DsogConfig(initial="auto"))
"""The paper's step. It trains the model, so all weights learn: at its learning rate of 1e-6 a concept's rows alone move
by 3e-5 in 100 steps, which no picture shows. Warm-up (an epoch of ten batches) and the re-masking temperature are the
authors' later public settings. Their threshold starts at 0.5, for another judge; here it starts where it selects."""

_KEPT = replace(_PAPER, token_scope="newly_unmasked", micro_rows=0, micro_timesteps=0)
"""The paper's settings, but only codes that a step keeps are learned from (docs/measured-facts.md)."""

_PUBLISHED_STAGES = StageConfig(
    stages=("understanding", "generation", "deepening"),
    epochs=20,
    weight_decay=1e-4,
    eps=1e-6,
    question_form="unictokens",
    l2_pull=0.0,
)
"""The stages as UniCTokens' public code trains them, all three."""

PRESETS = {
    "paper": TrainConfig(grpo=_PAPER),
    "unictokens": TrainConfig(stages=_PUBLISHED_STAGES, grpo=_PAPER),
    "fast": TrainConfig(grpo=replace(_KEPT, timestep_fraction=0.2)),
    "quality": TrainConfig(grpo=replace(_KEPT, group_size=18)),
    "toy": TrainConfig(
        stages=StageConfig(
            num_understanding=8,
            num_generation=4,
            epochs=20,
            max_steps=20,
            batch_generation=8,
            batch_mixed=2,
            crop=1.0,
            flip=False,
            question_form="expand",
            generated_images=8,
            generated_timesteps=12,
            generated_guidance=3.0,
        ),
        grpo=GrpoConfig(
            steps=60,
            groups=4,
            group_size=8,
            objective="final_sample",
            advantage="std",
            lr=1e-4,
            beta=0.0,
            guidance_scale=0.0,
            timesteps=4,
            max_new_tokens=24,
            judged_as="info",
            trainable="full",
            ema_decay=0.9,
            micro_rows=0,
            micro_timesteps=0,
            checkpoint_every=20,
            dsog=DsogConfig(enabled=False, max_candidates=2),
        ),
    ),
}
"""The presets by name."""
