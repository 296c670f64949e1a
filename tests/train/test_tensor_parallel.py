"""Layers split over ranks by heads: the texts and images of one process, with half of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import pyunictokens as uct
from pyunictokens import RolloutEngine
from pyunictokens.config.training import LoraConfig
from pyunictokens.models import MagvitConfig, MagvitV2, ModelBundle
from pyunictokens.toy.model import load_toy
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.train.distributed.tensor_parallel import split_layers
from pyunictokens.train.policy import add_adapters
from pyunictokens.utils.errors import UserError

from ..models.llama_tiny import write_checkpoint
from .ranks import together

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*os.fork")
PROMPTS = ["a red dog", "what is the colour of the dog ?"]


def made(bundle: ModelBundle) -> tuple[Tensor, Tensor, Tensor]:
    """(codes of images, tokens of texts, their log-probs)."""
    drawn = RolloutEngine.of(bundle).generate_images(PROMPTS, samples=2, steps=4, guidance_scale=2.0, seed=1)
    writer = RolloutEngine.of(bundle.as_text())
    text = writer.write(PROMPTS, max_new_tokens=16, block_length=8, steps=8, temperature=1.0, seed=3)
    return drawn.codes, text.tokens, text.logp


def test_split_layers_draw_and_write_what_whole_ones_do(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "mmada", "mmada")
    torch.manual_seed(0)
    MagvitV2(MagvitConfig(8, (1, 1), (1, 1), (1, 1), (1, 1), 5, 4)).save_pretrained(place / "vq")

    def work(ranks: Ranks) -> tuple[float, list[Tensor], list[Tensor]]:
        bundle = uct.models.load(place, vq=place / "vq")
        before = made(bundle)
        split_layers(bundle.model, ranks)
        split = [value for value in bundle.model.parameters() if isinstance(value, DTensor)]
        own = sum(value.to_local().numel() for value in split)
        return own / sum(value.numel() for value in split), list(before), list(made(bundle))

    for part, before, after in together(2, work, tmp_path / "results"):
        assert part == 0.5
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
        assert torch.allclose(before[2], after[2], atol=1e-5)


def test_layers_that_cannot_be_split(tmp_path: Path) -> None:
    many = Ranks()
    with pytest.raises(UserError, match="the layers of show-o cannot be split over ranks"):
        split_layers(load_toy().model, many)
    model = uct.models.load(write_checkpoint(tmp_path / "llada", "llada")).model
    many.world = 3
    with pytest.raises(UserError, match=r"3 ranks: must divide the 2 heads of keys and the inner width 40 of llada"):
        split_layers(model, many)
    add_adapters(model, LoraConfig(rank=2, targets=("q_proj",)), seed=0)
    with pytest.raises(UserError, match="q_proj holds an adapter: merge adapters before"):
        split_layers(model, many)
