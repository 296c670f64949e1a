"""Short digests that tell one set of weights from another: of tensors in memory, of weight files on disk, of a text.

A fingerprint stands in run.json, measured.json and in the names of kept samples, so what these functions return for the
same input never changes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt"})


def digest(text: str) -> str:
    """SHA-256 of a text, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A short checksum of sixteen numbers of every tensor: tells other weights apart without reading gigabytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1)
        found.update(f"{name}{tuple(tensors[name].shape)}".encode())
        found.update(flat[:: max(1, flat.numel() // 16)][:16].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def of_files(path: str | os.PathLike[str]) -> str:
    """A digest of the weights under a local folder (or of one file), by names, sizes and times; "" where none is local.

    Weights trained anew at the same place are another model.
    """
    place = Path(path).expanduser()
    if not str(path):
        return ""
    files = [place] if place.is_file() else sorted(place.glob("**/*")) if place.is_dir() else []
    found = [
        f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
        for file in files
        if file.suffix in _WEIGHTS and file.is_file()
    ]
    return digest("\n".join(found))[:16] if found else ""
