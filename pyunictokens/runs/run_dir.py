"""A run's folder as commands see it: its settings, what it is about, and the model it ends with.

    config.yaml      every setting, the models, the concept folder; `--config` takes it to do the same again
    about.json       the concept in words, for when its folder is elsewhere
    stages/          the concept stages (train/concept_tokens/stages.py)
    run.json, grpo.yaml, metrics.jsonl, checkpoints/, samples/, final/      reinforcement (train/grpo.py)
    experts.json     images a second that each reward model scored
    concept/         the concept's rows as they are now
    base.json, before.json, after.json, report.html      evaluation; measured.json says of which weights

What is trained and measured is the business of pipeline.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ..config.limits import MAX_SEED, MOST, within
from ..config.settings import convert, from_mapping, load_yaml, save_yaml, to_mapping, with_overrides
from ..config.stages import StageConfig
from ..config.training import GrpoConfig, TrainConfig
from ..data.concept import Concept
from ..data.photographs import of_photographs, toy_on_photographs
from ..evaluate.protocol import protocol_named
from ..evaluate.tasks import wanted_tasks
from ..models.base import owning_rows
from ..models.bundle import ModelBundle, Sources
from ..models.concept_tokens import ConceptTokens, published_epochs
from ..utils.errors import UserError
from ..utils.files import read_json_table, write_json
from .bundle import open_bundle

if TYPE_CHECKING:
    from .context import Parts

BASE = "base"
"""Given where a run is expected: the model as it is, without a concept."""

CONFIG, ABOUT, FINAL, CONCEPT, STAGES = "config.yaml", "about.json", "final", "concept", "stages"
THROUGHPUT, MEASURED = "experts.json", "measured.json"
PARTS = ("stages", "grpo", "evaluation")
"""Parts of a run, as config.yaml names them."""


def files_when_done(grpo: bool, evaluate: bool) -> tuple[str, ...]:
    """Files that are in a run's folder when everything that was asked for is done."""
    files = ("after.json", "report.html") if evaluate else ()
    return (*files, f"{FINAL}/policy.json" if grpo else f"{CONCEPT}/concept.json")


@dataclass(frozen=True)
class Origin:
    """What a config.yaml says beside the settings: of which model and which concept the run is."""

    version: str | None = None
    """Of this library, which wrote it."""
    model: str | None = None
    vq: str | None = None
    tokenizer: str | None = None
    vision: str | None = None
    """The image encoder of Show-o's CLIP-ViT variant, where it was named."""
    rewards: str | Mapping[str, object] | None = None
    clip: str | None = None
    """The CLIP model that evaluation measures with."""
    root: Path | None = None
    """The data folder."""
    name: str | None = None
    """The concept."""
    max_text: int | None = None
    """Text positions of the model's image prompts."""
    preset: str | None = None
    """Which preset the settings stand over."""
    start: str | None = None
    """The run or folder whose tokens it began with."""
    parts: tuple[str, ...] | None = None
    """What was done: some of stages, grpo, evaluation; None (of earlier versions) means all."""

    def __post_init__(self) -> None:
        if strange := [part for part in self.parts or () if part not in PARTS]:
            raise UserError(f"parts: {', '.join(strange)}: must be some of {', '.join(PARTS)}")

    @classmethod
    def of(cls, values: Mapping[str, object], origin: str) -> Origin:
        """The part of a config.yaml that is not settings. Raises UserError naming what cannot be used."""
        own = {key: values[key] for key in OWN_KEYS if key in values}
        for section in (values.get("grpo"), values.get("stages")):  # where older versions read it
            if own.get("max_text") is None and isinstance(section, Mapping) and "max_text" in section:
                own["max_text"] = section["max_text"]
        return from_mapping(cls, own, origin=origin)

    def folder(self, way: str) -> tuple[Path, str]:
        """Root and name of the concept, both said here. Raises UserError with `way`, how to name another place, where
        the folder is not there any more."""
        assert self.root is not None and self.name is not None
        if not (self.root / "concept" / "train" / self.name).is_dir():
            raise UserError(
                f"{self.root}: the folder of {self.name!r} that this run was trained on is no longer there: "
                f"say where it is with {way}"
            )
        return self.root, self.name


OWN_KEYS = tuple(each.name for each in fields(Origin))
"""Keys of config.yaml beside the settings."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How a run is measured."""

    protocol: Literal["ours", "sync-r1"] = "ours"
    """How is asked and scored: ours, or the authors' later public code (docs/evaluation.md)."""
    samples: int = 4
    """Images of each prompt; 0 takes the numbers of a protocol that has its own."""
    timesteps: int = 50
    """MaskGIT timesteps of an image."""
    guidance_scale: float = 5.0
    """Classifier-free guidance of the images."""
    max_new_tokens: int = 100
    """Longest answer."""
    judged_as: Literal["class", "info"] = "class"
    """What the judges of images read for the concept's token: as grpo.judged_as unless it is said here; CLIP-T always
    takes the class word."""
    tasks: tuple[str, ...] = field(default=(), metadata={"was": "splits"})
    """Which tasks of UnifyBench++ are measured; none named means all."""
    base: bool = True
    """Whether a run that learns tokens and reinforces also measures the model that has never seen the concept."""
    seed: int = 1000
    """Seed of the images; the same before and after, so that the two are compared under the same noise."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", wanted_tasks(self.tasks, "tasks"))
        within(0, MAX_SEED, seed=self.seed)
        within(0 if protocol_named(self.protocol).samples else 1, MOST, samples=self.samples)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run can be told."""

    stages: StageConfig
    grpo: GrpoConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @classmethod
    def make(
        cls,
        preset: str,
        values: Mapping[str, object] | None = None,
        origin: str = "settings",
        words: Iterable[str] = (),
        seed: int | None = None,
    ) -> RunConfig:
        """A preset (config/training.py: PRESETS), a mapping over it (a config.yaml), `key=value` words over that.

        `seed`, when given, seeds stages and reinforcement where no word does. Evaluation is judged as training is
        unless its own judged_as is said.
        """
        training = TrainConfig.preset(preset)
        toy = EvaluationConfig(
            samples=8,
            timesteps=training.grpo.timesteps,
            guidance_scale=training.grpo.guidance_scale,
            max_new_tokens=24,
        )
        base = cls(training.stages, training.grpo, toy if preset == "toy" else EvaluationConfig())
        settings = {key: value for key, value in (values or {}).items() if key not in OWN_KEYS}
        words = list(words)
        made = from_mapping(cls, settings, base=base, origin=origin)
        if seed is not None:
            made = replace(made, stages=replace(made.stages, seed=seed), grpo=replace(made.grpo, seed=seed))
        made = with_overrides(made, words)
        section = settings.get("evaluation")
        said = isinstance(section, Mapping) and "judged_as" in section
        if said or any(word.partition("=")[0].strip() == "evaluation.judged_as" for word in words):
            return made
        return replace(made, evaluation=replace(made.evaluation, judged_as=made.grpo.judged_as))

    def asked_as(self, published: bool, learns: bool) -> RunConfig:
        """The same with grpo.question_form=auto settled: the form that the stages teach where they run (`learns`), else
        that of the tokens the run begins with (`published`: of UniCTokens' form)."""
        taught = self.stages.question_form == "unictokens" if learns else published
        if self.grpo.question_form != "auto" or not taught:
            return self
        return replace(self, grpo=replace(self.grpo, question_form="unictokens"))


@dataclass
class Run:
    """A folder that `train` wrote, or anything else that a concept can be read from. `path` None is the bare model."""

    path: Path | None
    config: Mapping[str, object] = field(default_factory=dict)
    """The table in its config.yaml."""
    facts: tuple[str, ...] = ()
    """The concept's facts, as the run was told them."""

    @classmethod
    def find(cls, given: str) -> Run:
        """The run, concept or published folder `given`, or the bare model. Raises UserError for anything else."""
        if given == BASE:
            return cls(None)
        path = Path(given).expanduser()
        if not path.is_dir():
            raise UserError(f"{given}: no such folder; give a run that `train` wrote, or `{BASE}` for the bare model")
        run = cls(path)
        if run._learned() is None:
            started = (path / CONFIG).is_file()
            hint = "not finished, go on with `train … --resume`" if started else "nothing was learned here"
            raise UserError(f"{path}: {hint} (no policy.json, no concept.json, no epoch_*_embed.pt)")
        run.config = load_yaml(path / CONFIG) if (path / CONFIG).is_file() else {}
        about = read_json_table(path / ABOUT) if (path / ABOUT).is_file() else {}
        facts = convert(about.get("extra_info", []), tuple[str, ...], f"{path / ABOUT}: extra_info")
        run.facts = cast("tuple[str, ...]", facts)
        return run

    @property
    def origin(self) -> Origin:
        """Of which model and concept the run is."""
        return Origin.of(self.config, f"{self.path or BASE}/{CONFIG}")

    def _learned(self) -> Path | None:
        """The folder that holds what was learned, the furthest first."""
        assert self.path is not None
        return self.learned_at(self.path)

    @staticmethod
    def learned_at(path: Path) -> Path | None:
        """The folder under `path` that holds what was learned, the furthest first; None where nothing was."""
        for folder in (path / FINAL, path, path / CONCEPT):
            if (folder / "policy.json").is_file() or (folder / "concept.json").is_file():
                return folder
        return path if published_epochs(path) else None

    @property
    def published(self) -> bool:
        """Whether its tokens were taught UniCTokens' form of questions: by its own code, or by our stages or our
        reinforcement set to it."""
        stages, grpo = self.config.get("stages"), self.config.get("grpo")
        form = grpo.get("question_form") if isinstance(grpo, Mapping) else None
        if form in ("ours", "unictokens"):
            return form == "unictokens"
        if isinstance(stages, Mapping) and stages.get("question_form") == "unictokens":
            return True
        learned = self._learned() if self.path is not None else None
        return learned is not None and not any(
            (place / name).is_file()
            for place in (learned / CONCEPT, learned)
            for name in ("concept.json", "policy.json")
        )

    def sources(self, flags: Sources) -> Sources:
        """The models that flags name, else those the run was made with."""
        return Sources.choose(flags, self.origin)

    def open(self, flags: Sources, device: str, dtype: str, name: str | None = None) -> ModelBundle:
        """The model, brought to what the run learned. `name` is needed for published tokens."""
        bench = open_bundle(self.sources(flags), device, dtype, self.origin.max_text)
        folder = self._learned() if self.path is not None else None
        if folder is not None and (folder / "policy.json").is_file():
            from ..train.policy import load_policy

            load_policy(bench.model, folder)
        elif folder is not None:
            owning_rows(bench.model).attach(self.concept_tokens(name).to(bench.device))
        return bench

    def concept_tokens(self, name: str | None = None) -> ConceptTokens:
        """The concept's rows alone. `name` is needed for published tokens."""
        folder = self._learned() if self.path is not None else None
        if folder is None:
            raise UserError(f"`{BASE}` holds no concept tokens: give a run or a folder of concept tokens")
        for place in (folder / CONCEPT, folder):
            if (place / "concept.json").is_file():
                return ConceptTokens.load(place)
        if name is None:
            raise UserError(f"{folder}: published tokens do not say what they are called: give --name")
        return ConceptTokens.load_published(folder, name)

    def concept_folder(self, given: tuple[Path, str] | None) -> tuple[Path, str]:
        """The concept folder named, else the one the run was made from. Raises UserError when there is none."""
        if given is not None:
            return given
        origin = self.origin
        if origin.root is not None and origin.name is not None:
            return origin.folder(f"--concept ROOT {origin.name}")
        raise UserError("which concept? Name its folder with --concept ROOT NAME")


def write_description(
    out: Path,
    sources: Sources,
    rewards: str | Mapping[str, object] | None,
    max_text: int,
    concept: Concept,
    config: RunConfig,
    parts: Parts,
    clip: str | None = None,
) -> None:
    """Write config.yaml and about.json of a run."""
    from .. import __version__

    own = {
        "version": __version__,
        "model": sources.model,
        "vq": sources.vq,
        "tokenizer": sources.tokenizer,
        **({"vision": sources.vision} if sources.vision is not None else {}),
        "rewards": dict(rewards) if isinstance(rewards, Mapping) else rewards,
        **({"clip": clip} if clip is not None else {}),
        "root": str(concept.root.absolute()),
        "name": concept.name,
        "max_text": max_text,
        "start": str(Path(parts.start_from).absolute()) if parts.start_from is not None else None,
        "parts": [name for name, done in zip(PARTS, (parts.stages, parts.grpo, parts.evaluate), strict=True) if done],
    }
    words = ("name", "kind", "class_word", "info", "extra_info")
    about = {word: getattr(concept, word) for word in words}
    if sources.is_toy and of_photographs(concept):
        about["caution"] = toy_on_photographs("DATA", concept.name)
    write_json(out / ABOUT, about)
    # last: where config.yaml is, a run is, whenever it was cut off
    save_yaml(out / CONFIG, {**own, **to_mapping(config)})
