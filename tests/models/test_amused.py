"""aMUSEd behind the seam: every code of diffusers' own pipeline, the gradients of its plain network, and a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens import DsogThreshold, RolloutEngine, ops
from pyunictokens.data import load_concept
from pyunictokens.evaluate import unifybench
from pyunictokens.models.amused import Amused, AmusedVQ
from pyunictokens.models.bundle import Sources
from pyunictokens.rollout import Dsog
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import LossSettings, streamed_backward
from pyunictokens.utils.errors import UserError

from ..rollout.tiny import philox_noise
from ..train.naive import objective
from .amused_tiny import CODES, SIDE, write_pipeline
from .test_second_model import Grey

PROMPTS = ["a photo of a red dog", "", "big cat in snow"]
N = SIDE * SIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("amused"))


@pytest.fixture(scope="module")
def bundle(folder: Path) -> uct.models.ModelBundle:
    return uct.models.load(folder, torch.float64)


def pipeline(folder: Path) -> Any:
    from diffusers.pipelines.deprecated.amused.pipeline_amused import AmusedPipeline

    pipe = AmusedPipeline.from_pretrained(folder, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("steps", "scale", "halved"), [(7, 4.0, True), (5, 1.0, True), (1, 2.5, True), (4, 3.0, False)]
)
def test_draws_what_diffusers_pipeline_draws(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, scale: float, halved: bool
) -> None:
    from diffusers.schedulers import scheduling_amused

    folder = folder if halved else write_pipeline(tmp_path, halved=False)
    bundle = uct.models.load(folder, torch.float64)

    noise, step, trail = philox_noise(9, list(range(len(PROMPTS))), N, CODES), [0], []

    def chosen(probs: Tensor, count: int, generator: object = None) -> Tensor:
        token, _ = noise(step[0])
        return (probs.double().log() + token.flatten(0, 1)).argmax(-1, keepdim=True)

    def rank(probs: Tensor, generator: object = None) -> Tensor:
        found = noise(step[0])[1]
        step[0] += 1
        return found

    monkeypatch.setattr(torch, "multinomial", chosen)
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", rank)
    final = pipeline(folder)(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
        callback=lambda step, timestep, codes: trail.append(codes.flatten(1).clone()),
    ).images
    monkeypatch.undo()
    rollout = RolloutEngine.of(bundle).generate_images(PROMPTS, steps=steps, guidance_scale=scale, seed=9)
    assert torch.equal(rollout.codes.long(), final.flatten(1))
    assert rollout.inputs is not None and len(trail) == steps
    for place, codes in enumerate(trail[:-1]):
        unknown = codes == bundle.model.mask_id
        assert torch.equal(rollout.inputs[:, place + 1].long(), torch.where(unknown, -1, codes))
    assert len({tuple(row.tolist()) for row in rollout.codes}) == len(PROMPTS), "prompts matter"


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    uct.models.load(folder)
    assert capfd.readouterr() == ("", "") and logging.is_progress_bar_enabled()


def test_pixels_are_the_pipelines(folder: Path, bundle: uct.models.ModelBundle) -> None:
    pipe, vq = pipeline(folder), AmusedVQ.from_pretrained(folder, torch.float64)
    codes = torch.randint(CODES, (2, N), generator=torch.Generator().manual_seed(1))
    shape = (2, SIDE, SIDE, pipe.vqvae.config.latent_channels)
    theirs = pipe.vqvae.decode(codes, force_not_quantize=True, shape=shape).sample.clip(0, 1)
    assert torch.equal(vq.decode(codes), theirs * 2 - 1) and theirs.shape == (2, 3, 4 * SIDE, 4 * SIDE)
    latents = pipe.vqvae.encode(theirs).latents
    assert torch.equal(vq.encode(theirs * 2 - 1), pipe.vqvae.quantize(latents)[2][2].view(2, N))
    with pytest.raises(UserError, match="an image of 15×16 pixels: sides must be multiples of 4"):
        vq.encode(torch.zeros(1, 3, 15, 16))
    assert bundle.size == 4 * SIDE


def plain_logits(model: Amused, prompt: list[int], codes_N: Tensor) -> Tensor:
    """Logits [N, K] by the published network's own forward pass."""
    read = model.text_encoder(torch.tensor([prompt]), output_hidden_states=True)
    ids = torch.where(codes_N < 0, model.mask_id, codes_N).long().view(1, SIDE, SIDE)
    pixels = float(SIDE * model.downsampling)
    size = torch.tensor([[pixels, pixels, 0.0, 0.0, 6.0]], dtype=torch.float64)
    return model.transformer(ids, read.hidden_states[-2], read.text_embeds, size)[0].flatten(1).T


@pytest.mark.parametrize("layers", [0, 2])
def test_the_streamed_update_is_the_gradient_of_the_plain_network(bundle: uct.models.ModelBundle, layers: int) -> None:
    model = copy.deepcopy(bundle.model)
    assert isinstance(model, Amused)
    model.__dict__["text_encoder"] = bundle.model.text_encoder
    model.checkpoint_layers = layers
    rollout = RolloutEngine(model, bundle.vq, bundle.tokenizer).generate_images(
        PROMPTS, samples=2, steps=3, guidance_scale=3.0, seed=4
    )
    assert rollout.inputs is not None
    images = ImageTrajectories.of(model, rollout, ops.token_mask(rollout.inputs, "masked"))
    noise = torch.Generator().manual_seed(3)
    images.old_logp_RTN = images.old_logp_RTN.double() + 0.2 * torch.randn(6, 3, N, generator=noise).double()
    images.ref_logp_RTN = images.old_logp_RTN + 0.2 * torch.randn(6, 3, N, generator=noise).double()
    assert images.mask_RTN is not None
    model.requires_grad_(True)
    advantages = torch.tensor([0.7, -0.4, 0.1, -0.9, 0.5, 0.3], dtype=torch.float64)
    settings = LossSettings(beta=0.05, micro_rows=4, micro_timesteps=2)
    rows = []
    for row, prompt in enumerate(images.prompt_of_row):
        steps = []
        for step in range(3):
            cond, uncond = (
                plain_logits(model, list(text), images.inputs_RTN[row, step])
                for text in (images.prompts[prompt], model.prompt_ids([]))
            )
            logp = (uncond + 3.0 * (cond - uncond)).log_softmax(-1)
            steps.append(logp.gather(-1, images.chosen_RTN[row, step].long()[:, None])[:, 0])
        rows.append(torch.stack(steps))
    alpha = settings.alpha_image * images.weight
    wanted = objective(
        torch.stack(rows), images.old_logp_RTN, images.ref_logp_RTN, advantages, alpha, settings, images.mask_RTN
    )
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(wanted, list(named.values()), allow_unused=True)
    stats = streamed_backward(model, advantages, settings, images)
    assert stats.loss == pytest.approx(float(wanted.detach()), rel=1e-6) and stats.microbatches > 1
    assert not any(name.startswith("text_encoder") for name in named)
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        assert gradient is not None and parameter.grad is not None, name
        # the network takes its root mean squares in float32
        assert (parameter.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name


def test_any_order_of_rows_gives_the_plain_networks_logits(bundle: uct.models.ModelBundle) -> None:
    model = bundle.model
    assert isinstance(model, Amused)
    prompts = [model.prompt_ids(ids) for ids in ([5, 9], [], [7, 8, 11])]
    of_row = [2, 0, 0, 1, 1, 1, 1, 0]  # runs of 1, 2, 4 and 1 rows
    codes = torch.randint(-1, CODES, (len(of_row), N), generator=torch.Generator().manual_seed(2))
    weight, bias = model.image_head()
    wanted = torch.stack([plain_logits(model, prompts[p], its) for p, its in zip(of_row, codes, strict=True)])
    for order in (list(range(8)), [1, 2, 7], [3, 4, 5, 6]):  # 8 pieces of one row, then one piece of all rows
        for grad in (False, True):  # without gradients results are overwritten where nobody needs them
            with torch.set_grad_enabled(grad):
                rows = [of_row[row] for row in order]
                hidden = model.image_hidden(codes[order], model.prefill(prompts), rows, torch.zeros(len(order)))
            logits = torch.nn.functional.linear(hidden, weight, bias)
            # the network takes its root mean squares in float32
            assert (logits - wanted[order]).abs().max() <= 1e-6 * wanted.abs().max()


def test_a_prompts_keys_are_computed_once(bundle: uct.models.ModelBundle) -> None:
    net, called = bundle.model.transformer, []
    readers = [layer.attn2 for layer in net.transformer_layers]
    for block in (net.down_block, net.up_block):
        readers += [each for skip in block.attention_blocks for each in (skip.attn1, skip.attn2)]
    hooks = [each.to_k.register_forward_hook(lambda *seen: called.append(len(seen[1][0]))) for each in readers]
    RolloutEngine.of(bundle).generate_images(PROMPTS[:1], samples=3, steps=4, guidance_scale=3.0)
    for hook in hooks:
        hook.remove()
    assert called == [bundle.model.places] * 2 * len(readers), "one prompt and the unconditional one, and no rows"


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_reinforcement_runs(folder: Path, tmp_path: Path, trainable: str) -> None:
    def bright(prompts: list[str], images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    bundle = uct.models.load(folder)
    config = uct.train.GrpoConfig(
        steps=2, group_size=4, timesteps=3, trainable=trainable, lr=1e-2, guidance_scale=2.0, token_scope="masked"
    )
    before = {name: value.clone() for name, value in bundle.model.named_parameters()}
    result = uct.train.reinforce(bundle, ["a red dog", "a cat"], bright, config, tmp_path / trainable)
    assert result.steps == 2 and result.skipped == 0
    changed = [name for name, value in bundle.model.named_parameters() if not torch.equal(value, before[name])]
    assert changed
    again = uct.models.load(folder)
    uct.train.load_policy(again.model, tmp_path / trainable / "final")
    one, two = (RolloutEngine.of(each).generate_images(["a cat"], steps=3, seed=1) for each in (bundle, again))
    assert torch.equal(one.codes, two.codes)


def test_previews_and_limits(bundle: uct.models.ModelBundle) -> None:
    engine = RolloutEngine.of(bundle)

    def bright(pixels: Tensor, index: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3)).float()

    dsog = Dsog(DsogThreshold(initial=0.1), bright, preview_step=2, max_candidates=9)
    rollout = engine.generate_images(["a dog"], samples=3, steps=5, seed=2, dsog=dsog)
    assert rollout.dsog is not None and rollout.dsog.accepted + rollout.dsog.rejected > 0
    with pytest.raises(UserError, match=r"grid=\(4, 6\): this model draws squares"):
        engine.generate_images(["a dog"], grid=(4, 6))
    with pytest.raises(UserError, match="amused draws but does not answer"):
        engine.generate_text(torch.zeros(1, N, dtype=torch.int64), [[1]])
    with pytest.warns(UserWarning, match="only the first 10"):
        engine.generate_images(["a b c d e f g h i j k l m"], steps=2)
    larger = engine.generate_images(["a dog"], steps=2, grid=(6, 6))
    assert larger.codes.shape == (1, 36)


def test_evaluation_draws_and_scores(bundle: uct.models.ModelBundle, tmp_path: Path) -> None:
    concept = load_concept(write_toy_concept(tmp_path, seed=3, kind="animal", name="bo"), "bo")
    engine = RolloutEngine.of(bundle)
    result = unifybench(
        engine, concept, None, splits=["pure"], samples=2, steps=2, guidance_scale=2.0, image_text=Grey()
    )
    records = result.records["pure"]
    assert records and all(len(record["scores"]["clip_t"]) == 2 for record in records)
    with pytest.raises(UserError, match="does not answer"):
        unifybench(engine, concept, None, splits=["vqa"])


def test_folders(folder: Path, bundle: uct.models.ModelBundle, tmp_path: Path) -> None:
    assert Sources.choose(Sources(str(folder))) == Sources(*[str(folder)] * 3)
    assert Sources.choose(Sources("amused-512")).model == "amused/amused-512"
    bundle.model.save_pretrained(tmp_path / "saved")
    again = Amused.from_pretrained(tmp_path / "saved", torch.float64)
    assert again.identity() == bundle.model.identity() and again.downsampling == bundle.model.downsampling
    one, two = (
        RolloutEngine(model, bundle.vq, bundle.tokenizer).generate_images(["a cat"], steps=3, seed=1)
        for model in (bundle.model, again)
    )
    assert torch.equal(one.codes, two.codes)
    weights = tmp_path / "saved" / "transformer" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    kept = load_file(weights)
    kept.pop("mlm_layer.conv2.weight")
    save_file(kept, weights)
    with pytest.raises(UserError, match=r"no checkpoint of UVit2DModel: 1 weights missing \(mlm_layer.conv2.weight"):
        Amused.from_pretrained(tmp_path / "saved")
    weights.write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot be read as UVit2DModel"):
        Amused.from_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="give the whole published pipeline folder"):
        Amused.from_pretrained(tmp_path)
