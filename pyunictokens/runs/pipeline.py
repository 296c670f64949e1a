"""One concept through everything: measure, learn its tokens, measure, reinforce, measure, report, in one run folder.

Every part is finished or resumed on its own: a part whose result is on disk is not done again with `resume`. With
several ranks the first does everything, and the others wait for it and take part in reinforcement.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.settings import renamed, to_mapping
from ..data.concept import Concept
from ..evaluate.result import EvalResult
from ..models.base import owning_rows
from ..models.bundle import ModelBundle
from ..models.concept_tokens import ConceptTokens
from ..utils import fingerprint
from ..utils.devices import check_training_dtype
from ..utils.errors import UserError
from ..utils.files import AnyJson, folder_lock, read_json, sweep, write_json
from ..utils.progress import NO_NUMBERS, Numbers, Progress, silent
from ..utils.signals import Stopped
from .bundle import Scorers
from .context import Parts, RunContext
from .run_dir import CONCEPT, MEASURED, STAGES, THROUGHPUT, EvaluationConfig, write_description

if TYPE_CHECKING:
    from ..config.training import GrpoConfig


log = logging.getLogger(__name__)


@dataclass
class _Turn:
    """What rank 0 tells the others when it is their turn."""

    concept: ConceptTokens | None = None
    """The tokens as they are."""
    config: GrpoConfig | None = None
    """Of the reinforcement that begins with them; None where there is none."""
    resume: bool = False
    stopped: str = ""


@dataclass
class Outcome:
    """What a run ends with. `results` holds the evaluations by name: base, before, after."""

    out: Path
    concept: ConceptTokens
    results: dict[str, EvalResult] = field(default_factory=dict)
    report: Path | None = None


def run_concept(context: RunContext, parts: Parts | None = None) -> Outcome:
    """Do the `parts` of a run and leave everything in its folder.

    "before" is measured ahead of the last thing that trains (reinforcement, or the stages where there is none), "after"
    at the end. The folder is locked meanwhile. Raises UserError for a folder that holds a run (unless `resume`) or that
    another process works in, Stopped where `context.stop` says so, and as the parts do. With several ranks each calls
    this with the same arguments on the same file system; rank 0 rules.
    """
    parts = parts or Parts()
    if not context.ranks.first:
        return _follow(context)
    out = context.folder
    parts.check(out, context.rewards)
    check_training_dtype(context.bundle.model.dtype, parts.resume)
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out, ".pipeline.lock"):
        parts.check(out, context.rewards)
        if parts.resume:
            sweep(out)
        else:
            write_description(
                out,
                context.bundle.sources,
                context.rewards_from,
                context.bundle.model.max_text,
                context.concept,
                context.settings,
                parts,
                context.clip,
            )
        run = _Run(context, parts.resume)
        try:
            return run.do(parts)
        except Stopped as stopped:
            run.tell(_Turn(stopped=str(stopped)))
            raise


def _markers(file: Path) -> dict[str, AnyJson]:
    """What measured.json says of each evaluation; a damaged one says nothing, and what it spoke of is measured anew."""
    if not file.exists():
        return {}
    try:
        found = read_json(file)
        if not isinstance(found, dict):
            raise UserError(f"{file}: must be a table, is {type(found).__name__}")
    except UserError as error:
        log.warning("%s: all is measured anew", error)
        return {}
    return found


def _follow(context: RunContext) -> Outcome:
    """The part of every rank but the first: wait for it, then reinforce with it."""
    turn = context.ranks.broadcast(_Turn())
    if turn.concept is None:
        raise Stopped(turn.stopped)
    owning_rows(context.bundle.model).attach(turn.concept.to(context.bundle.device))
    if turn.config is None:
        return Outcome(context.folder, turn.concept)
    run = _Run(replace(context, progress=silent), turn.resume)
    return Outcome(context.folder, run.train(turn.config, turn.resume))


def measure(
    bundle: ModelBundle,
    concept: Concept,
    config: EvaluationConfig,
    rewards: Scorers | None,
    progress: Progress = silent,
    name: str = "measuring",
    published: bool = False,
) -> EvalResult:
    """UnifyBench++ of the model as it is, on the held-out half of the concept's folder. `published`: its tokens are
    asked in UniCTokens' form."""
    from ..evaluate.benchmark import SPLITS, unifybench
    from ..models.published_form import PublishedForm
    from ..rollout.engine import RolloutEngine

    def step(task: str, done: int, wanted: int) -> None:
        progress(f"{name}: {task.replace('_', ' ')}", done, wanted)

    rewards = rewards or Scorers(None)
    return unifybench(
        RolloutEngine.of(bundle),
        concept,
        bundle.concept if bundle.concept is None or not published else PublishedForm(bundle.concept),
        image_text=rewards.image_text,
        ensemble=rewards.ensemble,
        reader=rewards.reader,
        protocol=config.protocol,
        samples=config.samples,
        seed=config.seed,
        steps=config.timesteps,
        guidance_scale=config.guidance_scale,
        max_new_tokens=config.max_new_tokens,
        judged_as=config.judged_as,
        splits=config.tasks or SPLITS,
        size=bundle.size,
        progress=step,
    )


class _Run:
    """The parts of one run, each leaving its result in the folder."""

    def __init__(self, context: RunContext, resume: bool):
        self.context, self.bundle, self.out = context, context.bundle, context.folder
        self.resume, self.told = resume, False

    def do(self, parts: Parts) -> Outcome:
        """The parts in their order."""
        results: dict[str, EvalResult] = {}
        if parts.evaluate and parts.grpo and parts.start is None and self.context.settings.evaluation.base:
            results["base"] = self.measure("base")
        if parts.start is not None:
            owning_rows(self.bundle.model).attach(parts.start.to(self.bundle.device))
        if parts.evaluate and not parts.grpo:
            results["before"] = self.measure("before")
        if parts.stages:
            self.learn(parts.start).save(self.out / CONCEPT)
        if parts.grpo:
            if parts.evaluate:
                results["before"] = self.measure("before")
            self.reinforce().save(self.out / CONCEPT)
        self.tell(_Turn(self.bundle.concept))
        if parts.evaluate:
            results["after"] = self.measure("after")
        assert self.bundle.concept is not None
        return Outcome(self.out, self.bundle.concept, results, self.report() if parts.evaluate else None)

    def learn(self, start: ConceptTokens | None) -> ConceptTokens:
        """The concept stages."""
        from ..train.concept_tokens.stages import train_concept_tokens

        context, folder = self.context, self.out / STAGES
        return train_concept_tokens(
            self.bundle.model,
            self.bundle.vq,
            self.bundle.tokenizer,
            context.concept,
            context.settings.stages,
            folder,
            start=start,
            face_embedding=context.rewards.face_embedding if context.rewards else None,
            resume=self.resume and (folder / "stages.json").exists(),
            progress=context.progress,
            stop=context.stop,
        )

    def reinforce(self) -> ConceptTokens:
        """UniCTask-GRPO, from the tokens attached, together with the other ranks."""
        resume = self.resume and (self.out / "run.json").exists()
        config = self.context.settings.grpo
        self.tell(_Turn(self.bundle.concept, config, resume))
        return self.train(config, resume)

    def tell(self, turn: _Turn) -> None:
        """Let the other ranks go on; once."""
        ranks = self.context.ranks
        if not self.told and ranks.world > 1:
            self.told = True
            ranks.broadcast(replace(turn, concept=deepcopy(turn.concept).to("cpu") if turn.concept else None))

    def train(self, config: GrpoConfig, resume: bool) -> ConceptTokens:
        """Reinforcement, from the tokens attached, on every rank alike."""
        from ..train.reinforcement import train_grpo

        context, rewards = self.context, self.context.rewards
        assert rewards is not None and rewards.ensemble is not None
        result = train_grpo(
            self.bundle.model,
            self.bundle.vq,
            self.bundle.tokenizer,
            context.concept,
            rewards.ensemble,
            config,
            self.out,
            preview_scorer=rewards.preview_scorer,
            resume=resume,
            progress=context.progress,
            stop=context.stop,
            ranks=context.ranks,
        )
        if context.ranks.first:
            write_json(self.out / THROUGHPUT, {"images_per_second": rewards.ensemble.throughput()})
        return result.concept

    def measure(self, name: str) -> EvalResult:
        """One evaluation, kept in `name`.json; with `resume` one that is there is taken from it, provided that it was
        of these weights under these settings: measured.json says of what each was."""
        context, file, about = self.context, self.out / f"{name}.json", self.out / MEASURED
        subject, known = self._subject(), _markers(about)
        was = known.get(name)
        if isinstance(was, dict) and isinstance(was.get("settings"), dict):
            told = renamed(EvaluationConfig, was["settings"])
            was = {**was, "settings": {**to_mapping(EvaluationConfig()), **told}}
        if self.resume and file.exists() and was == subject:
            return EvalResult.load(file)
        if context.stop():
            raise Stopped(f"stopped ahead of the measuring that is kept in {file}")
        result = measure(
            self.bundle,
            context.concept,
            context.settings.evaluation,
            context.rewards,
            self._measuring,
            name,
            context.settings.grpo.question_form == "unictokens",
        )
        result.save(file)
        write_json(about, {**known, name: subject})
        return result

    def _subject(self) -> dict[str, object]:
        """What an evaluation is of: weights and rows by fingerprint, and its settings. No clock has a part in it."""
        rows = self.bundle.concept
        return {
            "weights": fingerprint.of_tensors(self.bundle.model.state_dict()),
            "concept": fingerprint.of_tensors(dict(rows.named_parameters())) if rows is not None else None,
            "settings": to_mapping(self.context.settings.evaluation),
        }

    def _measuring(self, what: str, done: int, wanted: int, numbers: Numbers = NO_NUMBERS, /) -> None:
        self.context.progress(what, done, wanted, numbers)
        if self.context.stop():
            raise Stopped(f"stopped while measuring ({what}); the measuring is begun anew")

    def report(self) -> Path:
        """report.html of the folder."""
        from ..evaluate.report.page import write_report

        return write_report(self.out)
