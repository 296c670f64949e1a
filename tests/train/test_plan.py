"""What `--plan` says: the numbers of docs/distributed.md, and which mode fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pyunictokens as uct
from pyunictokens.cli import app
from pyunictokens.config.training import GrpoConfig
from pyunictokens.models.llama_body import Body, BodyConfig
from pyunictokens.train.distributed.plan import GB, MODES, ROOM, Devices, Mode, Needed, Sizes, gathers_ahead, plan
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.utils.errors import UserError

from ..models.amused_tiny import write_pipeline
from ..models.llama_tiny import write_checkpoint


def llada_8b(full: bool = True) -> Sizes:
    with torch.device("meta"):
        body = Body(BodyConfig())
    each = [sum(value.numel() for value in block.parameters()) for block in body.transformer.blocks]
    return Sizes(sum(each), max(each), sum(value.numel() for value in body.parameters()) - sum(each), 2, full)


PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_the_numbers_of_the_page() -> None:
    sizes, page = llada_8b(), PAGE.read_text()
    for mode in MODES[1:]:
        needed = [round(sizes.needed(mode, ranks).most / GB) for ranks in (1, 8, 64)]
        name = " ".join(f"`{word.removeprefix('grpo.shard=')}`" for word in str(mode).split())
        first = needed[0] if mode.shard == "optimizer" else "–"
        assert f"| {name} | {first} | {needed[1]} | {needed[2]} |" in page
    assert round(sizes.needed(Mode("none"), 8).most / GB) == round(sizes.needed(Mode("optimizer"), 1).most / GB) == 160
    host = sizes.needed(Mode("full", offload=True), 8).host / GB
    assert f"{host:.0f} GB of the host's memory a GPU on 8" in page
    frozen = llada_8b(full=False)
    assert round(frozen.needed(Mode("none"), 8).most / GB) == 16, "adapters beside frozen weights"


def test_what_the_hosts_memory_takes_off_the_gpu() -> None:
    """Counted by hand for 3 layers of 100 weights in bfloat16 and 50 beside them, on 2 ranks."""
    sizes, ranks = Sizes(300, 100, 50, 2, True), 2
    rest = (2 + 4 + 2) * 50
    whole, state = 2 * 350, 12 * 350 / 2
    assert sizes.needed(Mode("full"), ranks) == Needed((2 + 4) * 150 + 2 * 100 + rest + state, whole + 2 * 150 + state)
    offloaded = Needed(2 * 100 + rest + 12 * 25, whole + 12 * 25, (2 + 4 + 12) * 150)
    assert sizes.needed(Mode("full", offload=True), ranks) == offloaded
    ahead = Needed(offloaded.update, 2 * (3 * 100 + 50) + 12 * 25, offloaded.host)
    assert sizes.needed(Mode("full", offload=True, ahead=True), ranks) == ahead
    averaged = replace(sizes, averaged=True).needed(Mode("full"), ranks)
    assert averaged.update == sizes.needed(Mode("full"), ranks).update + 4 * 350 / 2


def test_which_mode_is_taken() -> None:
    said = plan(llada_8b(), Devices(8, 80))
    assert "grpo.shard=optimizer: 76.1 GB in the update, 28.1 GB in the rollout: does not fit" in said
    assert said[-2] == "take grpo.shard=full" and "gathered once a step" in said[-1]
    assert plan(llada_8b(), Devices(8, 141))[-1] == "take grpo.shard=optimizer"
    assert plan(llada_8b(full=False), Devices(2, 24))[-1] == "take grpo.shard=none"
    assert plan(llada_8b(), Devices(8, 24))[-2] == "take grpo.shard=full grpo.offload=true"
    small = plan(llada_8b(), Devices(64, 16))
    assert small[-2] == "take grpo.shard=full grpo.rollout_gather=ahead" and "the next two on their way" in small[-1]
    assert plan(llada_8b(), Devices(64, 8))[-1].startswith("none fits")
    alone = plan(llada_8b(), Devices(1, 24))
    assert alone[-2].startswith("grpo.shard=full: not on one GPU") and alone[-1].startswith("none fits")


def test_a_run_gathers_as_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = uct.models.load(write_checkpoint(tmp_path / "llada", "llada")).model
    whole = Sizes.of(model, GrpoConfig(trainable="full"), model.dtype).needed(Mode("full"), 1).rollout

    def ahead(memory: float, **settings: Any) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
        config = GrpoConfig(trainable="full", shard="full", **settings)
        return gathers_ahead(model, config, Ranks("cuda"))

    assert not ahead(whole / ROOM + 1) and ahead(whole / ROOM - 1)
    assert ahead(1e12, rollout_gather="ahead") and not ahead(1, rollout_gather="once")
    assert not gathers_ahead(model, GrpoConfig(shard="full"), Ranks("cpu"))


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
