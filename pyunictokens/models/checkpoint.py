"""Finding and reading published checkpoints: a folder or hub id, safetensors or .bin, whole or sharded.

It knows file names and formats, not what the tensors mean. Pickled files are read with ``weights_only=True``, so a
checkpoint cannot run code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.errors import UserError
from ..utils.files import read_json

WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
)


def resolve(path: str | os.PathLike[str], *, offline: bool = False, also: tuple[str, ...] = ()) -> Path:
    """A folder as it is, or a hub id (``owner/name``) as the folder of its local snapshot, downloaded when absent.

    offline: never ask the hub, take what was downloaded before. also: further file patterns that are wanted.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    text = str(path)
    if folder.exists():
        raise UserError(f"{text}: is a file; a checkpoint is a folder with config.json and weights")
    if text.count("/") != 1 or text.startswith((".", "~", "/")) or "\\" in text:
        raise UserError(f"{text}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.txt", "*.model", *also]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # the hub client raises many kinds; all mean that the files are not here
        raise UserError(
            f"{text}: no such folder, and the hub cannot be read ({type(error).__name__}): "
            "download the files elsewhere and pass their folder"
        ) from error


def read_config(folder: Path, required: bool = True) -> dict[str, Any]:
    """The folder's `config.json` as a dict; {} when absent and not required."""
    file = folder / "config.json"
    if not file.exists() and not required:
        return {}
    config = read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file}: must hold a JSON object, holds {type(config).__name__}")
    return config


def whole_number(config: Mapping[str, Any], key: str, default: int, origin: object, least: int = 1) -> int:
    """`config[key]`, or `default` where it is absent or null, as an int in [least, 2**31). Raises UserError."""
    value = config.get(key)
    value = default if value is None else value
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < 2**31
    if not fits or int(value) != value:
        raise UserError(f"{origin}: {key}={value!r}: must be a whole number ≥ {least}")
    return int(value)


def real_number(config: Mapping[str, Any], key: str, default: float, origin: object) -> float:
    """`config[key]`, or `default` where it is absent, null or 0, as a float above 0. Raises UserError."""
    value = config.get(key) or default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise UserError(f"{origin}: {key}={value!r}: must be a number > 0")
    return float(value)


def load_state_dict(folder: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint in `folder`, on the CPU; safetensors are memory-mapped."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.exists():
            return _load_shards(folder, index)
        if (folder / name).exists():
            return _load_file(folder / name)
    raise UserError(f"{folder}: no weights found; looked for {', '.join(WEIGHT_FILES)} and their .index.json")


def _load_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    content = read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index}: must hold an object 'weight_map' from weight to file")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(table.values())):
        if Path(name).name != name:
            raise UserError(f"{index}: shard {name!r} must be a plain file name in the same folder")
        tensors.update(_load_file(folder / name))
    absent = sorted(table.keys() - tensors.keys())
    if absent:
        raise UserError(f"{index}: {len(absent)} weights are in no shard ({', '.join(absent[:3])})")
    return tensors


def _load_file(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise UserError(f"{file}: no such file; the checkpoint is incomplete")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no weights make the readers raise whatever they stumble over
        if type(error).__name__ == "SafetensorError":
            raise UserError(f"{file}: not a whole safetensors file, download it again: {error}") from error
        raise UserError(
            f"{file}: cannot be read as weights, it may be cut short: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file}: must hold a plain dict of tensors")
    return tensors


def assign(model: nn.Module, weights: dict[str, Tensor], origin: object) -> None:
    """Put `weights` into `model` (made on the meta device): every key must match, none left over and none missing."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    wrong = [
        f"{key}: {tuple(weights[key].shape)} instead of {wanted[key]}"
        for key in sorted(wanted.keys() & weights.keys())
        if tuple(weights[key].shape) != wanted[key]
    ]
    if missing or extra or wrong:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("left over", extra), ("of another shape", wrong))
            if names
        ]
        raise UserError(f"{origin}: weights do not fit {type(model).__name__}: {'; '.join(parts)}")
    model.load_state_dict(weights, assign=True)
