"""Safetensors files written one tensor at a time, so that saving a model needs no second copy of it in memory.

The file is written aside, flushed to disk and renamed; the checksum of its bytes is taken on the way.
The safetensors format: eight bytes of header length, a JSON header, raw data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...utils.files import named_errors, sync_folder

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 1 << 24


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors` (any device) to `path`, whole or not at all. Returns the SHA-256 of the file's bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    with named_errors(path):
        try:
            with open(aside, "wb") as file:
                for block in _blocks(tensors):
                    digest.update(block)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            sync_folder(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    return digest.hexdigest()


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {}
    offset = 0
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned for mapping
    for name in names:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            data: memoryview = flat.view(torch.uint8).numpy().data
            for start in range(0, len(data), _CHUNK):
                yield data[start : start + _CHUNK]
