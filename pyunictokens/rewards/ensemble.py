"""The reward of the paper: a weighted sum of reward models, weights by the concept's kind (equations 12 and 13).

    Reward = w₁·TIER + w₂·BER + w₃·DER + w₄·FER,   w = (0.4, 0.3, 0.3, 0) for animals and objects,
                                                   w = (0.4, 0.2, 0.2, 0.2) for humans

Every model's value is kept beside the sum. One that fails ends the run with an error that names it and the image. A
number that is not finite is noted (`EnsembleScore.invalid`), and the step is left out: a reward made up in its place
would be trained on. Where the networks run is decided in placement.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..utils.errors import UserError
from .base import (
    KINDS,
    CountsAbsent,
    Device,
    EmbedsFaces,
    EnsembleScore,
    FaceEmbedding,
    InvalidScore,
    PreviewJudge,
    RewardBatch,
    RewardModel,
    Rewards,
    shape_of,
)
from .functions import RewardFunction
from .names import named, short_name
from .placement import Placement
from .registry import kind_of, preview_judge

Weights = Mapping[str, object]
"""``{name: weight}`` for every kind alike, or ``{kind: {name: weight}}``."""

_THINGS = {"tier": 0.4, "ber": 0.3, "der": 0.3, "fer": 0.0}
PAPER_WEIGHTS: dict[str, dict[str, float]] = {
    "human": {"tier": 0.4, "ber": 0.2, "der": 0.2, "fer": 0.2},
    "animal": _THINGS,
    "object": _THINGS,
}
"""Weights by kind and reward model (equation 13)."""


class Ensemble:
    """A weighted sum of reward models by name.

    models: reward models, or plain functions ``f(prompts, images, **columns) -> list[float]``, by the name that logs
    and weights give them. weights: ``{name: weight}`` for every kind alike, or ``{kind: {name: weight}}``; by default
    the paper's. A kind left out keeps the paper's weights.

    memory: "together" keeps all networks on the images' device and runs them side by side on a GPU, "lean" brings
    them there one at a time, "auto" chooses by the memory that is free.
    """

    def __init__(
        self,
        models: Mapping[str, RewardModel | Callable[..., object]],
        weights: Weights | None = None,
        memory: str = "auto",
    ):
        if not models:
            raise UserError("no reward models: give at least one, e.g. {'ber': Ber(encoder)}")
        self.models = {name: as_model(model, name) for name, model in models.items()}
        self.placement = Placement(memory)
        self.weights, explicit = _by_kind(weights)
        for kind in explicit:
            self.active(kind)

    @property
    def experts(self) -> dict[str, RewardModel]:
        """The reward models by name, as they were called before."""
        return self.models

    @property
    def preview_scorer(self) -> PreviewJudge | None:
        """The judge of DSOG's previews: the first reward model that judges previews (registry.py)."""
        return preview_judge(self.models)

    @property
    def face_embedding(self) -> FaceEmbedding | None:
        """Where a person's concept tokens start from: the first reward model that knows faces."""
        return next((model.face_embedding for model in self.models.values() if isinstance(model, EmbedsFaces)), None)

    def active(self, kind: str) -> dict[str, float]:
        """Reward models asked for concepts of this kind, with their weights. Raises UserError where one is missing."""
        if kind not in self.weights:
            raise UserError(f"kind={kind!r}: must be one of {', '.join(self.weights)}")
        chosen = {name: weight for name, weight in self.weights[kind].items() if weight > 0}
        missing = [name for name in chosen if name not in self.models]
        if missing:
            raise UserError(
                f"weights of {kind!r} name {', '.join(missing)}, reward models are {', '.join(self.models)}: add it, "
                "or give weights without it"
            )
        return chosen

    def throughput(self) -> dict[str, float]:
        """Images a second by reward model, over everything scored so far."""
        return self.placement.throughput.per_second()

    def submit(self, batch: RewardBatch) -> Future[EnsembleScore]:
        """:meth:`score`, done when this returns."""
        done: Future[EnsembleScore] = Future()
        done.set_result(self.score(batch))
        return done

    def score(self, batch: RewardBatch) -> EnsembleScore:
        """Total and parts, [R] each. Raises UserError naming reward model and image when one fails."""
        weights = self.active(batch.kind)
        asked = {name: self.models[name] for name in weights}
        device = batch.images.device
        answers = self.placement.run(asked, lambda name: self._ask(name, batch), len(batch), device)
        result = EnsembleScore(torch.zeros(len(batch), dtype=torch.float32, device=device))
        for name, (score, absent) in answers.items():  # looked at only now: to look is to wait for the device
            result.parts[name] = score
            result.no_face += 0 if absent is None else int(absent.sum())
            result.total += weights[name] * score
        return noted(result, batch.prompts)

    def _ask(self, name: str, batch: RewardBatch) -> tuple[Tensor, Tensor | None]:
        model = self.models[name]
        try:
            found = model.score_and_absent(batch) if isinstance(model, CountsAbsent) else (model.score(batch), None)
        except UserError as error:
            raise UserError(f"reward model {name!r}: {error}") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a reward model does not end a run without a word
            raise UserError(
                f"reward model {name!r} failed{_where(model, batch)}: {type(error).__name__}: {error}"
            ) from error
        return checked(name, found[0], batch), found[1]


def checked(name: str, score: Tensor, batch: RewardBatch) -> Tensor:
    """`score` as float32 [R] without a graph, on the images' device. Raises UserError where it cannot be that."""
    if not isinstance(score, Tensor) or score.shape != (len(batch),) or score.is_complex():
        raise UserError(
            f"reward model {name!r} returned {shape_of(score)} for {len(batch)} images: must return a tensor "
            f"[{len(batch)}]"
        )
    return score.detach().to(device=batch.images.device, dtype=torch.float32)


def noted(score: EnsembleScore, prompts: Sequence[str]) -> EnsembleScore:
    """`score` with every number that is not finite in `invalid`, and its total NaN there."""
    found = []
    for name, part in {**score.parts, **({} if score.parts else {"reward": score.total})}.items():
        bad = torch.nonzero(~torch.isfinite(part)).flatten().tolist()
        if bad:
            found.append(InvalidScore(name, tuple(bad), float(part[bad[0]]), prompts[bad[0]]))
            score.total[bad] = math.nan
    score.invalid = tuple(found)
    return score


def _where(model: RewardModel, batch: RewardBatch) -> str:
    """ " at image r (prompt)" of the first image that fails alone; nothing when each alone passes."""
    for index in range(len(batch)):
        try:
            model.score(batch.row(index))
        except KeyboardInterrupt:
            raise
        except BaseException:
            return f" at image {index} (prompt {batch.prompts[index]!r})"
    return f" on the {len(batch)} images together, though not on any image alone"


# --- whatever a user may hand over ----------------------------------------------------------------------------------


@runtime_checkable
class _OwnScore(Protocol):
    def score(self, batch: RewardBatch) -> EnsembleScore | Tensor: ...


@runtime_checkable
class _OwnSubmit(Protocol):
    def submit(self, batch: RewardBatch) -> Future[EnsembleScore]: ...


def as_model(given: object, name: str = "reward", device: Device = "cpu") -> RewardModel:
    """A reward model as it is, a plain function as one, a word as what it names (names.py); else UserError."""
    if isinstance(given, str):
        given = named(given, device)
    if isinstance(given, RewardModel):
        return given
    if callable(given) and not isinstance(given, type):
        return RewardFunction(given, name)
    raise UserError(
        f"reward model {name!r} is a {type(given).__name__}: must have score(batch) -> Tensor [R], or be a function "
        "f(prompts, images, **columns) -> list of numbers"
    )


def as_rewards(given: object, weights: Sequence[float] | Weights | None = None, device: Device = "cpu") -> Rewards:
    """`given` as what a run asks of its rewards.

    given: an `Ensemble` or `RemoteRewards`; a reward model, a function, or the name of one (names.py; its network is
    put on `device`), whose values are then the reward; several of them, as a list or by name, with `weights` (by
    default 1 each); or an object of your own whose score(batch) gives .total [R] (and .parts, .no_face) or a tensor
    [R]. Raises UserError for anything else.
    """
    if isinstance(given, Rewards):
        return given
    if isinstance(given, (list, tuple)):
        given = {_name(place, given): model for place, model in enumerate(given)}
    if isinstance(given, Mapping):
        chosen = weights if weights is not None else [1.0] * len(given)
        if not isinstance(chosen, Mapping):
            if len(chosen) != len(given):
                raise UserError(f"weights: {len(chosen)} for {len(given)} reward models: must be one a model")
            chosen = dict(zip(given, chosen, strict=True))
        return Ensemble({str(name): as_model(model, str(name), device) for name, model in given.items()}, chosen)
    if isinstance(given, (_OwnSubmit, _OwnScore)) and kind_of(given) is None:
        return OwnRewards(given)
    name = _name(0, [given])
    return Ensemble({name: as_model(given, name, device)}, {name: 1.0})


def _name(place: int, among: Sequence[object]) -> str:
    """A name for logs: the function's or class's own, numbered where several share it."""
    own = [_own_name(each).lower() for each in among]
    return own[place] if own.count(own[place]) == 1 else f"{own[place]}_{own[: place + 1].count(own[place])}"


def _own_name(given: object) -> str:
    if isinstance(given, str):
        return short_name(given)
    entry = kind_of(given)
    if entry is not None:
        return entry.name
    return str(given.__name__ if inspect.isroutine(given) else type(given).__name__)


class OwnRewards:
    """An object of a user's own as :class:`Rewards`: it has `score(batch)` or `submit(batch)`, maybe nothing else."""

    preview_scorer: PreviewJudge | None = None
    face_embedding: FaceEmbedding | None = None

    def __init__(self, own: _OwnScore | _OwnSubmit):
        self.own = own

    def score(self, batch: RewardBatch) -> EnsembleScore:
        if not isinstance(self.own, _OwnScore):
            return self.submit(batch).result()
        found = self.own.score(batch)
        if isinstance(found, Tensor):
            found = EnsembleScore(found, {"reward": found})
        found.total = checked("reward", found.total, batch)
        found.parts = {name: checked(name, part, batch) for name, part in found.parts.items()}
        return noted(found, batch.prompts)

    def submit(self, batch: RewardBatch) -> Future[EnsembleScore]:
        if isinstance(self.own, _OwnSubmit):
            return self.own.submit(batch)
        done: Future[EnsembleScore] = Future()
        done.set_result(self.score(batch))
        return done

    def throughput(self) -> dict[str, float]:
        return {}


def _by_kind(weights: Weights | None) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Weights of every kind, and the kinds whose weights were given and are not the paper's."""
    if weights is None:
        return {kind: dict(chosen) for kind, chosen in PAPER_WEIGHTS.items()}, ()
    if not weights:
        raise UserError("weights is empty: leave it out for the paper's, or give {name: weight}")
    nested = [isinstance(value, Mapping) for value in weights.values()]
    if any(nested) != all(nested):
        raise UserError("weights mixes numbers and tables: give {name: weight}, or {kind: {name: weight}}")
    explicit = tuple(str(kind) for kind in weights) if all(nested) else KINDS
    table = {**PAPER_WEIGHTS, **weights} if all(nested) else {kind: weights for kind in KINDS}
    result: dict[str, dict[str, float]] = {}
    for kind, chosen in table.items():
        if kind not in KINDS:
            raise UserError(f"weights of kind {kind!r}: must be one of {', '.join(KINDS)}")
        assert isinstance(chosen, Mapping)
        for name, weight in chosen.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight < 0:
                raise UserError(f"weight of {name!r} for {kind!r} is {weight!r}: must be a finite number ≥ 0")
        if not any(weight > 0 for weight in chosen.values()):
            raise UserError(f"weights of {kind!r} are all 0: at least one reward model must count")
        result[kind] = {str(name): float(weight) for name, weight in chosen.items()}
    return result, explicit
