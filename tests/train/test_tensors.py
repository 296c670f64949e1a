"""Tensor files: readable by the safetensors library, whole or absent, with the checksum of their bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyunictokens.train.checkpoint import tensors
from pyunictokens.utils import files
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.fingerprint import of_file

EVERY = {
    "double": torch.randn(3, dtype=torch.float64),
    "a.float": torch.randn(5, 7)[:, ::2],
    "half": torch.randn(3, 1).half(),
    "brain": torch.randn(2, 3, 2).bfloat16(),
    "count": torch.tensor(7),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 4),
}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.safetensors"
    digest = tensors.write_tensors(path, EVERY)
    for read in (load_file(path), files.read_safetensors(path)):
        assert read.keys() == EVERY.keys()
        for name, value in EVERY.items():
            assert read[name].dtype == value.dtype and torch.equal(read[name], value), name
    assert digest == of_file(path)
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    tensors.write_tensors(path, {"a": torch.ones(3)})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        tensors.write_tensors(path, {"a": torch.zeros(3)})
    assert torch.equal(files.read_safetensors(path)["a"], torch.ones(3))
    assert len(list(tmp_path.iterdir())) == 1


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="no such file"):
        files.read_safetensors(path)
    tensors.write_tensors(path, EVERY)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        files.read_safetensors(path)
