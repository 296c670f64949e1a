"""The cost formulas against torch's own counter on small networks, and the share of the rollout they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from pyunictokens.rewards import costs as cost

from .checkpoints import Folders, pixels_of, save_dinov2


def counted(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def open_plain(folder: Any, kind: Any = transformers.AutoModel) -> Any:
    """The network with attention as two matrix products, which the counter can see on any device."""
    return kind.from_pretrained(folder, attn_implementation="eager").requires_grad_(False).eval()


@pytest.mark.parametrize("words", [1, 9])
def test_ernie(saved: Folders, words: int) -> None:
    net = open_plain(saved.ernie)
    ids = torch.ones(3, words + 2, dtype=torch.int64)
    assert counted(lambda: net(input_ids=ids)) == 3 * cost.ernie_flops(net.config, words + 2)


@pytest.mark.parametrize(("registers", "side"), [(0, 28), (0, 49), (2, 28)])
def test_dinov2(tmp_path: Any, registers: int, side: int) -> None:
    net = open_plain(save_dinov2(tmp_path, registers))
    pixels = torch.zeros(2, 3, side, side)
    assert counted(lambda: net(pixel_values=pixels)) == 2 * cost.dinov2_flops(net.config, side)


def test_dinov2_with_a_gated_mlp() -> None:
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=7, use_swiglu_ffn=True
    )
    config._attn_implementation = "eager"
    net = transformers.Dinov2Model(config).eval()
    assert counted(lambda: net(pixel_values=torch.zeros(1, 3, 28, 28))) == cost.dinov2_flops(config, 28)


def test_blip2(saved: Folders) -> None:
    from pyunictokens.rewards.experts.ber import BerConfig, Blip2

    net = Blip2(BerConfig(str(saved.blip2)))
    net._modules = (open_plain(saved.blip2, transformers.Blip2ForImageTextRetrieval),)
    net.prepare = lambda pixels: pixels  # type: ignore[method-assign]
    want = 3 * cost.blip2_image_flops(net._modules[0].config)
    assert counted(lambda: net.encode_image(torch.zeros(3, 3, 28, 28))) == want


def test_faces(saved: Folders) -> None:
    """The whole search of a photograph, with as many boxes as its second and third network saw."""
    skimage_data = pytest.importorskip("skimage.data")
    from pyunictokens.rewards.experts.facenet import FerConfig, MtcnnFaceNet

    net = MtcnnFaceNet(FerConfig(str(saved.facenet)))
    finder: Any = net.load()[0]
    seen: dict[str, int] = {"r": 0, "o": 0}
    finder.rnet.register_forward_hook(lambda module, args, _: seen.update(r=seen["r"] + len(args[0])))
    finder.onet.register_forward_hook(lambda module, args, _: seen.update(o=seen["o"] + len(args[0])))
    photo = pixels_of(skimage_data.astronaut())
    total = counted(lambda: net.encode_faces(photo))
    assert total == cost.mtcnn_flops(512, 512, 20, (seen["r"], seen["o"])) + cost.facenet_flops()
    assert all(here <= allowed for here, allowed in zip(seen.values(), cost.Setting().boxes, strict=True)), seen


def test_scoring_costs_a_small_part_of_the_rollout() -> None:
    rows = {name: share for name, _, share in cost.table()}
    assert set(rows) == {"tier", "ber", "der", "fer", "all four"}
    assert rows["all four"] == pytest.approx(sum(share for name, share in rows.items() if name != "all four"))
    assert rows["all four"] <= 0.10
    with_previews = {name: share for name, _, share in cost.table(cost.Setting(previews=8 * 9))}
    assert rows["all four"] < with_previews["all four"] <= 0.10


def test_the_rollout_is_the_one_the_design_speaks_of() -> None:
    assert cost.rollout_flops() == pytest.approx(2.4e15, rel=0.05)
    assert cost.rollout_flops(rows=18) == 2 * cost.rollout_flops()


def test_the_networks_are_the_papers() -> None:
    c = cost.paper_configs()
    vit = c.ber.vision_config
    assert (vit.hidden_size, vit.num_hidden_layers, vit.image_size) == (1408, 39, 224)  # ViT-g
    assert (c.ber.qformer_config.num_hidden_layers, c.ber.num_query_tokens) == (12, 32)
    assert (c.der.hidden_size, c.der.num_hidden_layers, c.der.patch_size) == (768, 12, 14)
    assert (c.tier.hidden_size, c.tier.num_hidden_layers) == (768, 12)


def test_the_page_shows_the_table() -> None:
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "rewards.md"
    assert cost.markdown() in page.read_text(encoding="utf-8"), "python -m pyunictokens.rewards.costs prints it"
