"""A run's folder as commands see it: its settings, what it is about, and the model it ends with.

    config.yaml      every setting, the models, the concept folder; `--config` takes it to do the same again
    about.json       the concept in words, for when its folder is elsewhere
    stages/          the concept stages (train/concept_tokens/stages.py)
    run.json, grpo.yaml, metrics.jsonl, checkpoints/, samples/, final/      reinforcement (train/grpo.py)
    experts.json     drawings a second that each reward expert scored
    concept/         the concept's rows as they are now
    base.json, before.json, after.json, report.html      evaluation; measured.json says of which weights

What is trained and measured is the business of pipeline.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..config.settings import from_mapping, load_yaml, to_mapping, with_overrides
from ..config.training import GrpoConfig, StageConfig, TrainConfig
from ..data.concept import Concept
from ..models.concept_tokens import ConceptTokens, published_epochs
from ..utils.errors import UserError
from ..utils.files import read_json, write_json, write_text_atomic
from .bundle import Sources, Workbench, open_workbench

BASE = "base"
"""Given where a run is expected: the model as it is, without a concept."""

CONFIG, ABOUT, FINAL, CONCEPT, STAGES = "config.yaml", "about.json", "final", "concept", "stages"
EXPERTS, MEASURED = "experts.json", "measured.json"

OWN_KEYS = ("version", "model", "vq", "tokenizer", "rewards", "root", "name", "max_text", "preset")
"""Keys of config.yaml beside the settings."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How a run is measured."""

    samples: int = 4
    """Drawings of each prompt."""
    timesteps: int = 50
    """MaskGIT timesteps of a drawing."""
    guidance_scale: float = 5.0
    """Classifier-free guidance of the drawings."""
    max_new_tokens: int = 100
    """Longest answer."""
    judged_as: Literal["class", "info"] = "class"
    """What the ensemble's judges of images read for the concept's token, as in training; CLIP-T always takes the class
    word."""
    splits: tuple[str, ...] = ()
    """Which splits of UnifyBench++ are measured; none named means all."""
    seed: int = 1000
    """Seed of the drawings; the same before and after, so that the two are compared under the same noise."""


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
        values: Mapping[str, Any] | None = None,
        origin: str = "settings",
        words: Iterable[str] = (),
        seed: int | None = None,
    ) -> RunConfig:
        """A preset (config/training.py: PRESETS), a mapping over it (a config.yaml), `key=value` words over that.

        `seed`, when given, seeds stages and reinforcement where no word does.
        """
        training = TrainConfig.preset(preset)
        toy = EvaluationConfig(
            samples=4,
            timesteps=training.grpo.timesteps,
            guidance_scale=training.grpo.guidance_scale,
            max_new_tokens=24,
            judged_as=training.grpo.judged_as,
        )
        base = cls(training.stages, training.grpo, toy if preset == "toy" else EvaluationConfig())
        settings = {key: value for key, value in (values or {}).items() if key not in OWN_KEYS}
        made = from_mapping(cls, settings, base=base, origin=origin)
        if seed is not None:
            made = replace(made, stages=replace(made.stages, seed=seed), grpo=replace(made.grpo, seed=seed))
        return with_overrides(made, words)

    def with_max_text(self, max_text: int) -> RunConfig:
        """This, with the model's own `max_text` where none is set."""
        stages = replace(self.stages, max_text=self.stages.max_text or max_text)
        return replace(self, stages=stages, grpo=replace(self.grpo, max_text=self.grpo.max_text or max_text))


@dataclass
class Run:
    """A folder that `train` wrote, or anything else that a concept can be read from. `path` None is the bare model."""

    path: Path | None
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, given: str) -> Run:
        """The run, concept or published folder `given`, or the bare model. Raises UserError for anything else."""
        if given == BASE:
            return cls(None)
        path = Path(given)
        if not path.is_dir():
            raise UserError(f"{given}: no such folder; give a run that `train` wrote, or `{BASE}` for the bare model")
        run = cls(path)
        if run._learned() is None:
            started = (path / CONFIG).is_file()
            hint = "not finished, go on with `train … --resume`" if started else "nothing was learned here"
            raise UserError(f"{path}: {hint} (no policy.json, no concept.json, no epoch_*_embed.pt)")
        run.config = load_yaml(path / CONFIG) if (path / CONFIG).is_file() else {}
        run.about = read_json(path / ABOUT) if (path / ABOUT).is_file() else {}
        return run

    def _learned(self) -> Path | None:
        """The folder that holds what was learned, the furthest first."""
        assert self.path is not None
        for folder in (self.path / FINAL, self.path, self.path / CONCEPT):
            if (folder / "policy.json").is_file() or (folder / "concept.json").is_file():
                return folder
        return self.path if published_epochs(self.path) else None

    def sources(self, flags: Sources) -> Sources:
        """The models that flags name, else those the run was made with."""
        return Sources.choose(flags, self.config)

    def open(self, flags: Sources, device: str, dtype: str, name: str | None = None) -> Workbench:
        """The model, brought to what the run learned. `name` is needed for published tokens."""
        max_text = self.config.get("max_text")
        bench = open_workbench(self.sources(flags), device, dtype, int(max_text) if max_text else None)
        folder = self._learned() if self.path is not None else None
        if folder is not None and (folder / "policy.json").is_file():
            from ..train.policy import load_policy

            load_policy(bench.model, folder)
        elif folder is not None:
            bench.model.attach(self.concept_tokens(name).to(bench.device))
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
        if "root" in self.config and "name" in self.config:
            return Path(str(self.config["root"])), str(self.config["name"])
        raise UserError("which concept? Name its folder with --concept ROOT NAME")


def write_description(
    out: Path,
    sources: Sources,
    rewards: str | Mapping[str, Any] | None,
    max_text: int,
    concept: Concept,
    config: RunConfig,
) -> None:
    """Write config.yaml and about.json of a run."""
    import yaml

    from .. import __version__

    own = {
        "version": __version__,
        "model": sources.model,
        "vq": sources.vq,
        "tokenizer": sources.tokenizer,
        "rewards": dict(rewards) if isinstance(rewards, Mapping) else rewards,
        "root": str(concept.root.absolute()),
        "name": concept.name,
        "max_text": max_text,
    }
    words = ("name", "kind", "class_word", "info", "extra_info")
    write_json(out / ABOUT, {word: getattr(concept, word) for word in words})
    # last: where config.yaml is, a run is, whenever it was cut off
    write_text_atomic(out / CONFIG, yaml.safe_dump({**own, **to_mapping(config)}, sort_keys=False, allow_unicode=True))
