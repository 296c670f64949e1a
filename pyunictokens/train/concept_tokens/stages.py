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
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from ...config.settings import save_yaml, to_mapping
from ...config.stages import StageConfig
from ...data import wording
from ...data.batches import EpochSampler, GenerationItem, UnderstandingItem, generation_items, understanding_items
from ...data.concept import Concept
from ...models import ConceptTokens, ImageTokenizer, MaskedModel, TextTokenizer, answering, owning_rows
from ...models.showo.prompting import published_question
from ...rollout.engine import RolloutEngine
from ...utils.devices import check_training_dtype
from ...utils.errors import UserError
from ...utils.files import folder_lock, read_json_table, write_json
from ...utils.progress import Progress
from ...utils.signals import Stop, Stopped, never
from ..bad_steps import BadSteps
from ..distributed.dealing import deal
from ..distributed.ranks import Ranks
from ..images import ReferenceImages
from ..metrics import MetricsLog, read_metrics
from ..optimizer import Optimizer, learning_rate
from ..prompts import as_prompt, as_question
from ..trackers import check_trackers
from . import checkpoint
from . import token_init as rows
from .checkpoint import StageCheckpoint
from .losses import generation_loss, random_mask, text_row, understanding_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """What a step asks and draws, and which of it is this rank's."""

    questions: list[UnderstandingItem]
    images: list[GenerationItem]
    asked: range
    drawn: range


@dataclass(frozen=True)
class _Stage:
    """One stage under way."""

    name: str
    plan: StagePlan
    concept: ConceptTokens
    tokenizer: TextTokenizer
    """It knows the concept's tokens."""
    generator: torch.Generator
    begin: dict[str, Tensor]
    """The rows as the stage found them."""


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
    ranks: Ranks | None = None,
    report_to: Sequence[str] = ("tensorboard",),
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
        stop: asked after every step; where it says so (on any rank), a checkpoint is written and Stopped raised.
        ranks: the processes that learn together, each of which calls this with the same arguments: the questions and
            images of a step are dealt among them. All must see `out_dir`, which rank 0 alone writes.
        report_to: trackers of the numbers (train/trackers.py), as `GrpoConfig.report_to`.

    Raises:
        MissingExtra: for a tracker that is not installed.
        UserError: for data that cannot be learned from, for a model in float16, when `max_bad_steps` steps in a row
            have a loss or gradient that is not finite, and where a checkpoint cannot be written.
        Stopped: `stop` said so.
    """
    config = config or StageConfig()
    check_training_dtype(model.dtype, resume)
    check_trackers(report_to)
    out, ranks = Path(out_dir), ranks or Ranks()
    with ExitStack() as held:
        if ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(folder_lock(out))
        trainer = _Stages(model, vq, tokenizer, concept_data, config, out, face_embedding, progress, stop, ranks)
        trainer.report_to = report_to
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
        ranks: Ranks,
    ):
        self.stop, self.ranks = stop, ranks
        self.bad = BadSteps(config.max_bad_steps, log, ranks.first)
        self.model, self.answering = owning_rows(model), answering(model)
        self.vq, self.plain, self.data, self.config = vq, tokenizer, concept_data, config
        self.out, self.face_embedding, self.progress = out, face_embedding, progress
        self.images = ReferenceImages(model, vq, crop=config.crop, flip=config.flip, cache_mb=config.cache_mb)
        if not concept_data.train_images:
            raise UserError(f"concept {concept_data.name!r} has no training images: add some to {concept_data.root}")
        self.steps_done = 0
        self.report_to: Sequence[str] = ()

    def run(self, start: ConceptTokens | None, resume: bool) -> ConceptTokens:
        about = self.out / "stages.json"
        self.model.requires_grad_(False)
        if self.ranks.first:
            self._describe(about, resume)
        self.ranks.barrier()
        finished = self._finished() if resume else []
        begun = self._begun(finished) if resume else None
        self.ranks.barrier()
        if begun is not None:
            concept = begun.concept.to(self.model.device)
            self.steps_done = begun.steps_done
        elif finished:
            concept = ConceptTokens.load(self.out / finished[-1]).to(self.model.device)
            self.steps_done = sum(line.get("stage") in finished for line in read_metrics(self.out, "stages.jsonl"))
        else:
            concept = self._same(start or self._new())
        with ExitStack() as undo:
            metrics = undo.enter_context(self._log()) if self.ranks.first else None
            for number, stage in enumerate(self.config.stages):
                if stage in finished:
                    continue
                if begun is None:
                    concept = self._same(self._prepare(stage, concept))
                self.model.attach(concept.requires_grad_(True))
                self._learn(stage, number, concept, metrics, begun)
                if self.ranks.first:
                    concept.save(self.out / stage)
                    checkpoint.remove(self.out)
                begun = None
            self.model.attach(concept.requires_grad_(False))
            if self.ranks.first:
                concept.save(self.out / "concept")
            self.ranks.barrier()
        return concept

    def _log(self) -> MetricsLog:
        return MetricsLog(
            self.out,
            from_step=self.steps_done,
            name="stages.jsonl",
            report_to=self.report_to,
            called="-".join(self.out.resolve().parts[-2:]),
            settings=to_mapping(self.config),
        )

    def _describe(self, about: Path, resume: bool) -> None:
        """Write down of what the stages are, or compare it with what is there."""
        own = {"concept": self.data.name, "width": self.model.width, "max_text": self.model.max_text}
        settings = {**own, **to_mapping(self.config)}
        if about.exists() and not resume:
            raise UserError(
                f"{self.out}: already holds concept stages: go on with them (--resume) or choose another folder"
            )
        found = read_json_table(about) if about.exists() else settings
        found = {**to_mapping(StageConfig()), **found} if about.exists() else settings
        known = {"max_text": found.get("max_text") or own["max_text"]}
        known |= {name: settings[name] for name in ("save_every", "max_bad_steps")}  # they alter no number
        if {**found, **known} != settings:
            raise UserError(f"{self.out}: its stages were run with other settings ({about}): choose another folder")
        write_json(about, settings)
        save_yaml(self.out / "stages.yaml", self.config)

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
            self.ranks.barrier()  # all have read it
            if self.ranks.first:
                checkpoint.remove(self.out)
            return None
        there = found.questions.get("items"), found.prompts.get("items")
        here = len(questions_of(self.data, self.config)), len(generation_items(self.data))
        if there != here:
            log.warning("stage %s is begun anew: the concept's folder has changed since it was cut off", found.stage)
            return None
        return found

    def _same(self, concept: ConceptTokens) -> ConceptTokens:
        """The rows of rank 0 on all ranks: k-means of other devices may round otherwise."""
        if self.ranks.world == 1:
            return concept
        return self.ranks.broadcast(deepcopy(concept).to("cpu")).to(self.model.device)

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
        mine = self.ranks.share(config.generated_images)
        drawn = engine.generate_images(
            [as_prompt(concept, wording.base_prompt(concept.sks))],
            samples=max(1, len(mine)),
            sample_ids=list(mine) or [0],
            steps=config.generated_timesteps,
            guidance_scale=config.generated_guidance,
            seed=config.seed,
            decode=False,
        )
        assert drawn.chosen is not None
        at = min(config.generated_timesteps - 1, max(0, round(config.compare_step * config.generated_timesteps) - 1))
        parts = self.ranks.gather((drawn.codes.long().cpu()[: len(mine)], drawn.chosen[: len(mine), at].long().cpu()))
        final = torch.cat([codes for codes, _ in parts])
        still = torch.cat([chosen for _, chosen in parts]) == final
        return final[still] if bool(still.any()) else final.flatten()

    # --- learning --------------------------------------------------------------------------------------------------

    def _learn(
        self,
        stage: str,
        number: int,
        concept: ConceptTokens,
        metrics: MetricsLog | None,
        begun: StageCheckpoint | None,
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
        if begun is not None:
            begin = {name: value.to(self.model.device) for name, value in begun.begin.items()}
            optimizer.load_state_dict(begun.optimizer, self.out)
            generator.set_state(begun.generator)
            questions.load_state_dict(begun.questions)
            prompts.load_state_dict(begun.prompts)

        now = _Stage(stage, plan, concept, self.plain.with_concept(concept.tokens), generator, begin)

        def save(step: int) -> None:
            if metrics is not None:
                metrics.sync()
            states = questions.state_dict(), prompts.state_dict()
            rows = concept, begin, optimizer.state_dict(), generator.get_state()
            StageCheckpoint(stage, step, self.steps_done, *rows, *states).save(self.out)

        for step in range(begun.step if begun is not None else 0, steps):
            optimizer.zero_grad()
            work = self._dealt(questions.next(), prompts.next() if plan.mixed else [], plan)
            norm = math.nan
            rate = learning_rate(step, lr=lr, steps=steps, warmup=config.warmup, schedule=config.schedule)
            losses = self._losses(work, now)
            if not all(map(math.isfinite, losses.values())):
                problem = f"loss {losses['loss']:g}"
            else:
                self.ranks.sum_gradients(named)
                norm = optimizer.step(rate)
                problem = "" if math.isfinite(norm) else f"gradient of length {norm:g}"
            with torch.no_grad():
                for name, value in named.items():
                    value[frozen] = begin[name][frozen]
            self.bad.count(f"stage {stage}, step {step}", problem)
            values: dict[str, object] = {"step": self.steps_done, "stage": stage}
            values |= {**losses, "grad_norm": norm, "lr": rate, **({"skipped": problem} if problem else {})}
            if metrics is not None:
                metrics.write(values)
            self.steps_done += 1
            if self.progress is not None and self.ranks.first:
                self.progress(stage, step + 1, steps, values)
            if self.bad.too_many:
                if metrics is not None:
                    save(step + 1)
                last, after = f"step {step} of stage {stage}", f"step {step + 1}"
                raise UserError(self.bad.diagnosis(last, after, problem, "lower stages.lr, or use dtype=float32"))
            if step + 1 == steps:  # its rows are written now
                continue
            stopping = self.ranks.any(self.stop())
            if metrics is not None and (stopping or (config.save_every and (step + 1) % config.save_every == 0)):
                save(step + 1)
            if stopping:
                raise Stopped(f"stopped in stage {stage} at step {step + 1} of {steps}, its checkpoint is written")

    def _dealt(self, questions: list[UnderstandingItem], prompts: list[GenerationItem], plan: StagePlan) -> _Work:
        """Which questions and images of a step are this rank's. An image costs as much as several questions."""
        costs = [1.0] * len(questions) + [4.0] * len(prompts)
        rows, count = deal(costs, self.ranks.world)[self.ranks.rank], len(questions)
        mine = range(min(rows.start, count), min(rows.stop, count))
        drawn = range(max(rows.start, count) - count, max(rows.stop, count) - count)
        return _Work(questions, prompts, mine, drawn)

    def _losses(self, work: _Work, now: _Stage) -> dict[str, float]:
        """The losses of a step over all ranks; the gradients of this rank's part are added to the rows'."""
        weight = 1.0 - self.config.weight_generation if now.plan.mixed else 1.0
        asked = self._understanding(work, now)
        drawn = self._generation(work, now) if now.plan.mixed else None
        pulled = self._pull(now) if self.ranks.first else 0.0
        total = pulled + sum(
            (factor * part for factor, part in ((weight, asked), (1.0 - weight, drawn)) if part is not None), 0.0
        )
        if isinstance(total, Tensor) and bool(torch.isfinite(total)):
            total.backward()
        own = [float(part.detach()) if part is not None else 0.0 for part in (asked, drawn)]
        own.append(float(pulled.detach()) if isinstance(pulled, Tensor) else pulled)
        understanding, generation, pull = (sum(column) for column in zip(*self.ranks.gather(own), strict=True))
        found = {"loss": weight * understanding + (1.0 - weight) * generation, "loss_understanding": understanding}
        if now.plan.mixed:
            found["loss_generation"] = generation
        return found if math.isfinite(pull) else {**found, "loss": math.nan}

    def _understanding(self, work: _Work, now: _Stage) -> Tensor | None:
        """This rank's part of the mean over all answer tokens of the step; None where it has no question."""
        rows = []
        for item in work.questions:
            form = self.config.question_form
            if form == "both":
                form = "prefix" if bool(torch.rand((), generator=now.generator) < 0.5) else "expand"
            if form == "unictokens":
                wrapped = published_question(now.concept.introduce(item.question))
            else:
                question = as_question(now.concept, item.question, now.plan.question_groups, form)
                wrapped = self.answering.question_text(question)
            rows.append(text_row(now.tokenizer, self.answering, wrapped, item.answer))
        if not work.asked:
            return None
        prefixes = [self.images.prefix(work.questions[row].image) for row in work.asked]
        total = sum(len(row.answer) for row in rows) if self.ranks.world > 1 else None
        return understanding_loss(self.answering, reduce(add, prefixes), [rows[row] for row in work.asked], total)

    def _generation(self, work: _Work, now: _Stage) -> Tensor | None:
        """This rank's part of the mean over all masked codes of the step; None where it has no image."""
        prompts = []
        for item in work.images:
            dropped = bool(torch.rand((), generator=now.generator) < self.config.condition_dropout)
            text = [] if dropped else now.tokenizer.encode(as_prompt(now.concept, item.prompt))
            prompts.append(self.model.prompt_ids(text))
        codes = self.images.augmented([item.image for item in work.images], now.generator, work.drawn)
        count = math.prod(self.model.grid)
        mask, timestep = random_mask(len(work.images), count, self.config.mask_schedule, now.generator)
        if not work.drawn:
            return None
        rows = slice(work.drawn.start, work.drawn.stop)
        total = int(mask.sum()) if self.ranks.world > 1 else None
        return generation_loss(self.model, codes, mask[rows], prompts[rows], timestep[rows], total)

    def _pull(self, now: _Stage) -> Tensor | float:
        """L2 distance of the rows of `<name>` from where the stage found them, in stages that draw."""
        if not now.plan.draws or self.config.l2_pull == 0:
            return 0.0
        sks = now.concept.rows("sks")
        parts = [(value[sks] - now.begin[name][sks]).square().sum() for name, value in now.concept.named_parameters()]
        return self.config.l2_pull * torch.stack(parts).sum()


def _frozen_rows(concept: ConceptTokens, learning: tuple[str, ...]) -> Tensor:
    frozen = torch.ones(concept.num_tokens, dtype=torch.bool)
    for group in learning:
        frozen[concept.rows(group)] = False
    return frozen.to(concept.embed.device)
