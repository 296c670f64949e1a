"""The rollout workloads that are measured: one model, the engine on one side, the published loop on the other; and the
work that DSOG does for an accepted image, which is counted and not timed.

The model: 8 layers of width 512, 256 codes, a codebook of 4096, a group of 4, guidance on.
Its text vocabulary is that of the published checkpoints (50 295 ids): the published loop pays for the whole head at
every position. A small one (--text-vocabulary 2000) shows what is left when it does not. Weights are random: time does
not depend on them. Both sides run in one process in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.baselines import showo_plain
from pyunictokens import MASK, DsogThreshold, RolloutEngine
from pyunictokens.models import ImageTokenizer, Showo, ShowoConfig
from pyunictokens.rollout import Dsog

GROUP = 4
GUIDANCE = 5.0
MAX_TEXT = 128
PROMPT_IDS = 24
CONTEXT = 290
"""Tokens before an answer: task, soi, 256 codes, eoi and a question of 31 ids."""

TEXT_VOCABULARY = 50295
CODES, CODEBOOK = 256, 4096


@dataclass(frozen=True)
class Case:
    """One workload: both callables do the same work from the same inputs; `per` says what one call makes."""

    name: str
    peer: str
    ours: Callable[[], object]
    plain: Callable[[], object]
    per: str
    settings: dict[str, object]


def build_model(text_vocabulary: int = TEXT_VOCABULARY, seed: int = 0) -> Showo:
    """The measured model. Its answers never end by themselves, so that both sides draw equally many tokens."""
    torch.manual_seed(seed)
    config = ShowoConfig(
        vocab_size=text_vocabulary + 10 + CODEBOOK + 1,
        llm_vocab_size=text_vocabulary,
        codebook_size=CODEBOOK,
        num_vq_tokens=CODES,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
        bos_token_id=text_vocabulary - 1,
        eos_token_id=text_vocabulary - 1,
        max_text=MAX_TEXT,
    )
    model = Showo(config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.randn_like(parameter) * 0.02)
        elif "layernorm.weight" not in name:
            parameter.zero_()
    model.showo.lm_head.bias[config.eos_token_id] = -1e4
    return model


def _shared(model: Showo) -> dict[str, object]:
    return {"group": GROUP, "codes": CODES, "codebook": CODEBOOK, "text_vocabulary": model.config.llm_vocab_size}


def images_case(model: Showo, steps: int) -> Case:
    """A group of four images of one prompt, with guidance and recording as in training, without pixels."""
    prompt = torch.randint(0, 1000, (PROMPT_IDS,), generator=torch.Generator().manual_seed(1)).tolist()
    engine = RolloutEngine(model)
    unknown = torch.full((GROUP, CODES), MASK)

    def ours() -> object:
        return engine.generate_images([prompt], samples=GROUP, steps=steps, guidance_scale=GUIDANCE, decode=False)

    def plain() -> object:
        return showo_plain.generate_images(
            model, [prompt] * GROUP, unknown, max_text=MAX_TEXT, steps=steps, guidance_scale=GUIDANCE
        )

    settings = {**_shared(model), "steps": steps, "guidance_scale": GUIDANCE, "prompt_ids": PROMPT_IDS}
    return Case("images", "published loop, whole sequence and vocabulary", ours, plain, "group", settings)


def text_case(model: Showo, tokens: int) -> Case:
    """Four answers of `tokens` tokens to one question about one image: a context of 290 tokens."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, CODEBOOK, (1, CODES), generator=generator)
    question = [
        model.config.bos_token_id,
        *torch.randint(0, 1000, (CONTEXT - CODES - 4,), generator=generator).tolist(),
    ]
    engine = RolloutEngine(model)

    def ours() -> object:
        return engine.generate_text(codes, [question], samples=GROUP, max_new_tokens=tokens)

    def plain() -> object:
        return showo_plain.generate_text(
            model, codes.expand(GROUP, -1), [question] * GROUP, max_new_tokens=tokens, end_id=model.config.eos_token_id
        )

    settings = {**_shared(model), "tokens": tokens, "context": CONTEXT, "temperature": 1.0}
    return Case("text", "published loop, whole sequence again for each token", ours, plain, "group", settings)


# --- DSOG: work counted --------------------------------------------------------------------------------------------

DSOG_GROUP, DSOG_STEPS, DSOG_PREVIEW, DSOG_PASS_RATE = 9, 50, 10, 0.25
"""The paper's group, timesteps and target pass rate; the preview at a fifth of the timesteps."""


class _NoPixels(ImageTokenizer):
    """An image tokenizer for a scorer that does not look."""

    downsampling, codebook_size = 1, 64

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def encode(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, codes: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        return codes.new_zeros(len(codes), 3, 1, 1).float()


def dsog_work(groups: int, seed: int = 0) -> dict[str, object]:
    """Model row-steps for each accepted image of `groups` groups, of which one preview in four passes.

    Of every four previews in a row one passes, which one is drawn at random. The least possible is
    T + preview·(1/pass rate − 1): every accepted image takes T steps, every rejected candidate those to its preview.
    """
    one_in = round(1 / DSOG_PASS_RATE)
    config = ShowoConfig(
        vocab_size=100 + 10 + 64 + 1,
        llm_vocab_size=100,
        codebook_size=64,
        num_vq_tokens=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        max_text=8,
    )
    torch.manual_seed(seed)
    engine = RolloutEngine(Showo(config).requires_grad_(False).eval(), _NoPixels())
    generator = torch.Generator().manual_seed(seed)
    verdicts: list[float] = []

    def scorer(pixels: Tensor, prompt_index: Tensor) -> Tensor:
        while len(verdicts) < len(pixels):
            lucky = int(torch.randint(one_in, (1,), generator=generator))
            verdicts.extend(float(place == lucky) for place in range(one_in))
        scores = verdicts[: len(pixels)]
        del verdicts[: len(pixels)]
        return torch.tensor(scores)

    row_steps = accepted = previewed = 0
    for group in range(groups):
        report = engine.generate_images(
            [[2, 3, 4]],
            samples=DSOG_GROUP,
            steps=DSOG_STEPS,
            guidance_scale=0.0,
            seed=group,
            dsog=Dsog(DsogThreshold(), scorer, DSOG_PREVIEW),
            record=False,
            decode=False,
        ).dsog
        assert report is not None
        row_steps, accepted = row_steps + report.row_steps, accepted + report.accepted
        previewed += report.previewed
    least = DSOG_STEPS + DSOG_PREVIEW * (1 / DSOG_PASS_RATE - 1)
    return {
        "row_steps_per_image": round(row_steps / accepted, 2),
        "least": least,
        "above_least_percent": round(100 * (row_steps / accepted / least - 1), 2),
        "images": accepted,
        "previews": previewed,
        "settings": {
            "group": DSOG_GROUP,
            "steps": DSOG_STEPS,
            "preview": DSOG_PREVIEW,
            "pass_rate": DSOG_PASS_RATE,
            "groups": groups,
        },
    }
