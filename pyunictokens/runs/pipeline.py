"""One concept through everything: measure, learn its tokens, measure, reinforce, measure, report, in one run folder.

Every part is finished or resumed on its own: a part whose result is on disk is not done again with `resume`. With
several ranks the first says what is next, and all do it together: stages, measuring, reinforcement.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..config.settings import renamed, to_mapping
from ..data.concept import Concept
from ..evaluate.result import EvalResult
from ..models.base import owning_rows
from ..models.bundle import ModelBundle
from ..models.concept_tokens import ConceptTokens
from ..utils import fingerprint
from ..utils.devices import check_training_dtype
from ..utils.files import folder_lock, read_table_or_warn, sweep, write_json
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
    """What rank 0 tells the others to do next, together with it."""

    what: Literal["measure", "stages", "grpo", "end"] = "end"
    concept: ConceptTokens | None = None
    """The tokens as they are."""
    resume: bool = False
    """Of stages and reinforcement: whether they go on."""
    stopped: str = ""
    """Of an end: why the run stopped; empty where it did not."""


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
        sweep(out, inside=parts.resume)  # a run may have been killed while its first files were written
        if not parts.resume:
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
            if not run.together:  # else the others have stopped as well
                run.tell("end", stopped=str(stopped))
            raise


def _follow(context: RunContext) -> Outcome:
    """The part of every rank but the first: to do with it what it says, until the end."""
    run, model = _Run(replace(context, progress=silent), False), owning_rows(context.bundle.model)
    while True:
        turn = context.ranks.broadcast(_Turn())
        if turn.stopped:
            raise Stopped(turn.stopped)
        if turn.concept is not None:
            model.attach(turn.concept.to(context.bundle.device))
        else:
            model.detach()
        if turn.what == "measure":
            run.share_of_measuring("")
        elif turn.what == "stages":
            run.stages(model.concept, turn.resume)
        elif turn.what == "grpo":
            run.train(context.settings.grpo, turn.resume)
        else:
            assert model.concept is not None
            return Outcome(context.folder, model.concept)


def measure(
    bundle: ModelBundle,
    concept: Concept,
    config: EvaluationConfig,
    rewards: Scorers | None,
    progress: Progress = silent,
    name: str = "measuring",
    published: bool = False,
    share: tuple[int, int] = (0, 1),
) -> EvalResult:
    """UnifyBench++ of the model as it is, on the held-out half of the concept's folder. `published`: its tokens are
    asked in UniCTokens' form. `share`: a part of it, as `unifybench` takes it."""
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
        share=share,
        progress=step,
    )


class _Run:
    """The parts of one run, each leaving its result in the folder."""

    def __init__(self, context: RunContext, resume: bool):
        self.context, self.bundle, self.out = context, context.bundle, context.folder
        self.resume, self.together = resume, False
        """`together`: whether all ranks are at work on one thing, which ends for all alike."""

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
        if parts.evaluate:
            results["after"] = self.measure("after")
        self.tell("end")
        assert self.bundle.concept is not None
        return Outcome(self.out, self.bundle.concept, results, self.report() if parts.evaluate else None)

    def learn(self, start: ConceptTokens | None) -> ConceptTokens:
        """The concept stages, together with the other ranks."""
        resume = self.resume and (self.out / STAGES / "stages.json").exists()
        with self.all_ranks("stages", resume):
            return self.stages(start, resume)

    def stages(self, start: ConceptTokens | None, resume: bool) -> ConceptTokens:
        """The concept stages, on every rank alike."""
        from ..train.concept_tokens.stages import train_concept_tokens

        context = self.context
        return train_concept_tokens(
            self.bundle.model,
            self.bundle.vq,
            self.bundle.tokenizer,
            context.concept,
            context.settings.stages,
            self.out / STAGES,
            start=start,
            face_embedding=context.rewards.face_embedding if context.rewards else None,
            resume=resume,
            progress=context.progress,
            stop=context.stop,
            ranks=context.ranks,
            report_to=context.settings.grpo.report_to,
        )

    def reinforce(self) -> ConceptTokens:
        """UniCTask-GRPO, from the tokens attached, together with the other ranks."""
        resume = self.resume and (self.out / "run.json").exists()
        with self.all_ranks("grpo", resume):
            return self.train(self.context.settings.grpo, resume)

    def tell(self, what: Literal["measure", "stages", "grpo", "end"], resume: bool = False, stopped: str = "") -> None:
        """Say to the other ranks what is next."""
        ranks, concept = self.context.ranks, self.bundle.concept
        if ranks.world > 1:
            ranks.broadcast(_Turn(what, deepcopy(concept).to("cpu") if concept else None, resume, stopped))

    @contextmanager
    def all_ranks(self, what: Literal["measure", "stages", "grpo"], resume: bool = False) -> Iterator[None]:
        """Around what all ranks do together."""
        self.tell(what, resume)
        self.together = self.context.ranks.world > 1
        yield
        self.together = False

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
        subject, known = self._subject(), read_table_or_warn(about, "all is measured anew")
        was = known.get(name)
        if isinstance(was, dict) and isinstance(was.get("settings"), dict):
            told = renamed(EvaluationConfig, was["settings"])
            was = {**was, "settings": {**to_mapping(EvaluationConfig()), **told}}
        if self.resume and file.exists() and was == subject:
            return EvalResult.load(file)
        if context.stop():
            raise Stopped(f"stopped ahead of the measuring that is kept in {file}")
        with self.all_ranks("measure"):
            result = self.share_of_measuring(name)
        result.save(file)
        write_json(about, {**known, name: subject})
        return result

    def share_of_measuring(self, name: str) -> EvalResult:
        """This rank's items of an evaluation, and then the whole of it. A rank that is asked to stop stops all."""
        context, ranks = self.context, self.context.ranks
        part: EvalResult | None = None
        stopped = ""
        try:
            part = measure(
                self.bundle,
                context.concept,
                context.settings.evaluation,
                context.rewards,
                self._measuring,
                name,
                context.settings.grpo.question_form == "unictokens",
                (ranks.rank, ranks.world),
            )
        except Stopped as error:
            stopped = str(error)
        told = ranks.gather((part, stopped))
        if stopped := next((why for _, why in told if why), ""):
            raise Stopped(stopped)
        return EvalResult.merged([each for each, _ in told if each is not None])

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
