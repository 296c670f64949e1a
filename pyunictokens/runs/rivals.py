"""The rivals of the paper's tables as pieces of work: which baselines a table trains, and what is there of them.

    OUT/rivals/KEY/NAME/      a baseline on a concept, as `baseline train` leaves it

A rival that cannot be trained here (weights that are not on this machine, a file that was not given) is left out of the
table and named with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..baselines.base import FILE, Job, Method, Settings, Trained, run
from ..baselines.registry import METHODS, method
from ..data.concept import Concept
from ..models.bundle import Sources
from ..utils.errors import MissingExtra, UserError
from ..utils.progress import NO_NUMBERS, Numbers, Progress
from ..utils.signals import Stop
from .baseline_jobs import make_job, settings_of
from .paper_numbers import NUMBERS


@dataclass(frozen=True)
class Rival:
    """A row that a baseline fills."""

    key: str
    """Its folder, and what its words are called by: KEY.steps=10."""
    method: str
    paper: str = ""
    """The row of the paper that it stands beside."""
    words: tuple[str, ...] = ()
    """Settings that make it what it is."""
    quick: tuple[str, ...] = ("steps=2",)
    """Settings of a trial that only shows that all works."""


_FEW = ("steps=2", "batch=2", "prior_images=2", "prior_timesteps=2")
TOY = (
    Rival("textual-inversion", "showo-textual-inversion", "Text inversion", quick=("steps=2", "batch=2")),
    Rival("dreambooth", "showo-dreambooth", "DreamBooth (SD)", quick=_FEW),
    Rival("dreambooth-lora", "showo-dreambooth", "DreamBooth (SD)", ("trainable=lora", "lr=1e-3"), _FEW),
    Rival("yochameleon", "showo-yochameleon", "Yo'Chameleon", quick=("steps=2", "images=2", "questions=2")),
)
"""On the embedded toy: each rival's recipe on the toy's Show-o."""

PAPER = (
    Rival("gpt-tp", "gpt-tp", "GPT-4o+TP"),
    Rival("gpt-ip", "gpt-ip", "GPT-4o+IP"),
    Rival("yollava", "yollava", "Yo'LLaVA"),
    Rival("mcllava", "mcllava", "MC-LLaVA"),
    Rival("rap", "rap", "RAP-MLLM"),
    Rival("llava-tp", "llava-tp", "LLaVA+TP"),
    Rival("qwen-tp", "qwen-tp", "Qwen2.5-VL+TP"),
    Rival("yollava-phi", "yollava-phi", "Yo'LLaVA(Phi-1.5)"),
    Rival("textual-inversion", "textual-inversion", "Text inversion"),
    Rival("dreambooth", "dreambooth", "DreamBooth (SD)"),
    Rival("chameleon-tp", "chameleon-tp", "Chameleon+TP"),
    Rival("chameleon-ip", "chameleon-ip", "Chameleon+IP"),
    Rival("yochameleon", "yochameleon", "Yo'Chameleon"),
)
"""With real weights: each on the model of its publication."""


def rivals_of(table: str, toy: bool) -> list[Rival]:
    """The rivals of a table: those whose row the paper prints in it, of the methods that are there."""
    found = TOY if toy else PAPER
    return [rival for rival in found if rival.paper in NUMBERS[table] and rival.method in METHODS]


@dataclass
class Entry:
    """A rival with its settings and, on each concept, its job."""

    rival: Rival
    method: Method[Settings]
    settings: Settings
    jobs: dict[str, Job[Settings]] = field(default_factory=dict)
    refused: str = ""
    """Why it cannot be trained here."""
    minutes_unknown: bool = False
    flops: float = 0.0
    """Operations of what is not done."""

    @property
    def title(self) -> str:
        """What its row is called."""
        return self.method.row(self.settings)

    @property
    def done(self) -> list[str]:
        """Concepts that it has learned."""
        return [name for name, job in self.jobs.items() if is_done(job.folder)]


def is_done(folder: Path) -> bool:
    """Whether a baseline's training in `folder` is finished."""
    return (folder / FILE).is_file() and Trained.read(folder).done


def folder_of(out: Path, rival: Rival, name: str = "{name}") -> Path:
    """The folder of a rival on a concept."""
    return out / "rivals" / rival.key / name


def enter(
    rivals: Iterable[Rival],
    out: Path,
    concepts: Sequence[Concept],
    named: Sources,
    words: Sequence[str] = (),
    *,
    draws_only: bool = False,
    quick: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    clip: str | None = None,
) -> list[Entry]:
    """The rivals with their jobs and what is still to do; `words` are KEY.SETTING=VALUE, of which those of other rivals
    are left alone. Trains and loads nothing.

    draws_only: the table asks for images alone, so a rival that draws none is refused.

    Raises UserError for words that name no setting of their rival.
    """
    entries = []
    for rival in rivals:
        kind = method(rival.method)
        own = [word.removeprefix(f"{rival.key}.") for word in words if word.startswith(f"{rival.key}.")]
        models = named if kind.masked else Sources()
        settings = settings_of(kind, models, [*rival.words, *(rival.quick if quick else ()), *own])
        entry = Entry(rival, kind, settings)
        if draws_only and not kind.abilities(settings)[1]:
            entry.refused = "draws no images, and this table asks for nothing else"
        for concept in concepts:
            folder = folder_of(out, rival, concept.name)
            job = make_job(
                kind,
                concept,
                folder,
                models,
                settings,
                device=device,
                dtype=dtype,
                clip=clip,
                resume=(folder / FILE).is_file(),
            )
            entry.jobs[concept.name] = job
            if not is_done(folder) and not entry.refused:
                _look_ahead(entry, job)
        entries.append(entry)
    return entries


def _look_ahead(entry: Entry, job: Job[Settings]) -> None:
    """Add what a job still takes, or why it cannot be done."""
    try:
        planned = entry.method.plan(job)
    except (UserError, MissingExtra) as error:
        entry.refused = str(error)
        return
    lacking = [*(f"to fetch first: {each}" for each in planned.downloads), *planned.needs]
    entry.refused = entry.refused or "; ".join(lacking)
    entry.flops += planned.flops
    entry.minutes_unknown |= bool(planned.steps and not planned.flops)


def train_all(entries: Iterable[Entry], progress: Progress, stop: Stop) -> list[str]:
    """Train what is not done; returns KEY/NAME: REASON of what could not be. Raises Stopped where `stop` says so."""
    failed = []
    for entry in entries:
        for name, job in entry.jobs.items():
            if is_done(job.folder) or entry.refused:
                continue
            job.progress, job.stop = _named(progress, f"{entry.title}, {name}"), stop
            try:
                run(entry.method, job)
            except UserError as error:
                failed.append(f"{entry.rival.key}/{name}: {error}")
    return failed


def _named(progress: Progress, about: str) -> Progress:
    """`progress` with `about` before what it tells."""

    def tell(what: str, done: int, wanted: int, numbers: Numbers = NO_NUMBERS, /) -> None:
        progress(f"{about}: {what}", done, wanted, numbers)

    return tell
