"""Short digests that tell one set of weights from another: of tensors in memory, of weight files on disk, of a text.

A fingerprint stands in run.json, measured.json and in the names of kept samples, so what these functions return for the
same input does not change. None depends on a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt"})
_BESIDE = frozenset(
    {"config.json", "tokenizer.json", "tokenizer_config.json", "concept.json", "policy.json", "adapter_config.json"}
    | {"database.json"}
)
"""What stands beside weights and decides what they say."""


def digest(text: str) -> str:
    """SHA-256 of a text, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A short checksum of sixteen numbers of every tensor: tells other weights apart without reading gigabytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1)
        found.update(f"{name}{tuple(tensors[name].shape)}".encode())
        found.update(flat[:: max(1, flat.numel() // 16)][:16].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def of_files(path: str | os.PathLike[str]) -> str:
    """A digest of the weights under a local folder (or of one file) and of what stands beside them, by names and
    contents; "" where none is local.

    Weights trained anew, or changed in one bit, are another model, whatever the times of their files say.
    """
    place = Path(path).expanduser()
    if not str(path):
        return ""
    files = [place] if place.is_file() else sorted(place.glob("**/*")) if place.is_dir() else []
    weights = [file for file in files if (file.suffix in _WEIGHTS or file.name in _BESIDE) and file.is_file()]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        found = [f"{file.name} {sha}" for file, sha in zip(weights, pool.map(of_file, weights), strict=True)]
    return digest("\n".join(found))[:16] if found else ""


def of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    return found.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory, by which equal ones are found."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
