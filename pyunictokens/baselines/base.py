"""What every method has: what it is told (`Job`), what it will cost (`Plan`), and what its folder says (`Trained`).

    DIR/baseline.json       method, concept, settings, models, and whether it is done
    DIR/metrics.jsonl       a line a step
    DIR/…                   what was learned, as the method saves it

A method is a subclass of :class:`Method` with its name in registry.py. It is handed what it needs of the
command line, of tables and of model bundles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..config.limits import MAX_SEED, MOST, above, at_least, within
from ..config.settings import from_mapping, to_mapping
from ..data.concept import Concept
from ..evaluate.baselines.ours import Sampling
from ..evaluate.clip import Embeddings
from ..evaluate.core import Model
from ..evaluate.tasks import Subject
from ..models.bundle import ModelBundle, Sources
from ..models.showo.costs import ShowoCosts
from ..utils.errors import UserError
from ..utils.files import folder_lock, read_json, sweep, write_json
from ..utils.progress import Progress, silent
from ..utils.signals import Stop, never

FILE = "baseline.json"


class Settings(Protocol):
    """What the settings of every method have: a frozen dataclass with these two fields among others."""

    @property
    def seed(self) -> int:
        """Seed of starting values, order of data and noise."""
        ...

    @property
    def save_every(self) -> int:
        """Steps between checkpoints; 0 writes one only where training is asked to stop."""
        ...


S = TypeVar("S", bound=Settings)
S_co = TypeVar("S_co", bound=Settings, covariant=True)


@dataclass(frozen=True)
class BaselineSettings:
    """A base for the settings of a method; its subclass adds its own."""

    seed: int = 0
    """Seed of starting values, order of data and noise."""
    save_every: int = 50
    """Steps between checkpoints; 0 writes one only where training is asked to stop."""

    def __post_init__(self) -> None:
        within(0, MAX_SEED, seed=self.seed)
        within(0, MOST, save_every=self.save_every)


@dataclass(frozen=True)
class PhotoSettings(BaselineSettings):
    """A base for the methods that learn photos for a number of steps (`loop.learn_photos`)."""

    steps: int = 3000
    """Optimizer steps."""
    lr: float = 5e-4
    """AdamW's learning rate."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_grad_norm: float | None = None
    """Gradients are clipped to this length; null leaves them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, steps=self.steps)
        at_least(0, weight_decay=self.weight_decay)
        above(0, lr=self.rate, max_grad_norm=1.0 if self.max_grad_norm is None else self.max_grad_norm)

    @property
    def rate(self) -> float:
        """The learning rate that is meant."""
        return self.lr


@dataclass
class Job(Generic[S_co]):
    """One method on one concept."""

    concept: Concept
    folder: Path
    """Where everything is left."""
    settings: S_co
    sources: Sources = field(default_factory=Sources)
    """The models as they were named: `sources.model` is a folder, hub id or word. A method of another architecture than
    ours reads `model` alone."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    open_bundle: Callable[[], ModelBundle] | None = None
    """Opens the masked model of `sources` on `device`, for the methods that train one."""
    costs: ShowoCosts | None = None
    """What that masked model's parts cost, for a plan."""
    find_faces: Callable[[], Callable[[Tensor], Tensor] | None] = lambda: None
    """Gives what makes face embeddings of pixels [M, 3, H, W] in [-1, 1], or None: a person's tokens may start from
    them."""
    embeddings: Callable[[], Embeddings] | None = None
    """Makes the CLIP model that pictures are ranked with, where one was named; the toy has its own."""
    resume: bool = False
    progress: Progress = silent
    stop: Stop = never
    """Asked between steps."""

    def bundle(self) -> ModelBundle:
        """The masked model with its tokenizers."""
        if self.open_bundle is None:
            raise UserError("this method trains a masked model, and none can be opened here")
        return self.open_bundle()


@dataclass(frozen=True)
class Plan:
    """What training one concept takes, told before anything starts."""

    steps: int
    flops: float = 0.0
    """Operations of all steps; 0 where they cannot be known before the model is here."""
    memory: int = 0
    """Bytes that weights, gradients and the optimizer need; activations are not in it. 0: not known."""
    downloads: tuple[str, ...] = ()
    """What is not on this machine yet."""
    needs: tuple[str, ...] = ()
    """What else has to be given first: extras, files, keys."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """What a folder says of what was learned there: baseline.json."""

    method: str
    title: str
    """What its row is called."""
    concept: str
    root: str
    settings: Mapping[str, object]
    model: str | None = None
    vq: str | None = None
    tokenizer: str | None = None
    vision: str | None = None
    version: str = ""
    answers: bool = True
    generates: bool = True
    done: bool = False
    facts: Mapping[str, object] = field(default_factory=dict)
    """What the method wants to remember: steps, trained numbers, words of prompts."""

    @property
    def sources(self) -> Sources:
        """The models it was trained with."""
        return Sources(self.model, self.vq, self.tokenizer, self.vision)

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        write_json(folder / FILE, to_mapping(self))

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """What `folder` says. Raises UserError for one that `baseline train` did not write."""
        if not (folder / FILE).is_file():
            raise UserError(f"{folder}: holds no {FILE}: give a folder that `pyunictokens baseline train` wrote")
        return from_mapping(cls, read_json(folder / FILE), origin=str(folder / FILE))

    def refuse_other(self, folder: Path, method: str) -> None:
        """Raise UserError where another method than `method` left it in `folder`."""
        if self.method != method:
            raise UserError(f"{folder}: was trained by {self.method}, not by {method}: name it {self.method}:{folder}")

    @classmethod
    def ready(cls, folder: Path, method: str, concept: str) -> Trained:
        """:meth:`read`, of a finished training of this method on this concept, else UserError."""
        found = cls.read(folder)
        found.refuse_other(folder, method)
        if found.concept != concept:
            raise UserError(f"{folder}: learned <{found.concept}>, is asked about <{concept}>")
        if not found.done:
            raise UserError(f"{folder}: training is not finished: go on with the same command and --resume")
        return found


@dataclass(frozen=True)
class Reading:
    """What a table gives to a method whose model is to be asked."""

    folder: Path
    trained: Trained
    sampling: Sampling
    open_bundle: Callable[[], ModelBundle]
    """The masked model that the method was trained with, for itself alone."""
    device: torch.device
    dtype: torch.dtype


class Method(ABC, Generic[S]):
    """A way to teach a model one concept."""

    name: ClassVar[str]
    """As the command line has it."""
    title: ClassVar[str]
    """As the paper's tables have it."""
    about: ClassVar[str]
    """One line of what it learns."""
    settings: ClassVar[type[Settings]]
    """Its settings (:class:`Settings`), whose defaults are the published recipe."""
    masked: ClassVar[bool] = False
    """Whether it trains a masked model of ours: --vq and --tokenizer belong to it, and no --model means the toy."""
    model: ClassVar[str] = ""
    """What its publication trained, where it is none of ours: the default of --model."""
    answers: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    """Whether anything is learned; a model that is only told about the concept learns nothing."""
    reasons: ClassVar[bool] = False
    """Whether a table lets it answer first which fact a prompt means (`evaluate.core.Baseline.reasons`)."""

    def defaults(self, toy: bool) -> S:
        """The settings to start from: the published recipe, or what fits the embedded toy."""
        return cast(S, self.settings())

    def named(self, job: Job[S]) -> Job[S]:
        """`job` with the model that the publication trained, where none is named."""
        if job.sources.model is not None:
            return job
        return replace(job, sources=replace(job.sources, model=self.model))

    def row(self, settings: S) -> str:
        """What the row of a training with these settings is called; where they change the method, it says so."""
        return self.title

    def abilities(self, settings: S) -> tuple[bool, bool]:
        """Whether a training with these settings answers, and whether it generates images."""
        return self.answers, self.generates

    @abstractmethod
    def plan(self, job: Job[S]) -> Plan:
        """What :meth:`train` will take. Loads no weights."""

    @abstractmethod
    def train(self, job: Job[S]) -> Mapping[str, object]:
        """Learn the concept and leave what was learned in `job.folder`; returns the facts to remember (`Trained`).

        With `job.resume` it goes on where it stopped and ends as if it never had. Raises UserError for data or weights
        that it cannot use, Stopped where `job.stop` says so.
        """

    def words(self, folder: Path, trained: Trained) -> str:
        """How a table can ask the result in words that it knows already (`ours:…`, `diffusers:…`); "" where
        :meth:`open` is to be asked for the model."""
        return ""

    def open(self, reading: Reading, subject: Subject) -> Model:
        """The trained model, ready for its concept; for methods without :meth:`words`."""
        raise UserError(f"{self.name}: cannot be asked")


def run(method: Method[S], job: Job[S]) -> Trained:
    """Train one concept and leave a folder that tables read. A finished one is taken as it is with `job.resume`.

    Raises UserError for a folder that holds something already (without `job.resume`) or something else (with it), and
    as the method does; Stopped where `job.stop` says so.
    """
    from .. import __version__

    folder, concept, named = job.folder, job.concept, job.sources
    about = Trained(
        method.name,
        method.row(job.settings),
        concept.name,
        str(concept.root.absolute()),
        to_mapping(job.settings),
        named.model,
        named.vq,
        named.tokenizer,
        named.vision,
        __version__,
        *method.abilities(job.settings),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, ".baseline.lock"):
        sweep(folder)
        if (folder / FILE).is_file():
            before = Trained.read(folder)
            if not job.resume:
                raise UserError(
                    f"{folder}: already holds a baseline: go on with it (--resume) or choose another folder"
                )
            known = to_mapping(type(job.settings)())
            if _compared(before, known) != _compared(about, known):
                raise UserError(
                    f"{folder}: holds {before.method} on <{before.concept}> with other settings or models than asked "
                    f"for ({folder / FILE}): choose another folder"
                )
            if before.done:
                return before
        else:
            about.save(folder)
        facts = method.train(job)
        done = replace(about, done=True, facts=dict(facts))
        done.save(folder)
    return done


_ALTERS_NOTHING = ("save_every",)


def _compared(trained: Trained, known: Mapping[str, object]) -> dict[str, object]:
    """What must be the same for a training to go on. Settings that an older version did not know are as in `known`."""
    settings = {key: value for key, value in {**known, **trained.settings}.items() if key not in _ALTERS_NOTHING}
    told = {**to_mapping(trained), "settings": settings}
    for word in ("version", "done", "facts", "root"):
        del told[word]
    return told
