"""Rows of a table by the words of a command line: the models that need an engine; a CLIP model and a judge.

It joins runs and model bundles (which hold engines) with `evaluate` (which is handed one).
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from ..baselines.base import FILE, Reading, Trained
from ..baselines.registry import METHODS, method
from ..evaluate.baselines import Spec, baseline, parse
from ..evaluate.baselines.ours import Sampling
from ..evaluate.clip import Embeddings, OpenClip
from ..evaluate.core import Baseline, Model
from ..evaluate.protocol import OURS, BenchProtocol
from ..evaluate.runner import TableSettings
from ..evaluate.scoring import Scorer
from ..evaluate.tasks import Subject
from ..models.bundle import ModelBundle, Sources
from ..rewards.base import ImageTextEncoder
from ..toy.model import toy_folder
from ..utils import fingerprint
from ..utils.devices import pick_device, pick_dtype
from ..utils.errors import UserError
from .bundle import open_bundle, resolved_dtype
from .run_dir import BASE, Run, RunConfig

TOY_CLIP = "toy"
"""The toy's own image–text encoder, as a value of --clip."""


@dataclass(frozen=True)
class TableConfig(TableSettings):
    """How much is asked, and how this project's own models generate and answer."""

    timesteps: int = 50
    """MaskGIT timesteps of an image (ours, showo-tp, showo-ip)."""
    guidance_scale: float = 5.0
    """Classifier-free guidance of the images (ours, showo-tp, showo-ip)."""
    max_new_tokens: int = 100
    """Longest answer (all but diffusers and real)."""
    question_form: Literal["auto", "ours", "unictokens"] = "auto"
    """How a learned concept is named in questions and prompts: as our stages train it, or as UniCTokens' code does
    ("<name> is <token_0>…." before a question, helpers before every name, "USER: " without a line break). auto: its own
    form for tokens that its code published, ours for runs."""
    judged_as: Literal["class", "info"] = "class"
    """What the judge of images reads for the concept's token, as in training; CLIP-T always takes the class word."""

    @classmethod
    def of(cls, run: Run, is_toy: bool) -> TableConfig:
        """The settings a run is measured with, or those of the toy or the paper where there is no run."""
        base = RunConfig.make("toy" if is_toy else "paper", run.config, f"{run.path}/config.yaml").evaluation
        return cls(
            base.samples,
            timesteps=base.timesteps,
            guidance_scale=base.guidance_scale,
            max_new_tokens=base.max_new_tokens,
            judged_as=base.judged_as,
        )


@dataclass
class Place:
    """Where engines come from: the run asked about, the parts of the bare model, device and precision."""

    run: Run
    sources: Sources
    config: TableConfig
    device: str = "auto"
    dtype: str = "auto"
    _bare: list[ModelBundle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dtype = resolved_dtype(self.sources, self.device, self.dtype)  # what is kept by name says which it was

    def baselines(self, texts: Sequence[str]) -> list[Baseline]:
        """One row a text, as `evaluate.baselines` reads them. Raises UserError for one that is no model."""
        return [self._baseline(parse(text, METHODS)) for text in texts]

    def _baseline(self, spec: Spec) -> Baseline:
        if spec.trained:
            return self._trained(spec)
        if spec.kind not in ("ours", "showo-tp", "showo-ip"):
            return baseline(spec, pick_device(self.device), pick_dtype(self.dtype), self.config.max_new_tokens)
        settings = f"{self.config.timesteps} {self.config.guidance_scale} {self.config.max_new_tokens} {self.dtype}"
        parts = (self.sources.model, self.sources.vq, self.sources.tokenizer)
        local = parts if self.sources.model is not None else (str(toy_folder()),)
        weights = f"{self.sources} {' '.join(fingerprint.of_files(part or '') for part in local)}"
        if self.sources.vision is not None:
            weights += f" {self.sources.vision} {fingerprint.of_files(self.sources.vision)}"
        if spec.kind == "ours":
            where = spec.where or (str(self.run.path) if self.run.path is not None else BASE)
            identity = f"ours {where} {_learned(where)} {weights} {settings}"
            if self.config.question_form != "auto":
                identity += f" {self.config.question_form}"
            return Baseline(spec.name, identity, lambda subject: self._ours(where, subject), reasons=True)
        from ..evaluate.baselines.showo import ShowoImage, ShowoText
        from ..rollout.engine import RolloutEngine

        kind = ShowoText if spec.kind == "showo-tp" else ShowoImage

        def load(subject: Subject) -> Model:
            return kind(RolloutEngine.of(self._bare_bundle()), subject, self._sampling())

        return Baseline(spec.name, f"{spec.kind} {weights} {settings}", load, release=self._bare.clear)

    def _ours(self, where: str, subject: Subject) -> Model:
        from ..evaluate.baselines.ours import EngineModel, Expander
        from ..models.published_form import PublishedForm
        from ..rollout.engine import RolloutEngine

        run = Run.find(where.replace("{name}", subject.name))
        bench = run.open(self.sources, self.device, self.dtype, subject.name)
        if bench.concept is not None and bench.concept.name != subject.name:
            raise UserError(f"{run.path}: learned <{bench.concept.name}>, is asked about {subject.sks}")
        tokens: Expander | None = bench.concept
        form = self.config.question_form
        if bench.concept is not None and (form == "unictokens" or (form == "auto" and run.published)):
            tokens = PublishedForm(bench.concept)
        return EngineModel(RolloutEngine.of(bench), tokens, subject, self._sampling())

    def _trained(self, spec: Spec) -> Baseline:
        """A baseline that `baseline train` left, once for each concept where {name} is in its folder."""
        kind, where = method(spec.kind), spec.where
        there = [Path(each) for each in sorted(glob.glob(glob.escape(where).replace("{name}", "*")))]
        found = [Trained.read(folder) for folder in there if (folder / FILE).is_file()]
        first = found[0] if found else None
        if first is not None:
            first.refuse_other(there[0], kind.name)
        digests = " ".join(fingerprint.of_files(folder) for folder in there)
        settings = f"{self.config.timesteps} {self.config.guidance_scale} {self.config.max_new_tokens} {self.dtype}"

        def load(subject: Subject) -> Model:
            folder = Path(where.replace("{name}", subject.name))
            trained = Trained.ready(folder, kind.name, subject.name)
            place = replace(self, sources=Sources.choose(self.sources, trained.sources) if kind.masked else Sources())
            if words := kind.words(folder, trained):
                return place._baseline(parse(words)).load(subject)
            device = pick_device(self.device)
            dtype = pick_dtype(self.dtype, device)
            reading = Reading(folder, trained, self._sampling(), place._open, device, dtype)
            return kind.open(reading, subject)

        return Baseline(
            first.title if first else kind.title,
            f"{kind.name} {fingerprint.digest(digests)[:16]} {settings}",
            load,
            reasons=kind.reasons,
            answers=first.answers if first else kind.answers,
            generates=first.generates if first else kind.generates,
        )

    def _open(self) -> ModelBundle:
        return open_bundle(self.sources, self.device, self.dtype)

    def _bare_bundle(self) -> ModelBundle:
        if not self._bare:
            self._bare.append(self._open())
        return self._bare[0]

    def _sampling(self) -> Sampling:
        return Sampling(self.config.timesteps, self.config.guidance_scale, self.config.max_new_tokens)


def _learned(where: str) -> str:
    """A digest of what the runs at `where` learned, {name} standing for any concept."""
    if where == BASE:
        return ""
    found = sorted(glob.glob(glob.escape(where).replace("{name}", "*")))
    return fingerprint.digest(" ".join(fingerprint.of_files(Run.learned_at(Path(each)) or each) for each in found))[:16]


def make_scorer(
    clip: str | None,
    judge_url: str | None,
    judge_model: str | None,
    key_env: str | None,
    cache: Path,
    device: str = "auto",
    concurrency: int = 8,
    protocol: BenchProtocol = OURS,
    judged_as: str = "class",
) -> Scorer:
    """A scorer from a CLIP model ("toy", or what `OpenClip` takes) and a judge; None leaves either out. `judged_as`:
    what the judge of images reads for the concept's token."""
    embeddings = None if clip is None else embeddings_of(clip, device)
    if judge_url is None and judge_model is None:
        return Scorer(embeddings, protocol=protocol)
    from ..rewards.judge import Judge, JudgeConfig

    if judge_model is None:
        raise UserError("--judge-url needs --judge-model, the model's name at the endpoint")
    config = JudgeConfig(judge_model, judge_url, key_env, cache=str(cache), concurrency=concurrency)
    if protocol.steps:
        config = replace(config, low=min(protocol.steps), high=max(protocol.steps), levels=protocol.steps)
    if protocol.max_tokens:
        config = replace(config, max_tokens=protocol.max_tokens)
    if protocol.temperature is not None:
        config = replace(config, temperature=protocol.temperature)
    name = f"{judge_model} at {judge_url or 'the default endpoint'}"
    return Scorer(embeddings, Judge(config), name, protocol=protocol, judged_as=judged_as)


def embeddings_of(clip: str, device: str = "auto") -> Embeddings:
    """Embeddings by a CLIP model: "toy", or what `OpenClip` takes. Its weights are read when they are first needed."""
    place = pick_device(device)
    if clip == TOY_CLIP:
        return Embeddings(lambda: _toy_encoder(place), "toy", 64, place)
    weights = fingerprint.of_files(clip.partition("=")[2] or clip)
    return Embeddings(OpenClip(clip, place), f"open_clip {clip} {weights}".strip(), device=place)


def _toy_encoder(device: torch.device) -> ImageTextEncoder:
    from ..toy.rewards import load_toy_rewards

    return load_toy_rewards(device=device).nets.image_text
