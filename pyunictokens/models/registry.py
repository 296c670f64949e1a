"""Which families of models there are, and how a folder or a word finds its own.

A family is one module with a `FAMILY` and one line in `FAMILIES`. Which one a checkpoint belongs to is read from its
config.json alone.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..utils.errors import UserError
from .base import AnsweringModel
from .bundle import ModelBundle, Sources
from .checkpoint import read_config, resolve
from .weight_files import WeightFiles

FAMILIES = {
    "show-o": "pyunictokens.models.showo.family",
    "amused": "pyunictokens.models.amused",
    "lumina-dimoo": "pyunictokens.models.dimoo",
    "mmada": "pyunictokens.models.mmada",
    "llada": "pyunictokens.models.llada",
}
"""Modules by family."""
IMAGE_TOKENIZERS = {"MAGVITv2": "magvit-v2", "VQModel": "diffusers' VQModel"}
"""Image tokenizers by the class that a config.json names."""


@dataclass(frozen=True)
class Family:
    """A kind of model: how its checkpoints are known, and how they are loaded."""

    name: str
    recognises: Callable[[Mapping[str, object]], bool]
    """Whether a config.json is one of this family."""
    load: Callable[[Sources, torch.dtype, torch.device], ModelBundle]
    """Loads what `sources` names. Raises UserError where a part is missing or does not fit."""
    words: Mapping[str, Sources] = field(default_factory=dict)
    """Short names of published checkpoints, each with the tokenizers it was trained with."""
    files: tuple[WeightFiles, ...] = ()
    """What the published checkpoints and tokenizers consist of, as far as it is known here."""
    holds: tuple[str, ...] = ()
    """Which of "vq" and "tokenizer" lie in the folder of such a checkpoint."""


def families() -> list[Family]:
    """All families, in the order in which a config.json is offered to them."""
    return [importlib.import_module(module).FAMILY for module in FAMILIES.values()]


def implied(model: str) -> Sources:
    """What a word such as show-o-512 stands for: hub ids, or the folders that the examples keep these files in, where
    they are here. A folder of a whole pipeline holds its tokenizers; any other name stands for itself and implies
    none."""
    for family in families():
        if model in family.words:
            named, homes = family.words[model], {files.source: files.home for files in family.files}
            parts = {part: getattr(named, part) for part in ("model", "vq", "tokenizer")}
            at_home = {part: home for part, id in parts.items() if (home := homes.get(id, "")) and Path(home).is_dir()}
            return replace(named, **at_home)
    folder = Path(model).expanduser()
    if (folder / "model_index.json").is_file():
        return Sources(model, model, model)
    if (folder / "config.json").is_file():
        config = read_config(folder)
        for family in families():
            if family.recognises(config):
                return Sources(model, **dict.fromkeys(family.holds, model))
    return Sources(model)


def known_files(source: str) -> WeightFiles | None:
    """What the published files of a hub id (with or without `hub:`), or in the examples' folder of them, consist of.
    None: nothing is known of them."""
    wanted = source.removeprefix("hub:")
    every = (files for family in families() for files in family.files)
    return next((files for files in every if wanted in (files.source, files.home)), None)


def named_family(config: Mapping[str, object]) -> str | None:
    """The family that a config.json belongs to, None where it is of none known here."""
    return next((family.name for family in families() if family.recognises(config)), None)


def refuse_others(folder: Path, wanted: str) -> None:
    """Raise UserError where the config.json in `folder` is of another family, or of another image tokenizer, than
    `wanted` (a name in FAMILIES or IMAGE_TOKENIZERS). One that says nothing is let through: its weights will tell."""
    config = read_config(folder, required=False)
    found = named_family(config) or IMAGE_TOKENIZERS.get(str(config.get("_class_name")))
    if found in (None, wanted):
        return
    way_out = "open it with pyunictokens.models.load, or " if found in FAMILIES else ""
    raise UserError(f"{folder}: a checkpoint of {found}, not of {wanted}: {way_out}give a folder of {wanted}")


def family_of(path: str | os.PathLike[str]) -> Family:
    """The family of the checkpoint in a folder or hub id. Raises UserError that names the families."""
    folder = resolve(path)
    config = read_config(folder)
    for family in families():
        if family.recognises(config):
            return family
    said = {key: config[key] for key in ("_class_name", "architectures", "model_type") if key in config}
    words = [word for family in families() for word in family.words]
    raise UserError(
        f"{path}: its config.json ({said or 'which names no class'}) is of no family known here: "
        f"{', '.join(FAMILIES)}. Known by name: {', '.join(words)}"
    )


def load(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    vq: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    vision: str | os.PathLike[str] | None = None,
) -> ModelBundle:
    """A model with its image and text tokenizer, frozen and in eval mode.

    Args:
        path: a folder, a hub id, or a word that implies the tokenizers too (show-o-512, show-o-256).
        dtype: of the model; the image tokenizer stays in float32: it is small, and its signs are the codes.
        vq, tokenizer: folders or hub ids, where the word does not imply them or others are wanted.
        vision: of Show-o's CLIP-ViT variant, the image encoder; by default OpenAI's, of 336 pixels.

    Raises:
        UserError: an unknown family, a part that is missing, or parts that do not belong together.
    """
    parts = (("vq", vq), ("tokenizer", tokenizer), ("vision", vision))
    given = {name: str(value) for name, value in parts if value is not None}
    sources = replace(implied(str(path)), **given)
    assert sources.model is not None
    bundle = family_of(sources.model).load(sources, dtype, torch.device(device))
    if sources.vision is not None and not (isinstance(bundle.model, AnsweringModel) and bundle.model.takes_features):
        raise UserError(f"--vision {sources.vision}: this model looks at image codes and takes no features")
    return bundle
