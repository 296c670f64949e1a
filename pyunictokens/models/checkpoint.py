"""Finding and reading published checkpoints: a folder or hub id, safetensors or .bin, whole or sharded.

It handles file names and formats, not what the tensors mean. Pickled files are read with ``weights_only=True``, so a
checkpoint cannot run code.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..utils.errors import UserError, needs
from ..utils.files import AnyJson, read_json, read_json_table, read_safetensors, unreadable
from .packed import unpack

WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
)
UNWRAPPED = "unwrapped_model"
"""Where scripts made with Accelerate put the model within a `checkpoint-N/`."""

_HUB = "hub:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LOCAL = frozenset({"weights", "models", "model", "checkpoints", "ckpt", "ckpts", "data", "runs", "output", "outputs"})
"""Names of folders that nobody on the hub is meant by."""
_FILES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".yaml", ".yml", ".txt", ".png", ".jpg"})
_NESTED = ("state_dict", "model_state_dict", "model", "module")


def resolve(
    path: str | os.PathLike[str], *, offline: bool = False, also: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> Path:
    """A folder as it is, or a hub id (:func:`local_or_hub`) as the folder of its local snapshot, downloaded if absent.

    offline: never ask the hub, take what was downloaded before. also: further file patterns that are wanted. only: the
    patterns of all that is wanted, where it is no weights.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path}: is a file; a checkpoint is a folder with config.json and weights")
    text = local_or_hub(path, quiet=offline)
    with needs("train"):
        from huggingface_hub import snapshot_download

    patterns = list(only) or ["*.json", "*.safetensors", "pytorch_model*.bin", "*.txt", "*.model", *also]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # the hub client raises many kinds; all mean that the files are not here
        raise UserError(
            f"{text}: no such folder, and the hub cannot be read ({type(error).__name__}): "
            "download the files elsewhere and pass their folder"
        ) from error


def local_or_hub(path: str | os.PathLike[str], quiet: bool = False) -> str:
    """A local file or folder as it is, else the hub id (``owner/name``) that `path` stands for.

    ``hub:owner/name`` always means the hub. A bare ``owner/name`` does so where it cannot be meant as a local path, and
    where PYUNICTOKENS_HUB is not "explicit"; unless `quiet` a warning says that the hub is asked. Raises UserError for
    anything else: a local path that is absent is never sent to the hub.
    """
    text = str(path)
    if text.startswith(_HUB):
        if not _HUB_ID.fullmatch(text.removeprefix(_HUB)):
            raise UserError(f"{text}: must be hub:owner/name")
        return text.removeprefix(_HUB)
    if text and Path(path).expanduser().exists():
        return str(Path(path).expanduser())
    if not _HUB_ID.fullmatch(text) or text.startswith((".", "~")):
        raise UserError(f"{text}: no such folder, and not a hub id of the form owner/name")
    owner = text.partition("/")[0]
    if owner.lower() in _LOCAL or Path(owner).is_dir() or Path(text).suffix.lower() in _FILES:
        raise UserError(f"{text}: no such folder or file here; if it is meant as a hub id, write hub:{text}")
    if os.environ.get("PYUNICTOKENS_HUB", "").lower() == "explicit":
        raise UserError(f"{text}: no such folder here, and PYUNICTOKENS_HUB=explicit: for the hub write hub:{text}")
    if not quiet:
        warnings.warn(
            f"{text} is no folder here: the hub is asked for it (hub:{text} means the hub and is not warned of; "
            "PYUNICTOKENS_HUB=explicit leaves it at that)",
            stacklevel=3,
        )
    return text


def read_config(folder: Path, required: bool = True) -> dict[str, AnyJson]:
    """The folder's `config.json` as a dict (of a whole pipeline its `model_index.json`); {} when absent and not
    required."""
    places = (folder / "config.json", folder / UNWRAPPED / "config.json", folder / "model_index.json")
    file = next((place for place in places if place.exists()), places[0])
    if not file.exists() and not required:
        return {}
    return read_json_table(file)


def whole_number(config: Mapping[str, object], key: str, default: int, origin: object, least: int = 1) -> int:
    """`config[key]`, or `default` where it is absent or null, as an int in [least, 2**31). Raises UserError."""
    value = config.get(key)
    value = default if value is None else value
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not least <= value < 2**31
        or int(value) != value
    ):
        raise UserError(f"{origin}: {key}={value!r}: must be a whole number ≥ {least}")
    return int(value)


def real_number(config: Mapping[str, object], key: str, default: float, origin: object) -> float:
    """`config[key]`, or `default` where it is absent, null or 0, as a float above 0. Raises UserError."""
    value = config.get(key) or default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise UserError(f"{origin}: {key}={value!r}: must be a number > 0")
    return float(value)


def load_state_dict(folder: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint in `folder`, on the CPU, by their plain names; safetensors are memory-mapped.

    Also read: the `unwrapped_model/` that Accelerate's scripts write into `checkpoint-N/`, a state dict inside a dict
    (`state_dict`, `model`, `module`), and the prefixes that DDP (`module.`) and torch.compile (`_orig_mod.`) put
    before names. An index whose shards are gone is passed over, with a warning, where whole weights lie beside it.
    """
    stale: list[Path] = []
    for place in (folder, folder / UNWRAPPED):
        for name in WEIGHT_FILES:
            index = place / f"{name}.index.json"
            if index.exists():
                shards = _shards(index)
                if all((place / shard).exists() for shard in shards):
                    return _plain_names(_load_shards(index, shards))
                stale.append(index)
            if (place / name).exists():
                if stale:
                    warnings.warn(f"{stale[0]}: shards it lists are gone: {place / name} is read", stacklevel=2)
                return _plain_names(load_tensors(place / name))
    if stale:
        gone = next(name for name in _shards(stale[0]) if not (stale[0].parent / name).exists())
        raise UserError(f"{stale[0].parent / gone}: no such file; the checkpoint is incomplete")
    raise UserError(
        f"{folder}: no weights found; looked for {', '.join(WEIGHT_FILES)} and their .index.json{_elsewhere(folder)}"
    )


def _has_weights(folder: Path) -> bool:
    return any((folder / f"{name}{end}").exists() for name in WEIGHT_FILES for end in ("", ".index.json"))


def _elsewhere(folder: Path) -> str:
    """Where else under `folder` weights lie, for an error."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [path.name for path in inside if _has_weights(path) or _has_weights(path / UNWRAPPED)]
    return f"; there are weights in {', '.join(found[-5:])}: name that folder" if found else ""


def _shards(index: Path) -> list[str]:
    """Names of the files that `index` lists, each once."""
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index}: must hold an object 'weight_map' from weight to file")
    for name in table.values():
        if Path(name).name != name:
            raise UserError(f"{index}: shard {name!r} must be a plain file name in the same folder")
    return table


def _load_shards(index: Path, shards: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in shards:
        tensors.update(load_tensors(index.parent / name))
    absent = sorted(_weight_map(index).keys() - tensors.keys())
    if absent:
        raise UserError(f"{index}: {len(absent)} weights are in no shard ({', '.join(absent[:3])})")
    return tensors


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors, .bin or .pt file, on the CPU; packed ones (packed.py) as float32. Raises
    UserError naming the file, also where it carries a checksum that does not fit."""
    content = unpickle(file) if file.suffix != ".safetensors" else read_safetensors(file)
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file}: must hold a dict of tensors, bare or under one of {', '.join(_NESTED)}")
    for name, value in content.items():
        refuse_odd(value, f"{file}: {name!s:.80}")
    return unpack({str(name): value for name, value in content.items()}, file)


def refuse_odd(value: Tensor, origin: object) -> None:
    """Raise UserError for a tensor that is no plain table of numbers: sparse, quantized, or without values (meta)."""
    odd = "without values (meta)" if value.is_meta else "quantized" if value.is_quantized else ""
    odd = odd or ("" if value.layout == torch.strided else f"of layout {value.layout}".replace("torch.", ""))
    if odd:
        raise UserError(f"{origin}: is a tensor {odd}: must be dense, with its values on the CPU")


def unpickle(file: Path) -> object:
    """What torch.save wrote into `file`, tensors and plain containers alone: no code of the file runs."""
    if not file.exists():
        raise UserError(f"{file}: no such file; the checkpoint is incomplete")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no weights make the readers raise whatever they stumble over
        raise UserError(f"{file}: cannot be read as weights, it may be cut short: {unreadable(file, error)}") from None


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers put before the names of weights."""
    names = {key: key.replace("_orig_mod.", "") for key in tensors}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    return {names[key]: value for key, value in tensors.items()}


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
