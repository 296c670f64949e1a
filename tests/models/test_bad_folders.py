"""Folders that do not fit: of another family, with sizes that do not divide, with tokenizers that lack the ids."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyunictokens as uct
from pyunictokens.models import MagvitConfig, MagvitV2
from pyunictokens.models.amused import Amused, AmusedVQ
from pyunictokens.models.dimoo import Dimoo
from pyunictokens.models.llada import LlamaWriter
from pyunictokens.models.llama_body import BodyConfig
from pyunictokens.models.mmada import Mmada
from pyunictokens.models.registry import FAMILIES
from pyunictokens.utils.errors import UserError

from ..rollout.tiny import tiny_model
from .amused_tiny import write_pipeline
from .llama_tiny import CODES, write_checkpoint


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llada"), "llada")


@pytest.fixture(scope="module")
def mmada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mmada"), "mmada")


@pytest.fixture(scope="module")
def amused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("amused"))


def changed(folder: Path, to: Path, file: str, **values: Any) -> Path:
    """A copy of `folder` in whose JSON file the given keys are others, or gone where they are None."""
    shutil.copytree(folder, to)
    known = {**json.loads((to / file).read_text()), **values}
    (to / file).write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
    return to


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n_heads": 5}, "n_heads=5 does not divide the width 24 of the weights"),
        ({"mask_token_id": 10**6}, "mask_token_id=1000000: must be an id below vocab_size="),
        ({"eos_token_id": 10**6}, "eos_token_id=1000000: must be an id below vocab_size="),
    ],
)
def test_sizes_and_ids_of_a_body(llada: Path, tmp_path: Path, values: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LlamaWriter.from_pretrained(changed(llada, tmp_path / "it", "config.json", **values))


def test_widths_that_do_not_divide() -> None:
    with pytest.raises(UserError, match="d_model=10: must be n_heads=3 times an even width"):
        BodyConfig(d_model=10, n_heads=3, n_kv_heads=3)
    with pytest.raises(UserError, match="n_heads a multiple of n_kv_heads=3"):
        BodyConfig(d_model=16, n_heads=4, n_kv_heads=3)


def test_tokenizers_that_lack_the_ids(llada: Path, mmada: Path, tmp_path: Path) -> None:
    without = changed(llada, tmp_path / "eos", "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="its tokenizer names no eos_token: name it in"):
        LlamaWriter.from_pretrained(without)
    without = changed(mmada, tmp_path / "bos", "tokenizer_config.json", bos_token=None)
    with pytest.raises(UserError, match="its tokenizer names no bos_token: name it in"):
        Mmada.from_pretrained(without)


@pytest.fixture(scope="module")
def folders(
    llada: Path, mmada: Path, amused: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, ...]]:
    """Tiny checkpoints by what they are."""
    place = tmp_path_factory.mktemp("others")
    tiny_model(dtype=torch.float32).save_pretrained(place / "showo")
    MagvitV2(MagvitConfig(8, (1, 1), (1, 1), (1, 1), (1, 1), 5, 4)).save_pretrained(place / "magvit")
    dimoo = changed(llada, place / "dimoo", "config.json", architectures=["LLaDAForMultiModalGeneration"])
    return {
        "show-o": (place / "showo",),
        "amused": (amused,),
        "lumina-dimoo": (dimoo,),
        "mmada": (mmada,),
        "llada": (llada,),
        "magvit-v2": (place / "magvit",),
        "diffusers' VQModel": (amused / "vqvae", amused),
    }


@pytest.mark.parametrize(
    ("own", "load"),
    [
        ("show-o", uct.Showo.from_pretrained),
        ("amused", Amused.from_pretrained),
        ("lumina-dimoo", Dimoo.from_pretrained),
        ("mmada", Mmada.from_pretrained),
        ("llada", LlamaWriter.from_pretrained),
        ("magvit-v2", MagvitV2.from_pretrained),
        ("diffusers' VQModel", AmusedVQ.from_pretrained),
    ],
)
def test_every_loader_names_what_it_found(
    folders: dict[str, tuple[Path, ...]], own: str, load: Callable[[Path], object]
) -> None:
    for other, (place, *_) in folders.items():
        if place in folders[own]:
            continue
        way_out = "open it with pyunictokens.models.load, or " if other in FAMILIES else ""
        said = f"{place}: a checkpoint of {other}, not of {own}: {way_out}give a folder of {own}"
        with pytest.raises(UserError, match=re.escape(said)):
            load(place)


def test_the_folder_says_which_family_it_is(llada: Path, amused: Path) -> None:
    family = {place: uct.models.load(place).model.family for place in (llada, amused)}
    assert list(family.values()) == ["llada", "amused"]


def test_parts_of_two_pipelines(amused: Path, tmp_path: Path) -> None:
    other = write_pipeline(tmp_path / "other", codes=CODES)
    with pytest.raises(UserError, match=rf"the image tokenizer .* has {CODES} codes, the model 24"):
        uct.models.load(amused, torch.float32, vq=other)
    wide = write_pipeline(tmp_path / "wide", encoder_hidden_size=20)
    with pytest.raises(UserError, match="its transformer reads text of width 20, its text encoder gives 16"):
        Amused.from_pretrained(wide)
