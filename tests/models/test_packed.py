"""Weights of six bits: what a row loses, odd sizes, and files that do not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyunictokens.models.checkpoint import load_tensors
from pyunictokens.models.packed import pack, unpack
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import save_safetensors_atomic


@pytest.mark.parametrize("shape", [(37, 29), (5, 7, 3, 11), (1, 1025), (1024, 1), (64, 64)])
def test_a_row_keeps_its_numbers_to_half_a_step(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(sum(shape))
    weights = {"w": torch.randn(shape) * torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1)) * 9}
    save_safetensors_atomic(tmp_path / "x.safetensors", pack(weights))
    found = load_tensors(tmp_path / "x.safetensors")["w"]
    assert found.shape == weights["w"].shape and found.dtype == torch.float32
    step = weights["w"].flatten(1).abs().amax(1) / 31
    off = (found - weights["w"]).flatten(1).abs().amax(1)
    assert (off <= 0.52 * step + 1e-6).all() and off.max() > 0
    packed = (tmp_path / "x.safetensors").stat().st_size
    assert packed < 0.75 * weights["w"].numel() + 2 * shape[0] + 700


def test_vectors_small_tables_and_whole_numbers_stay() -> None:
    weights = {"bias": torch.arange(2000.0), "small": torch.ones(3, 4), "ids": torch.arange(2048).view(2, -1)}
    packed = pack(weights)
    assert packed.keys() == weights.keys() and packed["ids"].dtype == torch.int64
    assert all(torch.equal(unpack(packed, "x")[name].to(value.dtype), value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"w.scale": None}, "its scale or shape is missing"),
        ({"w.shape": None}, "its scale or shape is missing"),
        ({"w.shape": torch.tensor([40, 41])}, "do not fit its shape"),
        ({"w.shape": torch.tensor([-40, -40])}, "do not fit its shape"),
        ({"w.shape": torch.tensor([float("nan"), 40.0])}, "must be whole numbers"),
        ({"w.scale": torch.ones(3)}, "do not fit its shape"),
        ({"w.packed": torch.ones(5)}, "do not fit its shape"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, torch.Tensor | None], said: str) -> None:
    packed = {**pack({"w": torch.randn(40, 40)}), **change}
    with pytest.raises(UserError, match=said):
        unpack({name: value for name, value in packed.items() if value is not None}, "file")
