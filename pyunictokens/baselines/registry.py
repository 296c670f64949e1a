"""The methods by name. A new one is a file with a class or two and a line here."""

from __future__ import annotations

import difflib
import importlib

from ..utils.errors import UserError
from .base import Method, Settings

METHODS = {
    "unictokens": "unictokens:UniCTokens",
    "textual-inversion": "textual_inversion:TextualInversion",
    "dreambooth": "dreambooth:DreamBooth",
    "showo-textual-inversion": "showo_inversion:ShowoInversion",
    "showo-dreambooth": "showo_dreambooth:ShowoDreamBooth",
    "showo-yochameleon": "showo_yochameleon:ShowoYoChameleon",
    "yollava": "yollava:YoLlava",
    "yollava-phi": "yollava:YoLlavaPhi",
    "mcllava": "mcllava:McLlava",
    "rap": "rap:Rap",
    "yochameleon": "yochameleon:YoChameleon",
    "showo-tp": "prompts:ShowoText",
    "showo-ip": "prompts:ShowoImage",
    "chameleon-tp": "prompts:ChameleonText",
    "chameleon-ip": "prompts:ChameleonImage",
    "qwen-tp": "prompts:QwenText",
    "llava-tp": "prompts:LlavaText",
    "gpt-tp": "prompts:GptText",
    "gpt-ip": "prompts:GptImage",
}
"""MODULE:CLASS of this package by name."""


def method(name: str) -> Method[Settings]:
    """The method of a name. Raises UserError with the nearest one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        raise UserError(
            f"baseline {name!r}: " + (f"did you mean {near[0]}?" if near else f"must be one of {', '.join(METHODS)}")
        )
    module, _, kind = METHODS[name].partition(":")
    found = getattr(importlib.import_module(f"{__package__}.{module}"), kind)()
    assert isinstance(found, Method) and found.name == name, f"registry: {name} is {found!r}"
    return found
