"""What scoring costs in floating-point operations, beside what the rollout costs that is scored.

    python -m pyunictokens.rewards.costs          the table of docs/rewards.md

Formulas over the networks' own configurations; a multiply-add counts as two operations, and only matrix products,
attention and convolutions are counted, as torch.utils.flop_counter does. The convolutional networks are not written
down again: they are counted on the meta device, which computes nothing. Photos, facts and prompts of a concept cost
once a run and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..utils.errors import require


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


class Encoder(Protocol):
    """Sizes of a transformer encoder, by transformers' names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int


class Dinov2(Protocol):
    """DINOv2's sizes, by transformers' names."""

    hidden_size: int
    num_hidden_layers: int
    patch_size: int
    mlp_ratio: int
    use_swiglu_ffn: bool


class Vit(Encoder, Protocol):
    """A ViT's sizes, by transformers' names."""

    image_size: int
    patch_size: int


class Qformer(Encoder, Protocol):
    """A Q-Former's sizes, by transformers' names."""

    encoder_hidden_size: int
    cross_attention_frequency: int


class Blip2(Protocol):
    """BLIP-2's sizes, by transformers' names."""

    vision_config: Vit
    qformer_config: Qformer
    num_query_tokens: int
    image_text_hidden_size: int


def encoder_flops(tokens: int, width: int, inner: int, layers: int, *, matrices: int = 2) -> int:
    """`tokens` of one input through a transformer encoder, whose MLP has 2 `matrices`, or 3 where it is gated."""
    projections = 2 * tokens * width * (4 * width + matrices * inner)
    attention = 4 * tokens * tokens * width
    return layers * (projections + attention)


def ernie_flops(config: Encoder, tokens: int) -> int:
    """One text of `tokens` through ERNIE (or BERT), its unused pooling head included."""
    body = encoder_flops(tokens, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    return body + 2 * config.hidden_size**2


def dinov2_flops(config: Dinov2, side: int) -> int:
    """One image of `side` pixels through DINOv2."""
    width, patch = config.hidden_size, config.patch_size
    patches = (side // patch) ** 2
    tokens = patches + 1 + int(getattr(config, "num_register_tokens", 0))
    inner, matrices = width * config.mlp_ratio, 2
    if config.use_swiglu_ffn:
        inner, matrices = (int(inner * 2 / 3) + 7) // 8 * 8, 3
    embedding = 2 * patches * 3 * patch * patch * width
    return embedding + encoder_flops(tokens, width, inner, config.num_hidden_layers, matrices=matrices)


def blip2_image_flops(config: Blip2) -> int:
    """One image through BLIP-2's ViT, Q-Former and projection (the contrastive head)."""
    vit, former = config.vision_config, config.qformer_config
    patches = (vit.image_size // vit.patch_size) ** 2
    seen, queries, width = patches + 1, config.num_query_tokens, former.hidden_size
    looking = 2 * patches * 3 * vit.patch_size**2 * vit.hidden_size
    looking += encoder_flops(seen, vit.hidden_size, vit.intermediate_size, vit.num_hidden_layers)
    asking = encoder_flops(queries, width, former.intermediate_size, former.num_hidden_layers)
    crossing = 2 * (2 * queries * width * width + 2 * seen * width * former.encoder_hidden_size)
    crossing += 4 * queries * seen * width
    crossed = -(-former.num_hidden_layers // former.cross_attention_frequency)
    return looking + asking + crossed * crossing + 2 * queries * width * config.image_text_hidden_size


def facenet_flops() -> int:
    """One face through InceptionResnetV1."""
    library = require("facenet_pytorch", "rewards")
    return _counted(library.InceptionResnetV1(pretrained=None).eval(), (1, 3, 160, 160))


def mtcnn_flops(height: int, width: int, smallest: int, boxes: tuple[int, int]) -> int:
    """One image through MTCNN: P-Net over the pyramid, R-Net and O-Net over so many boxes."""
    models = require("facenet_pytorch.models.mtcnn", "rewards")
    with torch.device("meta"):
        first, second, third = (getattr(models, name)(pretrained=False) for name in ("PNet", "RNet", "ONet"))
    total, scale, least = 0, 12.0 / smallest, min(height, width) * 12.0 / smallest
    while least >= 12:
        total += _counted(first, (1, 3, int(height * scale + 1), int(width * scale + 1)))
        scale, least = scale * 0.709, least * 0.709
    return total + boxes[0] * _counted(second, (1, 3, 24, 24)) + boxes[1] * _counted(third, (1, 3, 48, 48))


def _counted(net: torch.nn.Module, shape: tuple[int, ...]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    net = net.to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


class Configs(NamedTuple):
    """Configurations of the networks."""

    tier: Encoder
    ber: Blip2
    der: Dinov2


def paper_configs() -> Configs:
    """Configurations of the published networks: transformers' defaults are those of the checkpoints the paper names,
    but for the Q-Former that reads text."""
    transformers = require("transformers", "rewards")
    return Configs(
        transformers.ErnieConfig(),  # ernie-3.0-base
        transformers.Blip2Config(qformer_config={"use_qformer_text_input": True}),  # blip2-itm-vit-g
        transformers.Dinov2Config(),  # dinov2-base
    )


def group_flops(setting: Setting | None = None, configs: Configs | None = None) -> dict[str, int]:
    """Operations that scoring one group takes, by reward model."""
    s, c = setting or Setting(), configs or paper_configs()
    faces = mtcnn_flops(s.side, s.side, s.smallest_face, s.boxes) + facenet_flops()
    return {
        "tier": s.rows * ernie_flops(c.tier, s.answer_tokens),
        "ber": (s.rows + s.previews) * blip2_image_flops(c.ber),
        "der": s.rows * dinov2_flops(c.der, s.dino_side),
        "fer": s.rows * faces,
    }


def rollout_flops(
    rows: int = 9,
    timesteps: int = 50,
    *,
    width: int = 2048,
    inner: int = 8192,
    layers: int = 24,
    codes: int = 1024,
    codebook: int = 8192,
    prompt: int = 129,
) -> int:
    """Operations of generating one group with Show-o: guided, the prompt's keys kept, the head over image codes alone.

    The defaults are Show-o at 512². Both halves of the guidance go through the layers, their sum through the head.
    """
    drawn = codes + 2  # the image's codes between their two marks
    layer = 2 * drawn * (4 * width * width + 2 * width * inner) + 4 * drawn * (drawn + prompt) * width
    return rows * timesteps * (2 * layers * layer + 2 * codes * width * codebook)


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
