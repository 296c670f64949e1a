"""Every kind of reward model, by the name that settings give it: its label, its settings, the weight files it wants.

    @register("contrast", label="Contrast", judges_previews=True)
    class Contrast:
        def score(self, batch): ...

is all that a new reward model needs: settings (`rewards: {models: {contrast: {…}}}`), `doctor --weights`, the labels of
the report and DSOG's choice of a judge read this registry. A file of this package is named once more in `_MODULES`, so
that it is found; your own is found by its class (``use: MODULE:CLASS``).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from ..config.settings import from_mapping
from ..models.weight_files import WeightFiles, WeightStatus, status_of
from ..utils.errors import UserError
from .base import Device, JudgesPreviews, PreviewJudge, PreviewScorer, RewardBatch, RewardModel

_MODULES = (
    "experts.tier",
    "experts.ber",
    "experts.der",
    "experts.fer",
    "judge",
    "experts.clip",
    "experts.pickscore",
    "experts.likeness",
    "experts.objects",
    "experts.ocr",
    "experts.plain",
    "experts.maths",
    "experts.preference",
)
"""Files that register reward models, in the order in which reports show them."""

C = TypeVar("C", bound=type)


class _FromSettings(Protocol):
    @classmethod
    def from_settings(cls, settings: object, device: Device) -> RewardModel: ...


@dataclass(frozen=True)
class Registered:
    """One kind of reward model."""

    name: str
    """What settings and logs call it."""
    kind: type
    label: str
    """What the report calls it."""
    settings: type | None
    """Dataclass of its settings, for `kind.from_settings(settings, device)`; None: `kind(**settings)`."""
    files: WeightFiles | None
    """The weight files it wants; None where it needs none."""
    judges_previews: bool
    """Whether DSOG may ask it: its score depends on image and prompt alone."""
    asks_others: bool
    """Whether it sends images to an address that its settings name: they must then be trusted."""

    def build(self, options: Mapping[str, object], device: Device, origin: str) -> RewardModel:
        """The reward model of these settings. Raises UserError naming the setting that cannot be used."""
        if self.settings is None:
            return call(self.kind, options, device, origin)
        settings: object = from_mapping(self.settings, options, origin=origin)
        return cast("type[_FromSettings]", self.kind).from_settings(settings, device)


_known: dict[str, Registered] = {}


def register(
    name: str,
    *,
    label: str | None = None,
    settings: type | None = None,
    files: WeightFiles | None = None,
    judges_previews: bool = False,
    asks_others: bool = False,
) -> Callable[[C], C]:
    """Class decorator: the class is the reward model that settings call `name`.

    label: its name in the report, by default `name`. settings: a dataclass; the class then has
    ``from_settings(settings, device)``, else it is called with its settings as keywords, and `device` where it takes
    one. files: the weights it wants. judges_previews: its `score` (or `preview_scorer`, if it has one) may judge the
    early previews of DSOG; its score must then depend on image and prompt alone. asks_others: it sends images to an
    address that its settings name, so settings that came with somebody's run are refused until they are trusted.
    """

    def note(kind: C) -> C:
        before = _known.get(name)
        if before is not None and _path(before.kind) != _path(kind):
            raise UserError(f"reward model {name!r}: already registered by {_path(before.kind)}: choose another name")
        _known[name] = Registered(name, kind, label or name, settings, files, judges_previews, asks_others)
        return kind

    return note


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def registered() -> dict[str, Registered]:
    """All kinds that are known here, by name."""
    for module in _MODULES:
        importlib.import_module(f".{module}", __package__)
    order = {entry.name: place for place, entry in enumerate(_known.values())}
    first = {f"{__package__}.{module}": place for place, module in enumerate(_MODULES)}
    return dict(sorted(_known.items(), key=lambda item: (first.get(item[1].kind.__module__, 99), order[item[0]])))


def labels() -> dict[str, str]:
    """What the report calls each reward model, by name, in the order of the report."""
    return {name: entry.label for name, entry in registered().items()}


def kind_of(model: object) -> Registered | None:
    """The registered kind of a reward model, or of the class it inherits from; None for one that is not registered."""
    for base in type(model).__mro__:
        for entry in _known.values():
            if entry.kind is base:
                return entry
    return None


def preview_judge(models: Mapping[str, RewardModel]) -> PreviewJudge | None:
    """The judge of DSOG's previews: the first of `models` that is registered for it, or brings a scorer of its own."""
    for model in models.values():
        entry = kind_of(model)
        if isinstance(model, JudgesPreviews):
            return model.preview_scorer
        if entry is not None and entry.judges_previews:
            return _by_score(model)
    return None


def _by_score(model: RewardModel) -> PreviewJudge:
    """A judge that asks for the score of a preview and its prompt."""

    def judge(prompts: Sequence[str], /) -> PreviewScorer:
        words = list(prompts)
        return lambda pixels, index: model.score(RewardBatch(pixels.clamp(-1, 1), [words[i] for i in index.tolist()]))

    return judge


def call(kind: Callable[..., object], options: Mapping[str, object], device: Device, origin: str) -> RewardModel:
    """A class or function of one's own, called with its settings and, where it takes one, the device."""
    try:
        parameters = inspect.signature(kind).parameters
        takes = "device" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    except ValueError:  # a class written in C that does not say
        takes = False
    try:
        made = kind(**options, **({"device": device} if takes else {}))
    except TypeError as error:
        raise UserError(f"{origin}: {kind.__name__}({', '.join(options)}) cannot be called: {error}") from error
    if not isinstance(made, RewardModel):
        raise UserError(f"{origin}: a {type(made).__name__} is no reward model: it needs score(batch) -> Tensor [R]")
    return made


def weight_status(paths: Mapping[str, str] | None = None) -> list[WeightStatus]:
    """For each reward model that wants weights: where they are looked for, whether they are whole, how to get them.

    paths: folder or hub id by name, for those to look for; None looks for all of them, in the folders that the examples
    use and in the hub's local cache.
    """
    wanted = {name: entry.files for name, entry in registered().items() if entry.files is not None}
    return [
        status_of(name, files, None if paths is None else paths[name])
        for name, files in wanted.items()
        if paths is None or name in paths
    ]
