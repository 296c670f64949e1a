"""The reward of the paper: a weighted sum of experts, weights by the concept's kind (equations 12 and 13).

    Reward = w₁·TIER + w₂·BER + w₃·DER + w₄·FER,   w = (0.4, 0.3, 0.3, 0) for animals and objects,
                                                   w = (0.4, 0.2, 0.2, 0.2) for humans

Every expert's value is kept beside the sum. An expert that fails, or returns what is no number, stops the step with an
error that names expert and row: a reward made up in its place would be trained on. Where the networks run is decided in
placement.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..utils.errors import UserError
from .base import KINDS, Expert, RewardBatch
from .placement import Placement

_THINGS = {"tier": 0.4, "ber": 0.3, "der": 0.3, "fer": 0.0}
PAPER_WEIGHTS: dict[str, dict[str, float]] = {
    "human": {"tier": 0.4, "ber": 0.2, "der": 0.2, "fer": 0.2},
    "animal": _THINGS,
    "object": _THINGS,
}
"""Weights by kind and expert (equation 13)."""


@dataclass
class EnsembleScore:
    """Rewards of one batch."""

    total: Tensor
    """[R], float32: the weighted sum."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """[R] per expert, unweighted. Experts of weight 0 for this kind are not asked and have no entry."""
    no_face: int = 0
    """Rows in which an expert found nothing to look at (FER: no face) and therefore scored 0."""


class Ensemble:
    """A weighted sum of experts by name.

    weights: ``{name: weight}`` for every kind alike, or ``{kind: {name: weight}}``; by default the paper's. A kind left
    out keeps the paper's weights. Experts are named by their key in `experts`.

    memory: "together" keeps all networks on the pictures' device and runs them side by side on a GPU, "lean" brings
    them there one at a time, "auto" chooses by the memory that is free.
    """

    def __init__(
        self, experts: Mapping[str, Expert], weights: Mapping[str, object] | None = None, memory: str = "auto"
    ):
        if not experts:
            raise UserError("no experts: give at least one, e.g. {'ber': Ber(encoder)}")
        for name, expert in experts.items():
            if not callable(getattr(expert, "score", None)):
                raise UserError(f"expert {name!r} is a {type(expert).__name__}: must have score(batch) -> Tensor [R]")
        self.experts = dict(experts)
        self.placement = Placement(memory)
        self.weights, explicit = _by_kind(weights)
        for kind in explicit:
            self.active(kind)

    def active(self, kind: str) -> dict[str, float]:
        """Experts asked for concepts of this kind, with their weights. Raises UserError where one is missing."""
        if kind not in self.weights:
            raise UserError(f"kind={kind!r}: must be one of {', '.join(self.weights)}")
        chosen = {name: weight for name, weight in self.weights[kind].items() if weight > 0}
        missing = [name for name in chosen if name not in self.experts]
        if missing:
            raise UserError(
                f"weights of {kind!r} name {', '.join(missing)}, experts are {', '.join(self.experts)}: add it, "
                "or give weights without it"
            )
        return chosen

    def throughput(self) -> dict[str, float]:
        """Rows a second by expert, over everything scored so far."""
        return self.placement.throughput.per_second()

    def score(self, batch: RewardBatch) -> EnsembleScore:
        """Total and parts, [R] each. Raises UserError naming expert and row when a score cannot be had."""
        weights = self.active(batch.kind)
        asked = {name: self.experts[name] for name in weights}
        device = batch.images.device
        answers = self.placement.run(asked, lambda name: self._ask(name, batch), len(batch), device)
        result = EnsembleScore(torch.zeros(len(batch), dtype=torch.float32, device=device))
        for name, (score, absent) in answers.items():  # looked at only now: to look is to wait for the device
            result.parts[name] = _checked(name, score, batch)
            result.no_face += 0 if absent is None else int(absent.sum())
            result.total += weights[name] * result.parts[name]
        return result

    def _ask(self, name: str, batch: RewardBatch) -> tuple[Tensor, Tensor | None]:
        expert = self.experts[name]
        try:
            score, absent = _score(expert, batch)
        except UserError as error:
            raise UserError(f"expert {name!r}: {error}") from error
        except Exception as error:
            raise UserError(
                f"expert {name!r} failed{_where(expert, batch)}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(score, Tensor) or score.shape != (len(batch),):
            found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise UserError(
                f"expert {name!r} returned {found} for {len(batch)} rows: must return a tensor [{len(batch)}]"
            )
        return score.detach().to(batch.images.device, torch.float32), absent


def _checked(name: str, score: Tensor, batch: RewardBatch) -> Tensor:
    """`score`, every row of which is a number."""
    bad = (~score.isfinite()).nonzero().flatten().tolist()
    if bad:
        row = bad[0]
        raise UserError(
            f"expert {name!r} scored row {row} (of {len(bad)} such) as {score[row].item()}: must be finite; "
            f"prompt {batch.prompts[row]!r}"
        )
    return score


def _score(expert: Expert, batch: RewardBatch) -> tuple[Tensor, Tensor | None]:
    """Scores, and which rows had nothing to look at (experts that can tell offer `score_and_absent`)."""
    detailed = getattr(expert, "score_and_absent", None)
    return (expert.score(batch), None) if detailed is None else detailed(batch)


def _where(expert: Expert, batch: RewardBatch) -> str:
    """ " at row r (prompt)" of the first row that fails alone; nothing when each row alone passes."""
    for index in range(len(batch)):
        try:
            expert.score(batch.row(index))
        except Exception:
            return f" at row {index} (prompt {batch.prompts[index]!r})"
    return f" on the {len(batch)} rows together, though not on any row alone"


def _by_kind(weights: Mapping[str, object] | None) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
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
            if (
                isinstance(weight, bool)
                or not isinstance(weight, (int, float))
                or not math.isfinite(weight)
                or weight < 0
            ):
                raise UserError(f"weight of {name!r} for {kind!r} is {weight!r}: must be a finite number ≥ 0")
        if not any(weight > 0 for weight in chosen.values()):
            raise UserError(f"weights of {kind!r} are all 0: at least one expert must count")
        result[kind] = {str(name): float(weight) for name, weight in chosen.items()}
    return result, explicit
