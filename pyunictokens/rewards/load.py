"""From the `rewards:` part of a run's settings to an ensemble: which reward models, with which networks and weights.

    rewards:
      offline: true                                   # for all networks; so are dtype and batch
      memory: auto                                    # auto, together or lean (placement.py)
      weights: {tier: 0.4, ber: 0.2, der: 0.2, hps: 0.2}   # or by kind; left out: the paper's
      models:                                         # (called `experts` in older files)
        tier: {path: weights/ernie-3.0-base-zh}       # each model's own settings: TierConfig, BerConfig, ...
        ber: {path: weights/blip2-itm-vit-g, head: contrastive}
        der: {path: weights/dinov2-base, match: best}
        judge: {model: gpt-4o, cache: judged}         # a remote judge, see judge.py
        hps: {use: "my_rewards:HpsV2", path: weights/HPS_v2.1_compressed.pt}     # your own class, called with the rest

Settings are data, and `use: MODULE:CLASS` runs code: it is imported only where the caller says that it trusts them.
Networks are read when they are first asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import cast

from ..config.settings import convert
from ..utils.errors import UserError
from .base import Device, RewardModel
from .ensemble import Ensemble
from .names import imported
from .networks import NetworkConfig
from .placement import MODES
from .registry import call, registered

Weights = Mapping[str, float] | Mapping[str, Mapping[str, float]] | None
SHARED = ("dtype", "batch", "offline")
"""Settings that hold for every network which does not say otherwise."""


@dataclass(frozen=True)
class RewardConfig:
    """The `rewards:` part of a run's settings."""

    models: Mapping[str, Mapping[str, object]]
    """Settings by the name a reward model goes by. `use` says what it is; left out, the name says it."""
    weights: Mapping[str, object] | None = None
    """``{name: weight}`` or ``{kind: {name: weight}}``; None is the paper's."""
    memory: str = "auto"
    """auto, together or lean."""
    shared: Mapping[str, object] = field(default_factory=dict)
    """dtype, batch and offline for every network that does not say otherwise."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, object], origin: str = "rewards") -> RewardConfig:
        """Settings as a YAML file holds them. Raises UserError naming the key that cannot be used."""
        if not isinstance(values, Mapping):
            raise UserError(f"{origin}: must be a table of settings, is {type(values).__name__}")
        section = "experts" if "experts" in values and "models" not in values else "models"
        known = (section, "weights", "memory", *SHARED)
        unknown = [str(key) for key in values if key not in known]
        if unknown:
            raise UserError(f"{origin}: unknown {', '.join(unknown)}: must be of {', '.join(known)}")
        models = values.get(section)
        if not isinstance(models, Mapping) or not models:
            raise UserError(f"{origin}.{section}: must be a table, a model a line, e.g. tier: {{path: weights/ernie}}")
        for name, settings in models.items():
            if not isinstance(settings, Mapping):
                raise UserError(
                    f"{origin}.{section}.{name}={settings!r}: must be a table, e.g. {{path: weights/{name}}}"
                )
        weights = cast("Weights", convert(values.get("weights"), Weights, f"{origin}.weights"))
        memory = values.get("memory", "auto")
        if memory not in MODES:
            raise UserError(f"{origin}.memory={memory!r}: must be {', '.join(MODES)}")
        shared = {key: values[key] for key in SHARED if key in values}
        return cls({str(k): dict(v) for k, v in models.items()}, weights, str(memory), shared)

    def paths(self) -> dict[str, str]:
        """Where the networks are, by kind of reward model, as far as they are named."""
        named = ((s.get("use", name), s.get("path")) for name, s in self.models.items())
        return {str(use): str(path) for use, path in named if use in registered() and path is not None}


def load_rewards(
    config: RewardConfig | Mapping[str, object], device: Device = "cpu", *, trust: bool = False
) -> Ensemble:
    """The ensemble that settings name. That the weight files are there is checked now; they are read when needed.

    trust: whether the settings may name what is imported (`use: MODULE:CLASS`), or what is asked over the network (a
    judge). Give it for settings of your own, never for those that came with somebody's run. Raises UserError.
    """
    if not isinstance(config, RewardConfig):
        config = RewardConfig.from_mapping(config)
    models: dict[str, RewardModel | Callable[..., object]] = {}
    for name, settings in config.models.items():
        models[name] = _model(name, settings, config.shared, device, trust)
    return Ensemble(models, config.weights, config.memory)


def _model(
    name: str, settings: Mapping[str, object], shared: Mapping[str, object], device: Device, trust: bool
) -> RewardModel:
    options = {key: value for key, value in settings.items() if key != "use"}
    use, origin = settings.get("use", name), f"rewards.models.{name}"
    entry = registered().get(str(use))
    if entry is None:
        return call(imported(use, f"{origin}.use", trust, registered()), options, device, origin)
    if entry.asks_others and not trust:
        raise UserError(f"{origin}: asks a server, and these settings are not trusted: pass trust=True")
    if entry.settings is not None and issubclass(entry.settings, NetworkConfig):
        taken = {each.name for each in fields(entry.settings)}
        options = {**{key: value for key, value in shared.items() if key in taken}, **options}
    return entry.build(options, device, origin)


def reaches_out(rewards: object) -> list[str]:
    """What the `rewards:` of a run name that would be imported, or asked over the network; empty for plain networks."""
    if isinstance(rewards, str):
        return [rewards]
    if not isinstance(rewards, Mapping):
        return []
    models = rewards.get("models", rewards.get("experts"))
    kinds = registered()
    named = {
        str(name): str(settings.get("use", name))
        for name, settings in (models.items() if isinstance(models, Mapping) else ())
        if isinstance(settings, Mapping)
    }
    return [f"{name}: {use}" for name, use in named.items() if use not in kinds or kinds[use].asks_others]
