"""From the `rewards:` part of a run's settings to an ensemble: which experts, with which networks and weights.

    rewards:
      offline: true                                   # for all networks; so are dtype and batch
      memory: auto                                    # auto, together or lean (placement.py)
      weights: {tier: 0.4, ber: 0.2, der: 0.2, hps: 0.2}   # or by kind; left out: the paper's
      experts:
        tier: {path: weights/ernie-3.0-base-zh}       # each expert's own settings: TierConfig, BerConfig, ...
        ber: {path: weights/blip2-itm-vit-g, head: contrastive}
        der: {path: weights/dinov2-base, match: best}
        fer: {path: weights/facenet}
        judge: {model: gpt-4o, cache: judged}         # an endpoint, see judge.py
        hps: {use: "my_experts:HpsV2", path: weights/HPS_v2.1_compressed.pt}     # your own class, called with the rest

Networks are read when they are first asked.
"""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..utils.errors import UserError
from .base import Expert
from .ensemble import Ensemble
from .experts.ber import Ber, BerConfig, Blip2
from .experts.der import Der, DerConfig, Dinov2
from .experts.facenet import FerConfig, MtcnnFaceNet
from .experts.fer import Fer
from .experts.tier import SentenceEncoder, Tier, TierConfig
from .judge import Judge, JudgeConfig, JudgeExpert
from .networks import Network, NetworkConfig
from .placement import MODES

C = TypeVar("C")

OWN: dict[str, type[NetworkConfig]] = {"tier": TierConfig, "ber": BerConfig, "der": DerConfig, "fer": FerConfig}
"""Settings of the experts over a network, by name."""


@dataclass(frozen=True)
class RewardConfig:
    """The `rewards:` part of a run's settings."""

    experts: Mapping[str, Mapping[str, Any]]
    """Settings by the name an expert goes by. `use` says what it is; left out, the name says it."""
    weights: Mapping[str, Any] | None = None
    """``{name: weight}`` or ``{kind: {name: weight}}``; None is the paper's."""
    memory: str = "auto"
    """auto, together or lean."""
    shared: Mapping[str, Any] = field(default_factory=dict)
    """dtype, batch and offline for every network that does not say otherwise."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "rewards") -> RewardConfig:
        """Settings as a YAML file holds them. Raises UserError naming the key that cannot be used."""
        if not isinstance(values, Mapping):
            raise UserError(f"{origin}: must be a table of settings, is {type(values).__name__}")
        known = ("experts", "weights", "memory", "dtype", "batch", "offline")
        unknown = [str(key) for key in values if key not in known]
        if unknown:
            raise UserError(f"{origin}: unknown {', '.join(unknown)}: must be of {', '.join(known)}")
        experts = values.get("experts")
        if not isinstance(experts, Mapping) or not experts:
            raise UserError(f"{origin}.experts: must be a table, an expert a line, e.g. tier: {{path: weights/ernie}}")
        for name, settings in experts.items():
            if not isinstance(settings, Mapping):
                raise UserError(f"{origin}.experts.{name}={settings!r}: must be a table, e.g. {{path: weights/{name}}}")
        memory = values.get("memory", "auto")
        if memory not in MODES:
            raise UserError(f"{origin}.memory={memory!r}: must be {', '.join(MODES)}")
        shared = {key: values[key] for key in ("dtype", "batch", "offline") if key in values}
        return cls({str(k): dict(v) for k, v in experts.items()}, values.get("weights"), memory, shared)

    def paths(self) -> dict[str, str]:
        """Where the networks of the paper's experts are, as far as they are named."""
        named = ((s.get("use", name), s.get("path")) for name, s in self.experts.items())
        return {str(use): str(path) for use, path in named if use in OWN and path is not None}


class Rewards(NamedTuple):
    """What training needs of the experts; the same names as in the toy's."""

    ensemble: Ensemble
    preview_scorer: Callable[[Sequence[str]], Callable[[Tensor, Tensor], Tensor]] | None
    """``preview_scorer(prompts)`` is the judge for DSOG; None where no BER is among the experts."""
    face_embedding: Callable[[Tensor], Tensor] | None
    """From photos of a person to the embeddings of the faces in them; None without FER."""


def load_rewards(config: RewardConfig | Mapping[str, Any], device: str | torch.device = "cpu") -> Rewards:
    """The experts a run names. That their files are there is checked now; they are read when first needed."""
    if not isinstance(config, RewardConfig):
        config = RewardConfig.from_mapping(config)
    experts = {name: _expert(name, settings, config.shared, device) for name, settings in config.experts.items()}
    ber = next((expert for expert in experts.values() if isinstance(expert, Ber)), None)
    fer = next((expert for expert in experts.values() if isinstance(expert, Fer)), None)
    return Rewards(
        Ensemble(experts, config.weights, config.memory),
        None if ber is None else ber.preview_scorer,
        None if fer is None else fer.face_embedding,
    )


def _expert(name: str, settings: Mapping[str, Any], shared: Mapping[str, Any], device: Any) -> Expert:
    options = {key: value for key, value in settings.items() if key != "use"}
    use, origin = settings.get("use", name), f"rewards.experts.{name}"
    if use in OWN:
        return _over_network(make(OWN[use], {**shared, **options}, origin), device)
    if use == "judge":
        extra = {key: options.pop(key) for key in ("question", "photos") if key in options}
        return JudgeExpert(Judge(make(JudgeConfig, options, origin)), **extra)
    return _own_class(use, options, device, origin)


def _over_network(config: NetworkConfig, device: Any) -> Expert:
    """The expert whose settings these are, its files looked for."""
    network: Network
    expert: Expert
    if isinstance(config, TierConfig):
        expert = Tier(network := SentenceEncoder(config, device))
    elif isinstance(config, BerConfig):
        expert = Ber(network := Blip2(config, device), config.head)
    elif isinstance(config, DerConfig):
        expert = Der(network := Dinov2(config, device), config.match)
    else:
        assert isinstance(config, FerConfig)
        expert = Fer(network := MtcnnFaceNet(config, device))
    network.locate()
    return expert


def _own_class(use: Any, options: Mapping[str, Any], device: Any, origin: str) -> Expert:
    """MODULE:CLASS, called with its options and, where it takes one, the device."""
    module_name, colon, name = str(use).partition(":")
    if not colon or not name.isidentifier():
        raise UserError(f"{origin}.use={use!r}: must be {', '.join(OWN)}, judge, or MODULE:CLASS of your own")
    try:
        made = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{origin}.use={use!r}: {error}") from error
    try:
        return made(**options, device=device)
    except TypeError as error:
        raise UserError(f"{origin}: {name}({', '.join(options)}, device) cannot be called: {error}") from error


def make(kind: type[C], options: Mapping[str, Any], origin: str) -> C:
    """A settings dataclass from a table. Raises UserError naming a key that is unknown, missing or of another type."""
    hints = typing.get_type_hints(kind)
    known = [part.name for part in fields(kind)]  # type: ignore[arg-type]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise UserError(f"{origin}: unknown {', '.join(map(str, unknown))}: must be of {', '.join(known)}")
    for key, value in options.items():
        wanted = typing.get_args(hints[key]) or (hints[key],)
        exact = isinstance(value, wanted) and (bool in wanted or not isinstance(value, bool))
        if not exact and not (float in wanted and isinstance(value, int) and not isinstance(value, bool)):
            names = " or ".join("null" if one is type(None) else one.__name__ for one in wanted)
            raise UserError(f"{origin}.{key}={value!r}: must be {names}")
    try:
        return kind(**options)
    except TypeError:
        needed = "path" if issubclass(kind, NetworkConfig) else "model"
        raise UserError(
            f"{origin}: {needed} is missing: {'a folder or hub id' if needed == 'path' else 'its name'}"
        ) from None
    except UserError as error:
        raise UserError(f"{origin}.{error}") from error
