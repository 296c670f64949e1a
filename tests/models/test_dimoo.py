"""Lumina-DiMOO behind the seam: the published loop's codes with its own re-masking, gradients' place, a run, files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens import RolloutEngine, ops
from pyunictokens.models import ModelBundle, Sources
from pyunictokens.models.dimoo import Dimoo
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import image_logprobs
from pyunictokens.utils.errors import UserError

from ..rollout.tiny import philox_noise
from .llama_tiny import CODES, SIDE, WORDS, Plain, write_checkpoint

N = SIDE * SIDE
PROMPTS = ["a photo of a red dog", "", "big cat in the snow . what is the colour ? a a a a a a a a a a"]
MASKED, FIRST = 3, 4 + len(WORDS)
NEWLINE, BOI, EOI, ANSWER, END = range(FIRST, FIRST + 5)
"""Some of the tokenizer's reserved ids stand for the published ones."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import diffusers

    place = write_checkpoint(tmp_path_factory.mktemp("dimoo"), "mmada")
    config = json.loads((place / "config.json").read_text())
    kept = {name: config[name] for name in ("n_heads", "rope_theta", "rms_norm_eps", "mask_token_id", "eos_token_id")}
    kept |= {"architectures": ["LLaDAForMultiModalGeneration"], "model_type": "llada", "max_text": 30}
    kept |= {"max_sequence_length": 96, "codebook_size": CODES, "grid_side": SIDE}
    kept |= {"newline_id": NEWLINE, "boi_id": BOI, "eoi_id": EOI, "answer_id": ANSWER, "answer_end_id": END}
    (place / "config.json").write_text(json.dumps(kept))
    torch.manual_seed(0)
    vq = diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=6,
        num_vq_embeddings=CODES,
        norm_num_groups=4,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    vq.save_pretrained(place / "vqvae")
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> ModelBundle:
    return uct.models.load(folder, torch.float64)


def sequence(bundle: ModelBundle, text: str, codes: list[int]) -> tuple[list[int], list[int]]:
    """(ids as the published loop has them, where the codes stand)."""
    encode = bundle.tokenizer._tokenizer.encode
    words = text or "<uncondition>"
    whole = f"<system>Generate an image according to the text prompt.</system><user>{words}</user>"
    before = encode(whole, add_special_tokens=False).ids
    after = encode("</user>", add_special_tokens=False).ids
    before = before if len(before) <= 30 else [*before[: 30 - len(after)], *after]
    ids, places = [*before, ANSWER, BOI], []
    offset = bundle.model.image_head()[0].storage_offset() // bundle.model.width
    for row in range(SIDE):
        for code in codes[row * SIDE : (row + 1) * SIDE]:
            places.append(len(ids))
            ids.append(MASKED if code < 0 else code + offset)
        ids.append(NEWLINE)
    return [*ids, EOI, END], places


def guided(bundle: ModelBundle, plain: Plain, text: str, codes: list[int], scale: float) -> Tensor:
    halves = []
    for words in (text, ""):
        ids, places = sequence(bundle, words, codes)
        halves.append(plain.logits(ids)[places, -CODES:])
    return (1 + scale) * halves[0] - scale * halves[1]


@pytest.mark.parametrize(("steps", "scale", "heat"), [(6, 4.0, 1.0), (5, 0.0, 0.5), (4, 2.0, 0.0)])
def test_draws_what_the_published_loop_draws(
    folder: Path, bundle: ModelBundle, steps: int, scale: float, heat: float
) -> None:
    plain = Plain(folder)
    with pytest.warns(UserWarning, match="are read"):
        rollout = RolloutEngine.of(bundle).generate_images(
            PROMPTS, steps=steps, guidance_scale=scale, temperature=heat, seed=9
        )
    assert rollout.inputs is not None and rollout.logp is not None
    for row, prompt in enumerate(PROMPTS):
        noise, codes = philox_noise(9, [row], N, CODES), [-1] * N
        chosen: list[int] = []
        for step in range(steps):
            assert rollout.inputs[row, step].tolist() == codes
            logp = guided(bundle, plain, prompt, codes, scale).log_softmax(-1)
            token, rank = noise(step)
            chosen = [int((logp[n] + token[0, n]).argmax()) if code < 0 else code for n, code in enumerate(codes)]
            unknown = [n for n in range(N) if codes[n] < 0]
            wanted = int(N * torch.cos(torch.tensor((step + 1) / steps * torch.pi / 2)))
            again = min(len(unknown) - 1, max(1, wanted))
            chance = {n: math.exp(float(logp[n, chosen[n]])) for n in unknown}
            surest = sorted(unknown, key=lambda n: chance[n] if heat == 0 else chance[n] / heat + float(rank[0, n]))
            codes = [-1 if n in surest[len(unknown) - again :] else chosen[n] for n in range(N)]
        assert rollout.codes[row].tolist() == chosen
    assert len({tuple(row.tolist()) for row in rollout.codes}) == len(PROMPTS), "prompts matter"
    assert rollout.pixels is not None and rollout.pixels.shape == (3, 3, 2 * SIDE, 2 * SIDE)


def test_recorded_log_probs_are_taken_again(bundle: ModelBundle) -> None:
    rollout = RolloutEngine.of(bundle).generate_images(["a dog"], samples=3, steps=4, seed=1)
    assert rollout.inputs is not None
    images = ImageTrajectories.of(bundle.model, rollout, ops.token_mask(rollout.inputs, "masked"))
    assert images.mask_RTN is not None
    apart = (image_logprobs(bundle.model, images) - images.old_logp_RTN)[images.mask_RTN]
    assert apart.abs().max() < 1e-5


def test_reinforcement_runs(folder: Path, tmp_path: Path) -> None:
    def bright(prompts: list[str], images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    for trainable, objective in (("lora", "unictask"), ("full", "diffu_grpo")):
        bundle = uct.models.load(folder)
        config = uct.train.GrpoConfig(
            steps=2, group_size=4, timesteps=3, trainable=trainable, objective=objective, lr=1e-2, guidance_scale=2.0
        )
        uct.train.reinforce(bundle, ["a red dog", "a cat"], bright, config, tmp_path / trainable)
        pipe = uct.pipeline(tmp_path / trainable)
        one, two = (
            RolloutEngine.of(each).generate_images(["a cat"], steps=3, seed=1) for each in (bundle, pipe.bundle)
        )
        assert torch.equal(one.codes, two.codes)


def test_folders_and_limits(folder: Path, bundle: ModelBundle, tmp_path: Path) -> None:
    assert isinstance(bundle.model, Dimoo)
    assert Sources.choose(Sources(str(folder))) == Sources(*[str(folder)] * 3)
    assert Sources.choose(Sources("lumina-dimoo")).vq == "Alpha-VLLM/Lumina-DiMOO"
    engine = RolloutEngine.of(bundle)
    with pytest.raises(UserError, match=r"grid=\(2, 4\): this model draws squares here"):
        engine.generate_images(["a dog"], grid=(2, 4))
    with pytest.raises(UserError, match=r"grid=\(8, 8\): with max_text=30 it needs 106 positions, this model has 96"):
        engine.generate_images(["a dog"], grid=(8, 8))
    assert engine.generate_images(["a dog"], steps=2, grid=(3, 3)).codes.shape == (1, 9)
    bundle.model.save_pretrained(tmp_path / "saved")
    again = uct.models.load(tmp_path / "saved", torch.float64, vq=folder)
    assert again.model.identity() == bundle.model.identity()
    one, two = (RolloutEngine.of(each).generate_images(["a cat"], steps=3, seed=1) for each in (bundle, again))
    assert torch.equal(one.codes, two.codes)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, "codebook_size": 60}))
    with pytest.raises(UserError, match="codebook_size=60: leaves"):
        Dimoo.from_pretrained(tmp_path / "saved")
