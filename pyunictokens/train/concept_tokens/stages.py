"""The concept stages: what the tokens of a concept learn before any reinforcement (UniCTokens, An et al., 2025).

    understanding   <name> and K helpers learn to answer about the images
    generation      M more helpers; 0.8·image loss + 0.2·answer loss, and an L2 pull on <name>
    deepening       extra helpers, started from what stands still in the model's own images; answering again
    joint           all rows and both tasks at once

Only the concept's rows are parameters here; the model's weights have no gradient. The losses are in losses.py, the
starting rows in token_init.py, images in train/images.py.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from ...config.settings import save_yaml, to_mapping
from ...config.training import StageConfig
from ...data import wording
from ...data.batches import EpochSampler, GenerationItem, UnderstandingItem, generation_items, understanding_items
from ...data.concept import Concept
from ...models import ConceptTokens, ImageTokenizer, MaskedModel, TextTokenizer, answering, owning_rows
from ...models.showo.prompting import published_question
from ...rollout.engine import RolloutEngine
from ...utils.devices import check_training_dtype
from ...utils.errors import UserError
from ...utils.files import folder_lock, read_json, write_json
from ...utils.progress import Progress
from ...utils.signals import Stop, Stopped, never
from ..images import ReferenceImages
from ..metrics import MetricsLog, read_metrics
from ..optimizer import Optimizer, learning_rate
from ..prompts import as_prompt, as_question
from . import checkpoint
from . import token_init as rows
from .checkpoint import StageCheckpoint
from .losses import generation_loss, random_mask, text_row, understanding_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagePlan:
    """What one stage does."""

    draws: bool
    """Whether it learns to draw."""
    mixed: bool
    """Whether both tasks share a step."""
    question_groups: tuple[str, ...]
    """Helper tokens that questions mention."""
    learning: tuple[str, ...]
    """Groups of rows that change."""


PLANS = {
    "understanding": StagePlan(False, False, ("understanding",), ("sks", "understanding")),
    "generation": StagePlan(True, True, ("understanding", "generation"), ("sks", "understanding", "generation")),
    "deepening": StagePlan(True, True, ("understanding", "generation", "extra"), ("sks", "extra")),
    "joint": StagePlan(
        True, True, ("understanding", "generation", "extra"), ("sks", "understanding", "generation", "extra")
    ),
}


def questions_of(concept: Concept, config: StageConfig) -> list[UnderstandingItem]:
    """What the stages ask about a concept."""
    return understanding_items(concept, negatives_per_positive=config.negatives_per_positive, seed=config.seed)


def stage_steps(stage: str, config: StageConfig, questions: int, images: int) -> int:
    """Optimizer steps of a stage over so many questions and training images."""
    if PLANS[stage].mixed:
        epoch = max(-(-questions // config.batch_mixed), -(-images // config.batch_generation))
    else:
        epoch = -(-questions // config.batch_understanding)
    return min(epoch * config.epochs, config.max_steps or epoch * config.epochs)


def train_concept_tokens(
    model: MaskedModel,
    vq: ImageTokenizer,
    tokenizer: TextTokenizer,
    concept_data: Concept,
    config: StageConfig | None = None,
    out_dir: str | os.PathLike[str] = "runs/concept",
    *,
    start: ConceptTokens | None = None,
    face_embedding: rows.FaceEmbedding | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    stop: Stop = never,
) -> ConceptTokens:
    """Learn the tokens of a concept from its folder; returns them attached to `model`.

    Args:
        tokenizer: the plain one; it must not know the concept yet.
        concept_data: a `data.Concept`.
        out_dir: gets stages.jsonl, a folder per stage, and concept/ with the final rows.
        start: rows to go on from, in place of new ones.
        face_embedding: for humans, pixels [M, 3, H, W] to face embeddings; starts the generation rows.
        resume: take finished stages from `out_dir` instead of running them again, and go on inside the one that was cut
            off, from its last checkpoint (`save_every`), as if it had never stopped.
        stop: asked after every step; where it says so, a checkpoint is written and Stopped raised.

    Raises:
        UserError: for data that cannot be learned from, for a model in float16, when a loss is not finite, and where
            a checkpoint cannot be written.
        Stopped: `stop` said so.
    """
    config = config or StageConfig()
    check_training_dtype(model.dtype, resume)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        trainer = _Stages(model, vq, tokenizer, concept_data, config, out, face_embedding, progress, stop)
        return trainer.run(start, resume)


class _Stages:
    def __init__(
        self,
        model: MaskedModel,
        vq: ImageTokenizer,
        tokenizer: TextTokenizer,
        concept_data: Concept,
        config: StageConfig,
        out: Path,
        face_embedding: rows.FaceEmbedding | None,
        progress: Progress | None,
        stop: Stop,
    ):
        self.stop = stop
        self.model, self.answering = owning_rows(model), answering(model)
        self.vq, self.plain, self.data, self.config = vq, tokenizer, concept_data, config
        self.out, self.face_embedding, self.progress = out, face_embedding, progress
        self.images = ReferenceImages(model, vq, crop=config.crop, flip=config.flip, cache_mb=config.cache_mb)
        if not concept_data.train_images:
            raise UserError(f"concept {concept_data.name!r} has no training images: add some to {concept_data.root}")
        self.steps_done = 0

    def run(self, start: ConceptTokens | None, resume: bool) -> ConceptTokens:
        about = self.out / "stages.json"
        own = {"concept": self.data.name, "width": self.model.width, "max_text": self.model.max_text}
        settings = {**own, **to_mapping(self.config)}
        if about.exists() and not resume:
            raise UserError(
                f"{self.out}: already holds concept stages: go on with them (--resume) or choose another folder"
            )
        found = read_json(about) if about.exists() else settings
        if not isinstance(found, dict):
            raise UserError(f"{about}: must be a table of settings, is {type(found).__name__}")
        found = {**to_mapping(StageConfig()), **found} if about.exists() else settings
        known = {"max_text": found.get("max_text") or own["max_text"], "save_every": self.config.save_every}
        if {**found, **known} != settings:
            raise UserError(f"{self.out}: its stages were run with other settings ({about}): choose another folder")
        write_json(about, settings)
        save_yaml(self.out / "stages.yaml", self.config)
        self.model.requires_grad_(False)
        finished = self._finished() if resume else []
        begun = self._begun(finished) if resume else None
        if begun is not None:
            concept = begun.concept.to(self.model.device)
            self.steps_done = begun.steps_done
        elif finished:
            concept = ConceptTokens.load(self.out / finished[-1]).to(self.model.device)
            self.steps_done = sum(line.get("stage") in finished for line in read_metrics(self.out, "stages.jsonl"))
        else:
            concept = start or self._new()
        with MetricsLog(self.out, from_step=self.steps_done, name="stages.jsonl") as metrics:
            for number, stage in enumerate(self.config.stages):
                if stage in finished:
                    continue
                if begun is None:
                    concept = self._prepare(stage, concept)
                self.model.attach(concept.requires_grad_(True))
                self._learn(stage, number, concept, metrics, begun)
                concept.save(self.out / stage)
                checkpoint.remove(self.out)
                begun = None
        self.model.attach(concept.requires_grad_(False))
        concept.save(self.out / "concept")
        return concept

    def _finished(self) -> list[str]:
        """The stages whose rows are on disk, up to the first that is not."""
        stages = self.config.stages
        missing = [place for place, stage in enumerate(stages) if not (self.out / stage / "concept.json").exists()]
        return list(stages[: missing[0]] if missing else stages)

    def _begun(self, finished: list[str]) -> StageCheckpoint | None:
        """The checkpoint of the first stage that is not finished; None without, or where it is of other data."""
        found = StageCheckpoint.load(self.out)
        if found is None:
            return None
        left = self.config.stages[len(finished) :]
        if not left or found.stage != left[0]:  # a kill came between the stage's end and the removing of this
            checkpoint.remove(self.out)
            return None
        there = found.questions.get("items"), found.prompts.get("items")
        here = len(questions_of(self.data, self.config)), len(generation_items(self.data))
        if there != here:
            log.warning("stage %s is begun anew: the concept's folder has changed since it was cut off", found.stage)
            return None
        return found

    # --- starting rows ---------------------------------------------------------------------------------------------

    def _new(self) -> ConceptTokens:
        config = self.config
        concept = ConceptTokens(
            self.data.name,
            self.model.width,
            config.num_understanding,
            config.num_generation,
            seed=config.seed,
        ).to(self.model.device)
        rows.from_class_word(concept, self.model, self.plain, self.data.class_word)
        codes = torch.stack([self.images.codes(path) for path in self.data.train_images])
        rows.from_codes(concept, self.model, codes, "understanding", config.seed)
        rows.from_noise(concept, "generation", config.seed + 1)
        return concept

    def _prepare(self, stage: str, concept: ConceptTokens) -> ConceptTokens:
        """The rows that a stage starts with."""
        if stage in ("generation", "joint") and self.data.kind == "human" and self.face_embedding is not None:
            pixels = torch.stack([self.images.pixels(path) for path in self.data.train_images])
            rows.from_face(concept, pixels.to(self.model.device), self.face_embedding)
        if stage == "deepening" and self.config.num_extra:
            still = self._still_codes(concept)
            concept = concept.grown(self.config.num_extra, seed=self.config.seed + 2)
            rows.from_codes(concept, self.model, still, "extra", self.config.seed)
        return concept

    def _still_codes(self, concept: ConceptTokens) -> Tensor:
        """Codes int64 [M] of the model's own images that no longer change after `compare_step` of the timesteps."""
        config = self.config
        self.model.attach(concept)
        engine = RolloutEngine(self.model, None, self.plain.with_concept(concept.tokens))
        drawn = engine.generate_images(
            [as_prompt(concept, wording.base_prompt(concept.sks))],
            samples=config.generated_images,
            steps=config.generated_timesteps,
            guidance_scale=config.generated_guidance,
            seed=config.seed,
            decode=False,
        )
        assert drawn.chosen is not None
        at = min(config.generated_timesteps - 1, max(0, round(config.compare_step * config.generated_timesteps) - 1))
        final = drawn.codes.long().cpu()
        still = drawn.chosen[:, at].long().cpu() == final
        return final[still] if bool(still.any()) else final.flatten()

    # --- learning --------------------------------------------------------------------------------------------------

    def _learn(
        self, stage: str, number: int, concept: ConceptTokens, metrics: MetricsLog, begun: StageCheckpoint | None
    ) -> None:
        config, plan = self.config, PLANS[stage]
        batch = config.batch_mixed if plan.mixed else config.batch_understanding
        asked, drawn = questions_of(self.data, config), generation_items(self.data)
        questions = EpochSampler(asked, batch, seed=config.seed + number)
        prompts = EpochSampler(drawn, config.batch_generation, seed=config.seed + 100 + number)
        steps = stage_steps(stage, config, len(asked), len(drawn))
        lr = config.lr_generation if stage in ("generation", "joint") else config.lr
        generator = torch.Generator().manual_seed(config.seed * 1000 + number)
        named = dict(concept.named_parameters())
        optimizer = Optimizer(named, lr=lr, weight_decay=config.weight_decay, eps=config.eps)
        begin = {name: value.detach().clone() for name, value in named.items()}
        frozen = _frozen_rows(concept, plan.learning)
        tokenizer = self.plain.with_concept(concept.tokens)
        if begun is not None:
            begin = {name: value.to(self.model.device) for name, value in begun.begin.items()}
            optimizer.load_state_dict(begun.optimizer, self.out)
            generator.set_state(begun.generator)
            questions.load_state_dict(begun.questions)
            prompts.load_state_dict(begun.prompts)

        def save(step: int) -> None:
            metrics.sync()
            states = questions.state_dict(), prompts.state_dict()
            rows = concept, begin, optimizer.state_dict(), generator.get_state()
            StageCheckpoint(stage, step, self.steps_done, *rows, *states).save(self.out)

        for step in range(begun.step if begun is not None else 0, steps):
            optimizer.zero_grad()
            losses = {"understanding": self._understanding(questions.next(), concept, tokenizer, plan, generator)}
            weight = 1.0
            if plan.mixed:
                losses["generation"] = self._generation(prompts.next(), concept, tokenizer, generator)
                weight = 1.0 - config.weight_generation
            loss = weight * losses["understanding"] + (1.0 - weight) * losses.get("generation", 0.0)
            pulled = loss + self._pull(stage, concept, begin)
            if not bool(torch.isfinite(pulled)):
                raise UserError(
                    f"stage {stage}, step {step}: the loss is {float(pulled.detach())}: lower lr, or use float32"
                )
            pulled.backward()
            rate = learning_rate(step, lr=lr, steps=steps, warmup=config.warmup, schedule=config.schedule)
            norm = optimizer.step(rate)
            with torch.no_grad():
                for name, value in named.items():
                    value[frozen] = begin[name][frozen]
            values: dict[str, object] = {"step": self.steps_done, "stage": stage, "loss": float(loss.detach())}
            values.update({f"loss_{name}": float(value.detach()) for name, value in losses.items()})
            values.update(grad_norm=norm, lr=rate)
            metrics.write(values)
            self.steps_done += 1
            if self.progress is not None:
                self.progress(stage, step + 1, steps, values)
            if step + 1 == steps:  # its rows are written now
                continue
            stopping = self.stop()
            if stopping or (config.save_every and (step + 1) % config.save_every == 0):
                save(step + 1)
            if stopping:
                raise Stopped(f"stopped in stage {stage} at step {step + 1} of {steps}, its checkpoint is written")

    def _understanding(
        self,
        items: list[UnderstandingItem],
        concept: ConceptTokens,
        tokenizer: TextTokenizer,
        plan: StagePlan,
        generator: torch.Generator,
    ) -> Tensor:
        asked, prefixes = [], []
        for item in items:
            form = self.config.question_form
            if form == "both":
                form = "prefix" if bool(torch.rand((), generator=generator) < 0.5) else "expand"
            if form == "unictokens":
                wrapped = published_question(concept.introduce(item.question))
            else:
                question = as_question(concept, item.question, plan.question_groups, form)
                wrapped = self.answering.question_text(question)
            asked.append(text_row(tokenizer, self.answering, wrapped, item.answer))
            prefixes.append(self.images.prefix(item.image))
        return understanding_loss(self.answering, reduce(add, prefixes), asked)

    def _generation(
        self, items: list[GenerationItem], concept: ConceptTokens, tokenizer: TextTokenizer, generator: torch.Generator
    ) -> Tensor:
        prompts = []
        for item in items:
            dropped = bool(torch.rand((), generator=generator) < self.config.condition_dropout)
            text = [] if dropped else tokenizer.encode(as_prompt(concept, item.prompt))
            prompts.append(self.model.prompt_ids(text))
        codes = self.images.augmented([item.image for item in items], generator)
        mask, timestep = random_mask(codes, self.config.mask_schedule, generator)
        return generation_loss(self.model, codes, mask, prompts, timestep)

    def _pull(self, stage: str, concept: ConceptTokens, begin: dict[str, Tensor]) -> Tensor | float:
        """L2 distance of the rows of `<name>` from where the stage found them, in stages that draw."""
        if not PLANS[stage].draws or self.config.l2_pull == 0:
            return 0.0
        parts = [
            (value[concept.rows("sks")] - begin[name][concept.rows("sks")]).square().sum()
            for name, value in concept.named_parameters()
        ]
        return self.config.l2_pull * torch.stack(parts).sum()


def _frozen_rows(concept: ConceptTokens, learning: tuple[str, ...]) -> Tensor:
    frozen = torch.ones(concept.num_tokens, dtype=torch.bool)
    for group in learning:
        frozen[concept.rows(group)] = False
    return frozen.to(concept.embed.device)
