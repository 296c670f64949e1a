"""Files that are either whole or absent: write aside in the same folder, flush to disk, rename.

Also the reading of JSON with errors that name file and position, and the one check for names that come from data and
are about to become a path. Knows nothing of models or training.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

_NAME_LIMIT = 64


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`. A kill or a full disk leaves the old file untouched and no half-written one behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """:func:`write_bytes_atomic` for text, as UTF-8."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_safetensors_atomic(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any device; made contiguous on the CPU) as safetensors, whole or not at all."""
    from safetensors.torch import save

    flat = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    write_bytes_atomic(path, save(flat, metadata=dict(metadata) if metadata else None))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises UserError naming the file, and for bad JSON the line and column."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise UserError(f"{path}: not usable JSON: {error}") from None


def safe_name(name: str, what: str = "name") -> str:
    """Return `name` if it can be one part of a path, else raise UserError. Letters of any script are fine."""
    bad = (
        not isinstance(name, str)
        or not name.strip()
        or name in {".", ".."}
        or name.startswith(("-", "."))
        or len(name) > _NAME_LIMIT
        or any(character in '/\\<>:"|?*' or not character.isprintable() for character in name)
    )
    if bad:
        raise UserError(
            f'{what} {name!r}: must be 1 to {_NAME_LIMIT} printable characters without / \\ < > : " | ? * '
            "and must not start with '-' or '.'"
        )
    return name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
