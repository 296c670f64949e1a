"""What torch's counter finds against the arithmetic of a transformer, and the share of the rollout that is promised."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from benchmarks import reward_costs as cost

from .checkpoints import Folders, pixels_of


def encoder(tokens: int, width: int, inner: int, layers: int) -> int:
    """Four projections and the MLP's two of every token, and attention's two products."""
    return layers * (2 * tokens * (4 * width * width + 2 * width * inner) + 4 * tokens * tokens * width)


@pytest.mark.parametrize("tokens", [3, 11])
def test_ernie(tokens: int) -> None:
    config = transformers.ErnieConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
    )
    assert cost.text_flops(config, tokens) == encoder(tokens, 24, 40, 2) + 2 * 24 * 24  # the pooling head


@pytest.mark.parametrize(("side", "patches"), [(28, 16), (49, 49)])
def test_dinov2(side: int, patches: int) -> None:
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=7, mlp_ratio=4
    )
    embedding = 2 * patches * 3 * 7 * 7 * 24
    assert cost.dinov2_flops(config, side) == embedding + encoder(patches + 1, 24, 96, 2)


def test_blip2() -> None:
    """The ViT, six layers' worth of Q-Former that look at the image, all twelve at the queries, the projection."""
    config = cost.paper_configs().ber
    vit, former = config.vision_config, config.qformer_config
    seen, queries, width = (224 // 14) ** 2 + 1, 32, former.hidden_size
    looking = 2 * (seen - 1) * 3 * 14 * 14 * 1408 + encoder(seen, 1408, vit.intermediate_size, 39)
    asking = encoder(queries, width, former.intermediate_size, 12)
    crossing = 4 * queries * width * width + 4 * seen * width * 1408 + 4 * queries * seen * width
    want = looking + asking + 6 * crossing + 2 * queries * width * config.image_text_hidden_size
    assert cost.blip2_image_flops(config) == want


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
    total = cost.counted(lambda: net.encode_faces(photo))
    assert total == cost.mtcnn_flops(512, 512, 20, (seen["r"], seen["o"])) + cost.facenet_flops()
    assert all(here <= allowed for here, allowed in zip(seen.values(), cost.Setting().boxes, strict=True)), seen


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_page_shows_the_table() -> None:
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "rewards.md"
    assert cost.markdown() in page.read_text(encoding="utf-8"), "python -m benchmarks.reward_costs prints it"
