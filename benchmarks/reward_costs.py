"""What scoring costs in floating-point operations, beside what the rollout costs that is scored.

    python -m benchmarks.reward_costs          the table of docs/rewards.md

Each network of the paper is run once on the meta device, which computes nothing, under torch's own counter: matrix
products, attention and convolutions count, a multiply-add as two operations. Photos, facts and prompts of a concept
cost once a run and are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyunictokens.train.costs import sizes_of
from pyunictokens.utils.errors import require


@dataclass(frozen=True)
class Setting:
    """One group that is scored; by default the paper's."""

    rows: int = 9
    """Images of the group."""
    side: int = 512
    """Pixels along a side of an image."""
    answer_tokens: int = 100
    """Tokens of an answer (the longest the paper's step allows)."""
    previews: int = 0
    """Early previews that DSOG has scored by BER beside the images."""
    dino_side: int = 224
    """Pixels DINOv2's processor cuts an image to."""
    smallest_face: int = 20
    """MTCNN's smallest face."""
    boxes: tuple[int, int] = (300, 40)
    """Boxes of an image that MTCNN's second and third network look at (a photograph of an astronaut has fewer)."""


class Configs(NamedTuple):
    """Configurations of the networks, as transformers has them."""

    tier: Any
    ber: Any
    der: Any


def paper_configs() -> Configs:
    """Configurations of the published networks: transformers' defaults are those of the checkpoints the paper names,
    but for the Q-Former that reads text."""
    transformers = require("transformers", "rewards")
    return Configs(
        transformers.ErnieConfig(),  # ernie-3.0-base
        transformers.Blip2Config(qformer_config={"use_qformer_text_input": True}),  # blip2-itm-vit-g
        transformers.Dinov2Config(),  # dinov2-base
    )


def counted(run: Callable[[], object]) -> int:
    """Operations of `run`."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def network(kind: str, config: Any) -> Any:
    """transformers' `kind` of network on the meta device, with attention as two products, which the counter sees."""
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return getattr(require("transformers", "rewards"), kind)(config).eval()


def text_flops(config: Any, tokens: int) -> int:
    """One text of `tokens` through ERNIE, its unused pooling head included."""
    net = network("ErnieModel", config)
    return counted(lambda: net(input_ids=torch.ones(1, tokens, dtype=torch.int64, device="meta")))


def dinov2_flops(config: Any, side: int) -> int:
    """One image of `side` pixels through DINOv2."""
    net = network("Dinov2Model", config)
    return counted(lambda: net(pixel_values=torch.empty(1, 3, side, side, device="meta")))


def blip2_image_flops(config: Any) -> int:
    """One image through BLIP-2's ViT, Q-Former and projection (the contrastive head)."""
    net, side = network("Blip2ForImageTextRetrieval", config), config.vision_config.image_size

    def encode() -> None:
        seen = net.vision_model(pixel_values=torch.empty(1, 3, side, side, device="meta")).last_hidden_state
        found = net.qformer(query_embeds=net.query_tokens, encoder_hidden_states=seen).last_hidden_state
        net.vision_projection(found)

    return counted(encode)


def facenet_flops() -> int:
    """One face through InceptionResnetV1."""
    library = require("facenet_pytorch", "rewards")
    return _passed(library.InceptionResnetV1(pretrained=None).eval(), 160, 160)


def mtcnn_flops(height: int, width: int, smallest: int, boxes: tuple[int, int]) -> int:
    """One image through MTCNN: P-Net over the pyramid, R-Net and O-Net over so many boxes."""
    models = require("facenet_pytorch.models.mtcnn", "rewards")
    with torch.device("meta"):
        first, second, third = (getattr(models, name)(pretrained=False) for name in ("PNet", "RNet", "ONet"))
    total, scale, least = 0, 12.0 / smallest, min(height, width) * 12.0 / smallest
    while least >= 12:
        total += _passed(first, int(height * scale + 1), int(width * scale + 1))
        scale, least = scale * 0.709, least * 0.709
    return total + boxes[0] * _passed(second, 24, 24) + boxes[1] * _passed(third, 48, 48)


def _passed(net: nn.Module, height: int, width: int) -> int:
    net = net.to("meta")
    return counted(lambda: net(torch.empty(1, 3, height, width, device="meta")))


def group_flops(setting: Setting | None = None) -> dict[str, int]:
    """Operations that scoring one group takes, by reward model."""
    s, c = setting or Setting(), paper_configs()
    return {
        "tier": s.rows * text_flops(c.tier, s.answer_tokens),
        "ber": (s.rows + s.previews) * blip2_image_flops(c.ber),
        "der": s.rows * dinov2_flops(c.der, s.dino_side),
        "fer": s.rows * (mtcnn_flops(s.side, s.side, s.smallest_face, s.boxes) + facenet_flops()),
    }


def rollout_flops(rows: int = 9, timesteps: int = 50, prompt: int = 129) -> float:
    """Operations of generating one group with Show-o at 512², guided, the prompt's keys and values kept."""
    costs = sizes_of("show-o-512")
    return timesteps * costs.image_step(rows, prompt, costs.count, True).flops


def table(setting: Setting | None = None) -> list[tuple[str, float, float]]:
    """(reward model, TFLOP a group, share of the rollout) of every reward model and of all together."""
    s = setting or Setting()
    costs, rollout = group_flops(s), rollout_flops(s.rows)
    costs["all four"] = sum(costs.values())
    return [(name, flops / 1e12, flops / rollout) for name, flops in costs.items()]


def markdown() -> str:
    """The table of docs/rewards.md."""
    lines = ["| reward model | TFLOP for a group of 9 | of the rollout |", "|---|---|---|"]
    lines += [f"| {name} | {tera:.3g} | {share:.3%} |" for name, tera, share in table()]
    previews = Setting(previews=8 * Setting.rows)
    tera, share = next((tera, share) for name, tera, share in table(previews) if name == "all four")
    lines.append(f"| all four, and BER of {previews.previews} previews | {tera:.3g} | {share:.3%} |")
    lines.append(f"| the rollout itself | {rollout_flops() / 1e12:.4g} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
