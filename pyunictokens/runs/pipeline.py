"""One concept through everything: measure, learn its tokens, measure, reinforce, measure, report, in one run folder.

Every part is finished or resumed on its own: a part whose result is on disk is not done again with `resume`. With
several ranks the first does everything, and the others wait for it and take part in reinforcement. How the parts work
is the business of `train` and `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.settings import to_mapping
from ..data.concept import Concept
from ..evaluate.result import EvalResult
from ..models.concept_tokens import ConceptTokens
from ..utils.errors import UserError
from ..utils.files import folder_lock, read_json, sweep, write_json
from ..utils.signals import Stop, Stopped, never
from .bundle import Experts, Workbench
from .run_dir import CONCEPT, CONFIG, EXPERTS, MEASURED, STAGES, EvaluationConfig, RunConfig, write_description

if TYPE_CHECKING:
    from ..config.training import GrpoConfig
    from ..train.distributed.ranks import Ranks

Progress = Callable[[str, int, int, str], None]
"""Called with (what, done, wanted, a word about it)."""


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


def run_concept(
    bench: Workbench,
    concept: Concept,
    config: RunConfig,
    out: Path,
    experts: Experts | None,
    *,
    start: ConceptTokens | None = None,
    stages: bool = True,
    grpo: bool = True,
    evaluate: bool = True,
    evaluate_base: bool = False,
    resume: bool = False,
    rewards: str | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    stop: Stop = never,
    ranks: Ranks | None = None,
) -> Outcome:
    """Train `concept` on `bench` and leave everything in the folder `out`.

    "before" is measured ahead of the last thing that trains (reinforcement, or the stages where there is none), "after"
    at the end; `evaluate_base` also measures the model that has never seen the concept. `start` gives tokens to begin
    with. The folder is locked meanwhile. `stop` is asked between steps and between parts. Raises UserError for a folder
    that holds a run (unless `resume`) or that another process works in, Stopped where `stop` says so, and as the parts
    do. With several `ranks` each calls this with the same arguments on the same file system; rank 0 rules.
    """
    from ..train.distributed.ranks import Ranks

    ranks = ranks or Ranks()
    if not ranks.first:
        return _follow(bench, concept, config, out, experts, stop, ranks)
    check_request(out, experts, started=start is not None, stages=stages, grpo=grpo, resume=resume)
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out, ".pipeline.lock"):
        check_request(out, experts, started=start is not None, stages=stages, grpo=grpo, resume=resume)
        config = config.with_max_text(bench.max_text)
        if resume:
            sweep(out)
        else:
            write_description(out, bench.sources, rewards, bench.max_text, concept, config)
        run = _Run(bench, concept, config, out, experts, resume, progress or (lambda *_: None), stop, ranks)
        try:
            return _parts(run, start, stages=stages, grpo=grpo, evaluate=evaluate, evaluate_base=evaluate_base)
        except Stopped as stopped:
            run.tell(_Turn(stopped=str(stopped)))
            raise


def _follow(
    bench: Workbench,
    concept: Concept,
    config: RunConfig,
    out: Path,
    experts: Experts | None,
    stop: Stop,
    ranks: Ranks,
) -> Outcome:
    """The part of every rank but the first: wait for it, then reinforce with it."""
    turn = ranks.broadcast(_Turn())
    if turn.concept is None:
        raise Stopped(turn.stopped)
    bench.model.attach(turn.concept.to(bench.device))
    if turn.config is None:
        return Outcome(out, turn.concept)
    run = _Run(bench, concept, config, out, experts, turn.resume, lambda *_: None, stop, ranks)
    return Outcome(out, run.train(turn.config, turn.resume))


def _parts(
    run: _Run, start: ConceptTokens | None, *, stages: bool, grpo: bool, evaluate: bool, evaluate_base: bool
) -> Outcome:
    """The parts of a run in their order."""
    bench, out = run.bench, run.out
    results: dict[str, EvalResult] = {}
    if evaluate and evaluate_base:
        results["base"] = run.measure("base")
    if start is not None:
        bench.model.attach(start.to(bench.device))
    if evaluate and not grpo:
        results["before"] = run.measure("before")
    if stages:
        run.learn(start).save(out / CONCEPT)
    if grpo:
        if evaluate:
            results["before"] = run.measure("before")
        run.reinforce().save(out / CONCEPT)
    run.tell(_Turn(bench.concept))
    if evaluate:
        results["after"] = run.measure("after")
    assert bench.concept is not None
    return Outcome(out, bench.concept, results, run.report() if evaluate else None)


def check_request(out: Path, experts: Experts | None, *, started: bool, stages: bool, grpo: bool, resume: bool) -> None:
    """Raise UserError for a run that cannot work, before anything is loaded. `started`: tokens to begin with exist."""
    if not (stages or grpo):
        raise UserError("nothing to do: neither stages nor reinforcement was asked for")
    if not stages and not started:
        raise UserError("no stages and no tokens to begin with: give --start RUN, or let the stages run")
    if grpo and experts is None:
        raise UserError(
            "reinforcement needs reward experts, and this model brings none: "
            "give --rewards FILE.yaml (docs/rewards.md), or --no-grpo"
        )
    if (out / CONFIG).exists() and not resume:
        raise UserError(f"{out}: already holds a run: go on with it (--resume) or choose another folder")
    if resume and not (out / CONFIG).exists():
        raise UserError(f"{out}: holds no run to resume: start one without --resume")


def measure(
    bench: Workbench,
    concept: Concept,
    config: EvaluationConfig,
    experts: Experts | None,
    progress: Progress | None = None,
    name: str = "measuring",
) -> EvalResult:
    """UnifyBench++ of the model as it is, on the held-out half of the concept's folder."""
    from ..evaluate.benchmark import SPLITS, unifybench

    def step(split: str, done: int, wanted: int) -> None:
        if progress is not None:
            progress(f"{name}: {split.replace('_', ' ')}", done, wanted, "")

    engine: Any = bench.engine()  # evaluate asks for less than the engine's full signature
    return unifybench(
        engine,
        concept,
        bench.concept,
        image_text=experts.image_text if experts else None,
        ensemble=experts.ensemble if experts else None,
        reader=experts.reader if experts else None,
        samples=config.samples,
        seed=config.seed,
        steps=config.timesteps,
        guidance_scale=config.guidance_scale,
        max_new_tokens=config.max_new_tokens,
        judged_as=config.judged_as,
        splits=config.splits or SPLITS,
        size=bench.size,
        progress=step,
    )


class _Run:
    """The parts of one run, each leaving its result in the folder."""

    def __init__(
        self,
        bench: Workbench,
        concept: Concept,
        config: RunConfig,
        out: Path,
        experts: Experts | None,
        resume: bool,
        progress: Progress,
        stop: Stop,
        ranks: Ranks,
    ):
        self.stop, self.ranks, self.told = stop, ranks, False
        self.bench, self.concept, self.config, self.out = bench, concept, config, out
        self.experts, self.resume, self.progress = experts, resume, progress

    def learn(self, start: ConceptTokens | None) -> ConceptTokens:
        """The concept stages."""
        from ..train.concept_tokens.stages import train_concept_tokens

        folder = self.out / STAGES
        return train_concept_tokens(
            self.bench.model,
            self.bench.vq,
            self.bench.tokenizer,
            self.concept,
            self.config.stages,
            folder,
            start=start,
            face_embedding=self.experts.face_embedding if self.experts else None,
            resume=self.resume and (folder / "stages.json").exists(),
            progress=self._step,
            stop=self.stop,
        )

    def reinforce(self) -> ConceptTokens:
        """UniCTask-GRPO, from the tokens attached, together with the other ranks."""
        resume = self.resume and (self.out / "run.json").exists()
        self.tell(_Turn(self.bench.concept, self.config.grpo, resume))
        return self.train(self.config.grpo, resume)

    def tell(self, turn: _Turn) -> None:
        """Let the other ranks go on; once."""
        if not self.told and self.ranks.world > 1:
            self.told = True
            self.ranks.broadcast(replace(turn, concept=deepcopy(turn.concept).to("cpu") if turn.concept else None))

    def train(self, config: GrpoConfig, resume: bool) -> ConceptTokens:
        """Reinforcement, from the tokens attached, on every rank alike."""
        from ..train.grpo import train_grpo

        assert self.experts is not None
        result = train_grpo(
            self.bench.model,
            self.bench.vq,
            self.bench.tokenizer,
            self.concept,
            self.experts.ensemble,
            config,
            self.out,
            preview_scorer=self.experts.preview_scorer,
            resume=resume,
            progress=self._step,
            stop=self.stop,
            ranks=self.ranks,
        )
        if self.ranks.first and callable(throughput := getattr(self.experts.ensemble, "throughput", None)):
            write_json(self.out / EXPERTS, {"drawings_per_second": throughput()})
        return result.concept

    def measure(self, name: str) -> EvalResult:
        """One evaluation, kept in `name`.json; with `resume` one that is there is taken from it, provided that it was
        of these weights under these settings: measured.json says of what each was."""
        file, about = self.out / f"{name}.json", self.out / MEASURED
        subject, known = self._subject(), read_json(about) if about.exists() else {}
        if self.resume and file.exists() and known.get(name) == subject:
            return EvalResult.load(file)
        if self.stop():
            raise Stopped(f"stopped ahead of the measuring that is kept in {file}")
        result = measure(self.bench, self.concept, self.config.evaluation, self.experts, self._measuring, f"{name}")
        result.save(file)
        write_json(about, {**known, name: subject})
        return result

    def _subject(self) -> dict[str, Any]:
        """What an evaluation is of: weights and rows by fingerprint, and its settings. No clock has a part in it."""
        from ..train.checkpoint.run_state import fingerprint

        rows = self.bench.concept
        return {
            "weights": fingerprint(self.bench.model.state_dict()),
            "concept": fingerprint(dict(rows.named_parameters())) if rows is not None else None,
            "settings": to_mapping(self.config.evaluation),
        }

    def _measuring(self, what: str, done: int, wanted: int, word: str) -> None:
        self.progress(what, done, wanted, word)
        if self.stop():
            raise Stopped(f"stopped while measuring ({what}); the measuring is begun anew")

    def report(self) -> Path:
        """report.html of the folder."""
        from ..evaluate.report.page import write_report

        return write_report(self.out)

    def _step(self, phase: str, done: int, wanted: int, numbers: dict[str, Any]) -> None:
        words = [f"{key} {numbers[key]:.3f}" for key in ("reward_mean", "loss") if isinstance(numbers.get(key), float)]
        self.progress(phase, done, wanted, ", ".join(words[:1]))
