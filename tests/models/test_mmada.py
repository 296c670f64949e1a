"""MMaDA behind the seam: images by Show-o's rule, answers by blocks, gradients, reinforcement, files; all against the
plain definition of llama_tiny.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens import DsogThreshold, RolloutEngine, ops
from pyunictokens.models import MagvitConfig, MagvitV2, ModelBundle, Sources
from pyunictokens.models.mmada import Mmada
from pyunictokens.rollout import Dsog
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import LossSettings, image_logprobs, streamed_backward
from pyunictokens.utils.errors import UserError

from ..rollout.tiny import philox_noise
from ..train.naive import objective
from .llama_tiny import CODES, SIDE, TEXT, WORDS, Plain, plain_text, write_checkpoint
from .test_llada import gumbel

N = SIDE * SIDE
PROMPTS = ["a photo of a red dog", "", "big cat in the snow . what is the colour ?"]
BOS, EOS, MASKED, SOI = 1, 2, 3, 4 + len(WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_checkpoint(tmp_path_factory.mktemp("mmada"), "mmada")
    torch.manual_seed(0)
    sizes = MagvitConfig(
        ch=32, encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), encoder_res_blocks=(1, 1), decoder_res_blocks=(1, 1),
        z_channels=5,
    )  # fmt: skip
    MagvitV2(sizes).save_pretrained(place / "vq")
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> ModelBundle:
    return uct.models.load(folder, torch.float64, vq=folder / "vq")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


def first_code(bundle: ModelBundle) -> int:
    return len(bundle.tokenizer)


def sequence(bundle: ModelBundle, text: str, codes: list[int]) -> list[int]:
    """As the published loop puts it together, without the padding that nobody sees."""
    before = [SOI + 4, BOS, *bundle.tokenizer.encode(text), EOS]
    before = before if len(before) <= TEXT + 1 else [*before[:TEXT], EOS]
    return [*before, SOI, *(MASKED if code < 0 else code + first_code(bundle) for code in codes), SOI + 1]


def guided(bundle: ModelBundle, plain: Plain, text: str, codes: list[int], scale: float) -> Tensor:
    """Logits [N, K] by (1 + s)·c − s·u."""
    first = first_code(bundle)
    cond, uncond = (
        plain.logits(sequence(bundle, words, codes))[-N - 1 : -1, first : first + CODES] for words in (text, "")
    )
    return (1 + scale) * cond - scale * uncond


@pytest.mark.parametrize(("steps", "scale"), [(6, 3.5), (1, 2.0), (4, 0.0)])
def test_draws_what_the_published_loop_draws(bundle: ModelBundle, plain: Plain, steps: int, scale: float) -> None:
    with pytest.warns(UserWarning, match="only the first 7"):
        rollout = RolloutEngine.of(bundle).generate_images(PROMPTS, steps=steps, guidance_scale=scale, seed=9)
    assert rollout.inputs is not None and rollout.logp is not None
    for row, prompt in enumerate(PROMPTS):
        noise, codes, heat = philox_noise(9, [row], N, CODES), [-1] * N, 1.0
        for step in range(steps):
            assert rollout.inputs[row, step].tolist() == codes
            logp = guided(bundle, plain, prompt, codes, scale).log_softmax(-1)
            token, rank = noise(step)
            chosen = [int((logp[n] + token[0, n]).argmax()) if code < 0 else code for n, code in enumerate(codes)]
            picked = [float(logp[n, code]) for n, code in enumerate(chosen)]
            assert (rollout.logp[row, step] - torch.tensor(picked)).abs().max() < 1e-4
            heat *= 1 - (step + 1) / steps
            unknown = [n for n in range(N) if codes[n] < 0]
            wanted = int(N * torch.cos(torch.tensor((step + 1) / steps * torch.pi / 2)))
            again = max(1, min(len(unknown) - 1, wanted))
            unsure = sorted(unknown, key=lambda n: picked[n] + heat * float(rank[0, n]))[:again]
            codes = [-1 if n in unsure else chosen[n] for n in range(N)]
        assert rollout.codes[row].tolist() == chosen
    assert len({tuple(row.tolist()) for row in rollout.codes}) == len(PROMPTS), "prompts matter"
    assert rollout.pixels is not None and rollout.pixels.shape == (3, 3, 2 * SIDE, 2 * SIDE)


def test_answers_what_the_published_loop_answers(bundle: ModelBundle, plain: Plain) -> None:
    images = torch.randint(CODES, (2, N), generator=torch.Generator().manual_seed(1))
    questions = ["what is the colour ?", "is a dog in the photo ?"]
    rollout = RolloutEngine.of(bundle).generate_text(
        images, questions, samples=2, max_new_tokens=8, block_length=4, steps=4, temperature=1.0, seed=2
    )
    rows = first_code(bundle) + CODES + 3
    for row, which in enumerate(rollout.prompt_index.tolist()):
        wording = f"<|start_header_id|>user<|end_header_id|>\n{questions[which]}<eot_id>"
        asked = bundle.tokenizer.encode(wording + "<|start_header_id|>assistant<|end_header_id|>\n")
        codes = [code + first_code(bundle) for code in images[which].tolist()]
        prompt = [SOI + 5, SOI, *codes, SOI + 1, BOS, *asked]
        tokens, _, logp = plain_text(plain, prompt, 8, 4, 4, 1.0, gumbel(2, row, 4, rows), MASKED)
        size = int(rollout.lengths[row])
        assert rollout.tokens[row, :size].tolist() == tokens[:size]
        assert (rollout.logp[row, :size] - logp[:size]).abs().max() < 1e-5
    assert rollout.image_codes is not None and len(rollout.texts) == 4
    likeliest = RolloutEngine.of(bundle).generate_text(images, questions, max_new_tokens=8, top_k=1)
    assert likeliest.temperature == 0.0
    said = RolloutEngine.of(bundle).write(["a dog ?"], max_new_tokens=8)
    assert len(said.texts) == 1 and said.image_codes is None


@pytest.mark.parametrize(("layers", "scale"), [(0, 3.5), (2, 3.5), (0, 0.0)])
def test_the_streamed_update_is_the_gradient_of_the_plain_network(
    folder: Path, bundle: ModelBundle, plain: Plain, layers: int, scale: float
) -> None:
    model = Mmada.from_pretrained(folder, torch.float64)
    model.checkpoint_layers = layers
    prompts = PROMPTS[:2]
    rollout = RolloutEngine(model, bundle.vq, bundle.tokenizer).generate_images(
        prompts, samples=2, steps=3, guidance_scale=scale, seed=4
    )
    assert rollout.inputs is not None
    images = ImageTrajectories.of(model, rollout, ops.token_mask(rollout.inputs, "masked"))
    noise = torch.Generator().manual_seed(3)
    now = image_logprobs(model, images)
    assert (now - images.old_logp_RTN)[images.mask_RTN].abs().max() < 1e-5
    images.old_logp_RTN = now + 0.2 * torch.randn(now.shape, generator=noise).double()
    images.ref_logp_RTN = now + 0.2 * torch.randn(now.shape, generator=noise).double()
    model.requires_grad_(True)
    for value in plain.weights.values():
        value.requires_grad_(True)
    advantages = torch.tensor([0.7, -0.4, 0.1, -0.9], dtype=torch.float64)
    settings = LossSettings(beta=0.05, micro_rows=3, micro_timesteps=2)
    rows = []
    for row, place in enumerate(rollout.prompt_index.tolist()):
        steps = []
        for step in range(3):
            logp = guided(bundle, plain, prompts[place], images.inputs_RTN[row, step].tolist(), scale).log_softmax(-1)
            steps.append(logp.gather(-1, images.chosen_RTN[row, step].long()[:, None])[:, 0])
        rows.append(torch.stack(steps))
    assert images.mask_RTN is not None
    wanted = objective(
        torch.stack(rows), images.old_logp_RTN, images.ref_logp_RTN, advantages, settings.alpha_image, settings,
        images.mask_RTN,
    )  # fmt: skip
    gradients = dict(zip(plain.weights, torch.autograd.grad(wanted, list(plain.weights.values())), strict=True))
    for value in plain.weights.values():
        value.requires_grad_(False)
    stats = streamed_backward(model, advantages, settings, images)
    assert stats.loss == pytest.approx(float(wanted.detach()), rel=1e-6) and stats.microbatches > 1
    for name, parameter in model.named_parameters():
        gradient = gradients[name.removeprefix("model.transformer.")]
        assert parameter.grad is not None, name
        assert (parameter.grad - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-12, name


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_reinforcement_runs(folder: Path, tmp_path: Path, trainable: str) -> None:
    def bright(prompts: list[str], images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    bundle = uct.models.load(folder, vq=folder / "vq")
    config = uct.train.GrpoConfig(
        steps=2, group_size=4, timesteps=3, trainable=trainable, lr=1e-2, guidance_scale=2.0, token_scope="masked"
    )
    before = {name: value.clone() for name, value in bundle.model.named_parameters()}
    result = uct.train.reinforce(bundle, ["a red dog", "a cat"], bright, config, tmp_path / trainable)
    assert result.steps == 2 and result.skipped == 0
    assert any(not torch.equal(value, before[name]) for name, value in bundle.model.named_parameters())
    again = uct.models.load(folder, vq=folder / "vq")
    uct.train.load_policy(again.model, tmp_path / trainable / "final")
    one, two = (RolloutEngine.of(each).generate_images(["a cat"], steps=3, seed=1) for each in (bundle, again))
    assert torch.equal(one.codes, two.codes)
    said = [RolloutEngine.of(each).write(["a cat"], max_new_tokens=8).texts for each in (bundle, again)]
    assert said[0] == said[1]


def test_previews_and_limits(bundle: ModelBundle, folder: Path) -> None:
    engine = RolloutEngine.of(bundle)

    def bright(pixels: Tensor, index: Tensor) -> Tensor:
        return (3 * pixels.mean((1, 2, 3)).float()).sigmoid()

    dsog = Dsog(DsogThreshold(initial=0.45), bright, preview_step=2, max_candidates=9)
    rollout = engine.generate_images(["a dog"], samples=3, steps=5, seed=2, dsog=dsog)
    assert rollout.dsog is not None and rollout.dsog.accepted + rollout.dsog.rejected > 0
    assert engine.generate_images(["a dog"], steps=2, grid=(3, 6)).codes.shape == (1, 18)
    with pytest.raises(
        UserError, match=r"grid=\(8, 8\): with max_text=9 its codes need 76 positions, this model has 64"
    ):
        engine.generate_images(["a dog"], grid=(8, 8))
    with pytest.raises(UserError, match="mmada draws from all tokens"):
        engine.generate_text(torch.zeros(1, N, dtype=torch.int64), ["what ?"], top_k=3)
    with pytest.raises(UserError, match="mmada has no rows that a concept may own"):
        engine.add_concept(uct.ConceptTokens("bo", 24))


def test_folders(folder: Path, bundle: ModelBundle, tmp_path: Path) -> None:
    assert isinstance(bundle.model, Mmada) and bundle.model.ids.first_code == len(bundle.tokenizer)
    assert Sources.choose(Sources(str(folder), str(folder / "vq"))).tokenizer == str(folder)
    assert Sources.choose(Sources("mmada-8b")).vq == "showlab/magvitv2"
    with pytest.raises(UserError, match="vq missing"):
        uct.models.load(folder)
    bundle.model.save_pretrained(tmp_path / "saved")
    again = uct.models.load(tmp_path / "saved", torch.float64, vq=folder / "vq")
    assert again.model.identity() == bundle.model.identity()
    one, two = (RolloutEngine.of(each).generate_images(["a cat"], steps=3, seed=1) for each in (bundle, again))
    assert torch.equal(one.codes, two.codes)

    shutil.copytree(folder, tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "wrong" / "config.json").write_text(json.dumps({**config, "first_code_id": 10**4}))
    with pytest.raises(UserError, match="first_code_id=10000: must follow the task ids"):
        Mmada.from_pretrained(tmp_path / "wrong")
    (tmp_path / "wrong" / "config.json").write_text(json.dumps({**config, "codebook_size": 16}))
    with pytest.raises(UserError, match="has 32 codes, the model 16"):
        uct.models.load(tmp_path / "wrong", vq=folder / "vq")
