"""What `--plan` says: the numbers of docs/distributed.md, and which mode fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.models.llama_body import Body, BodyConfig
from pyunictokens.train.distributed.plan import GB, Devices, Sizes, plan
from pyunictokens.utils.errors import UserError

from ..models.amused_tiny import write_pipeline
from ..models.llama_tiny import write_checkpoint


def llada_8b(full: bool = True) -> Sizes:
    with torch.device("meta"):
        body = Body(BodyConfig())
    each = [sum(value.numel() for value in block.parameters()) for block in body.transformer.blocks]
    return Sizes(sum(each), max(each), sum(value.numel() for value in body.parameters()) - sum(each), 2, full)


def test_the_numbers_of_the_page() -> None:
    sizes = llada_8b()
    needed = {
        (shard, ranks): round(max(sizes.needed(shard, ranks)) / GB)
        for shard in ("none", "optimizer", "full")
        for ranks in (1, 8, 64)
    }
    assert [needed["optimizer", ranks] for ranks in (1, 8, 64)] == [160, 76, 66]
    assert [needed["full", ranks] for ranks in (8, 64)] == [30, 18]
    assert needed["none", 8] == needed["none", 64] == 160
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    assert "| `optimizer` | 160 | 76 | 66 |" in page and "| `full` | – | 30 | 18 |" in page
    frozen = llada_8b(full=False)
    assert round(max(frozen.needed("none", 8)) / GB) == 16, "adapters beside frozen weights"


def test_which_mode_is_taken() -> None:
    said = plan(llada_8b(), Devices(8, 80))
    assert "grpo.shard=optimizer: 76.1 GB in the update, 28.1 GB in the rollout: does not fit" in said
    assert said[-2] == "take grpo.shard=full" and "gathered once a step" in said[-1]
    assert plan(llada_8b(), Devices(8, 141))[-1] == "take grpo.shard=optimizer"
    assert plan(llada_8b(full=False), Devices(2, 24))[-1] == "take grpo.shard=none"
    small = plan(llada_8b(), Devices(64, 16))
    assert "two layers ahead would take" in small[-2] and small[-1].startswith("none fits")
    assert plan(llada_8b(), Devices(1, 24))[-1].startswith("none fits")


@pytest.mark.parametrize("text", ["8", "0x80", "8x0", "x80", "8x80GB", "-1x80"])
def test_devices_that_cannot_be(text: str) -> None:
    with pytest.raises(UserError, match="must be GPUs times GB of each, as in 8x80"):
        Devices.read(text)


def test_the_command_says_it_and_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red dog\n")

    def said(folder: Path) -> str:
        words = ["reinforce", str(tmp_path / "prompts.txt"), "--reward", "maths", "--model", str(folder)]
        result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run"), "--plan", "2x80", "trainable=full"])
        assert result.exit_code == 0, result.output
        return result.output

    assert "take grpo.shard=none" in said(write_checkpoint(tmp_path / "llada", "llada"))
    assert "grpo.shard=full: not for this model" in said(write_pipeline(tmp_path / "amused"))
    assert not (tmp_path / "run").exists()
