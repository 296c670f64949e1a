"""Reward models by a word: ``jpeg_size``, ``hpsv2=weights/HPS_v2.1.pt``, ``my_rewards:red``.

A registered name stands alone where it wants no weights or where they lie in their usual place, else with the path of
its weights behind ``=``. MODULE:FUNCTION imports code: only name code that you trust.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType

from ..utils.errors import UserError
from .base import Device
from .registry import registered

ALSO = {"blip2": "ber", "dinov2": "dino"}
"""Other names of registered reward models."""


def short_name(word: str) -> str:
    """What logs call the reward model of `word`."""
    return word.partition("=")[0].rpartition(":")[2].lower()


def named(
    word: str,
    device: Device = "cpu",
    origin: str = "reward",
    settings: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
) -> object:
    """The reward model or function that `word` names, ready to be asked. Raises UserError where it names none.

    settings: more than its path, by registered name.
    """
    name, equals, path = word.partition("=")
    kinds = registered()
    entry = kinds.get(ALSO.get(name, name))
    if entry is None:
        if ":" not in word:
            raise UserError(
                f"{origin}={word!r}: must be MODULE:FUNCTION of your own, NAME or NAME=WEIGHTS; names are "
                f"{', '.join([*kinds, *ALSO])}"
            )
        found = imported(word, origin, trust=True)
        return found() if isinstance(found, type) else found
    options: dict[str, object] = {**settings.get(entry.name, {}), **({"path": path} if equals else {})}
    takes_path = entry.settings is not None and "path" in {each.name for each in fields(entry.settings)}
    if equals and not takes_path:
        raise UserError(f"{origin}={word!r}: {name} takes no weights: say {name} alone")
    if not equals and takes_path:
        if entry.files is None:
            raise UserError(f"{origin}={word!r}: say where its file is: {name}=FILE")
        options["path"] = entry.files.home if Path(entry.files.home).exists() else entry.files.source
    return entry.build(options, device, f"{origin} {name}")


def imported(use: object, origin: str, trust: bool, known: Mapping[str, object] | None = None) -> Callable[..., object]:
    """The class or function that MODULE:NAME names. Raises UserError where it is none, or is not trusted."""
    module, colon, name = str(use).partition(":")
    if not colon or not name.isidentifier():
        others = "".join(f"{each}, " for each in known or ())
        raise UserError(f"{origin}={use!r}: must be {others}or MODULE:CLASS of your own")
    if not trust:
        raise UserError(f"{origin}={use!r}: would be imported, and these settings are not trusted: pass trust=True")
    try:
        found = importlib.import_module(module)
        made: object = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{origin}={use!r}: {error}") from error
    if not callable(made):
        raise UserError(f"{origin}={use!r}: is a {type(made).__name__}: must be a class or a function")
    return made
