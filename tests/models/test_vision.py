"""The CLIP-ViT variant from a photo to an answer: CLIP's own library beside ours, and the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.models import MagvitConfig, MagvitV2, Showo, ShowoConfig
from pyunictokens.models.vision import SYSTEM, ClipVision
from pyunictokens.utils.errors import UserError
from tests.runs.real_layout import write_tokenizer


def write_tower(folder: Path) -> Path:
    """CLIP's image encoder of two by two patches."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tower(tmp_path_factory.mktemp("clip"))


def test_features_are_the_librarys_with_its_own_processor(tower: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModel

    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    with torch.no_grad():
        shown = processor(picture, return_tensors="pt").pixel_values
        wanted = CLIPVisionModel.from_pretrained(tower).eval()(shown, output_hidden_states=True).hidden_states[-2]
    net = ClipVision.from_pretrained(tower)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    found = net.features(pixels)
    assert found.shape == (1, 4, 1024) and torch.allclose(found, wanted[:, 1:], atol=1e-4)
    assert net.features(torch.rand(2, 3, 50, 50)).shape == (2, 4, 1024)


def test_an_answer_by_the_command_line(tower: Path, tmp_path: Path) -> None:
    text = write_tokenizer(tmp_path / "phi")
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "max_text": 24, "max_position_embeddings": 512}
    codes = {"vocab_size": text + 10 + 32 + 1, "llm_vocab_size": text, "codebook_size": 32, "num_vq_tokens": 16}
    Showo(ShowoConfig(**sizes, **ids, **codes, w_clip_vit=True)).save_pretrained(tmp_path / "model")
    MagvitV2(MagvitConfig(8, (1, 1, 2), (1, 1, 2), (1, 1, 1), (1, 1, 1), 5, 4)).save_pretrained(tmp_path / "vq")
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    parts = [f"--{part}" if not index else str(tmp_path / part) for part in ("model", "vq") for index in (0, 1)]
    words = ["understand", "base", str(tmp_path / "x.png"), "What is it?", *parts, "--tokenizer", str(tmp_path / "phi")]
    words += ["max_new_tokens=3", "--device", "cpu"]
    answer = CliRunner().invoke(app, [*words, "--vision", str(tower)])
    assert answer.exit_code == 0 and answer.output.endswith("\n"), answer.output
    assert SYSTEM.endswith(" ")
    with pytest.raises(UserError, match="is no CLIP checkpoint"):
        ClipVision.from_pretrained(tmp_path / "vq")
