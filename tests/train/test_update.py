"""The streamed update: equal to the loss with every graph alive, to the golden vectors, and small whatever T is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyunictokens.models import Showo
from pyunictokens.models.showo import prompting
from pyunictokens.ops import token_mask
from pyunictokens.train import Policy
from pyunictokens.train.objective import Gspo, MaskGrpo, Objective, UniCTask
from pyunictokens.train.trajectories import AnswerTrajectories, ImageTrajectories
from pyunictokens.train.update import LossSettings, answer_logprobs, image_logprobs, streamed_backward
from tests.train import naive
from tests.train.world import tiny_concept, tiny_model


def fake_images(
    model: Showo, steps: int = 3, rows: int = 5, scale: float = 2.0, scope: str = "all"
) -> ImageTrajectories:
    """Trajectories of made-up codes; the old and reference policies differ a little from the present one."""
    generator = torch.Generator().manual_seed(3)
    count, codebook = model.config.num_vq_tokens, model.config.codebook_size
    chosen = torch.randint(0, codebook, (rows, steps, count), generator=generator)
    order = torch.rand(rows, 1, count, generator=generator).argsort(-1)
    still = order < torch.linspace(count, 1, steps).round().long()[:, None]
    inputs = torch.where(still, -1, chosen).to(torch.int16)
    first = model.config.first_code_id
    texts = [[5, 9, first, first + 3, 7], [11], [first + 1, 6, 4]]
    images = ImageTrajectories(
        prompts=[model.prompt_ids(text) for text in texts],
        prompt_of_row=[row % len(texts) for row in range(rows)],
        inputs_RTN=inputs,
        chosen_RTN=chosen.to(torch.int16),
        old_logp_RTN=torch.empty(0),
        empty_prompt=model.prompt_ids([]),
        guidance_scale=scale,
        mask_RTN=token_mask(inputs, scope),
    )
    now = image_logprobs(model, images)
    images.old_logp_RTN = now + 0.25 * torch.randn(now.shape, generator=generator)
    images.ref_logp_RTN = now + 0.25 * torch.randn(now.shape, generator=generator)
    return images


def fake_answers(model: Showo, rows: int = 5) -> AnswerTrajectories:
    generator = torch.Generator().manual_seed(4)
    first, eos = model.config.first_code_id, model.config.eos_token_id
    codes = torch.randint(0, model.config.codebook_size, (model.config.num_vq_tokens,), generator=generator)
    tokens = torch.randint(3, 30, (rows, 6), generator=generator)
    tokens[:, 1] = torch.tensor([first, first + 2, 4, first + model.num_new - 1, first + model.num_new + 3])[:rows]
    for row in range(rows):
        tokens[row, 5 - row % 3] = eos
        tokens[row, 6 - row % 3 :] = -1
    answers = AnswerTrajectories(codes, [4, 8, first, 12], tokens, torch.empty(0), temperature=0.8)
    now = answer_logprobs(model, answers)
    answers.old_logp_RL = now + 0.2 * torch.randn(now.shape, generator=generator)
    answers.ref_logp_RL = now + 0.2 * torch.randn(now.shape, generator=generator)
    return answers


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in policy.named_parameters().items()
    }


def policy_of(kind: str, tmp_path: Path) -> Policy:
    model = tiny_model()
    model.max_text = 14
    model.attach(tiny_concept())
    policy = Policy(model, kind, reference_file=tmp_path / "start.safetensors")
    if kind == "lora":  # fresh adapters give no gradient to their first half
        with torch.no_grad():
            generator = torch.Generator().manual_seed(6)
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return policy


@pytest.mark.parametrize(
    ("kind", "scope", "scale", "rows", "timesteps"),
    [
        ("full", "all", 2.0, 2, 2),
        ("full", "masked", 0.0, 5, 1),
        ("concept", "all", 2.0, 1, 3),
        ("concept", "newly_unmasked", 2.0, 3, 2),
        ("lora", "masked", 2.0, 4, 1),
    ],
)
def test_equals_the_loss_with_every_graph_alive(
    kind: str, scope: str, scale: float, rows: int, timesteps: int, tmp_path: Path
) -> None:
    policy = policy_of(kind, tmp_path)
    model = policy.model
    images, answers = fake_images(model, scale=scale, scope=scope), fake_answers(model)
    advantages = torch.tensor([0.7, -0.4, 0.1, -0.9, 0.5])
    settings = LossSettings(beta=0.05, micro_rows=rows, micro_timesteps=timesteps)
    expected = naive.loss(model, advantages, settings, images, answers)
    expected.backward()
    wanted = gradients(policy)
    for value in policy.named_parameters().values():
        value.grad = None
    stats = streamed_backward(model, advantages, settings, images, answers)
    assert stats.loss == pytest.approx(float(expected.detach()), rel=5e-5)  # float32 terms that cancel
    found = gradients(policy)
    moving = 0
    for name, gradient in wanted.items():
        scale_of = gradient.abs().max()
        moving += bool(scale_of > 1e-6)
        assert (found[name] - gradient).abs().max() <= 1e-4 * scale_of + 1e-7, name
    assert moving >= {"concept": 3, "lora": 24, "full": 30}[kind]


def test_answers_about_features_equal_the_plain_sequences(tmp_path: Path) -> None:
    """Show-o's CLIP-ViT variant: loss and gradients, those of its projector among them, in float64."""
    torch.manual_seed(2)
    model = Showo(replace(tiny_model().config, w_clip_vit=True)).double()
    model.attach(tiny_concept().double())
    model.system_ids = [9, 4]
    policy = Policy(model, "full", reference_file=tmp_path / "start.safetensors")
    answers = replace(fake_answers(tiny_model().attach(tiny_concept())), seen=torch.randn(3, 1024).double())
    ids, (rows, longest) = prompting.SpecialIds.of(model), answers.tokens_RL.shape
    before, question = [ids.mmu, *model.system_ids, ids.soi], [ids.eoi, *answers.question]
    logp = torch.zeros(rows, longest, dtype=torch.float64)
    for row, tokens in enumerate(answers.tokens_RL):
        said = tokens[tokens >= 0]
        text = model.embed(torch.tensor([*before, *question, *said.tolist()]))[None]
        parts = [text[:, : len(before)], model.project_clip(answers.seen[None]), text[:, len(before) :]]
        allowed = prompting.mmu_clip_allowed(2, 3, len(answers.question) + len(said))
        logits = model(None, allowed, inputs_embeds=torch.cat(parts, 1))[0, -len(said) - 1 : -1] / answers.temperature
        logp[row, : len(said)] = logits.log_softmax(-1).gather(-1, said[:, None])[:, 0]
    assert (answer_logprobs(model, answers) - logp).abs().max() < 1e-9
    answers.old_logp_RL = logp.detach() + 0.1 * torch.randn(logp.shape).double() * (answers.tokens_RL >= 0)
    advantages, settings = torch.tensor([0.7, -0.4, 0.1, -0.9, 0.5]).double(), LossSettings(beta=0.0, micro_rows=2)
    answers.ref_logp_RL = None
    expected = naive.objective(
        logp, answers.old_logp_RL, None, advantages, settings.alpha_answer, settings, answers.tokens_RL >= 0
    )
    expected.backward()
    wanted = gradients(policy)
    for value in policy.named_parameters().values():
        value.grad = None
    stats = streamed_backward(model, advantages, settings, None, answers)
    assert stats.loss == pytest.approx(float(expected.detach()), rel=1e-9)
    found = gradients(policy)
    assert wanted["mm_projector.0.weight"].abs().max() > 1e-6
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() < 1e-9, name


def test_statistics_do_not_depend_on_the_pieces() -> None:
    model = tiny_model()
    model.attach(tiny_concept().requires_grad_(True))
    images, answers = fake_images(model, scope="masked"), fake_answers(model)
    advantages = torch.tensor([0.7, -0.4, 0.1, -0.9, 0.5])
    whole = streamed_backward(model, advantages, LossSettings(micro_rows=5, micro_timesteps=3), images, answers)
    pieces = streamed_backward(model, advantages, LossSettings(micro_rows=2, micro_timesteps=1), images, answers)
    assert whole.tokens == pieces.tokens == int(images.mask_RTN.sum() + answers.mask_RL.sum())
    for name in ("loss", "loss_image", "loss_answer", "kl", "clip_fraction", "ratio_max", "ratio_mean", "entropy"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-4, abs=1e-7), name
    logp = torch.cat([image_logprobs(model, images)[images.mask_RTN], answer_logprobs(model, answers)[answers.mask_RL]])
    old = torch.cat([images.old_logp_RTN[images.mask_RTN], answers.old_logp_RL[answers.mask_RL]])
    assert whole.ratio_max == pytest.approx(float((logp - old).exp().max()), rel=1e-4)
    assert whole.ratio_mean == pytest.approx(float((logp - old).exp().mean()), rel=1e-4)
    assert 0 < whole.clip_fraction < 1


def test_first_update_has_ratio_one() -> None:
    model = tiny_model()
    model.attach(tiny_concept().requires_grad_(True))
    images, answers = fake_images(model), fake_answers(model)
    images.old_logp_RTN, answers.old_logp_RL = image_logprobs(model, images), answer_logprobs(model, answers)
    images.ref_logp_RTN, answers.ref_logp_RL = images.old_logp_RTN, answers.old_logp_RL
    advantages = torch.tensor([0.7, -0.4, 0.1, -0.9, 0.5])
    stats = streamed_backward(model, advantages, LossSettings(), images, answers)
    assert stats.ratio_max == pytest.approx(1, abs=1e-4) and stats.ratio_mean == pytest.approx(1, abs=1e-5)
    assert stats.clip_fraction == 0 and stats.kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("objective", [UniCTask(), Gspo(), MaskGrpo(reduction="mean")])
@pytest.mark.parametrize("scope", ["all", "newly_unmasked"])
def test_log_probs_that_nobody_recorded_are_those_of_the_policy_as_it_is(objective: Objective, scope: str) -> None:
    """What the first inner epoch relies on."""
    advantages, found = torch.tensor([0.7, -0.4, 0.1, -0.9, 0.5]), []
    settings = LossSettings(objective=objective, micro_rows=2)
    for taken in (True, False):
        model = tiny_model().requires_grad_(True)
        images = fake_images(model, scope=scope)
        images.old_logp_RTN = image_logprobs(model, images) if taken else torch.empty(0)
        stats = streamed_backward(model, advantages, settings, images)
        assert stats.ratio_max == pytest.approx(1, abs=1e-4)
        found.append((stats.loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, slopes), (other_loss, other) = found
    assert other_loss == pytest.approx(loss, abs=1e-5) and slopes.keys() == other.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(other[name], slope, rtol=1e-3, atol=1e-6)


def test_golden_values_and_gradients(
    golden: Path, showo_cases: dict[str, torch.Tensor], showo_meta: dict[str, Any], showo_tiny: Showo
) -> None:
    cases, model = showo_cases, showo_tiny.requires_grad_(True)
    ids = prompting.SpecialIds.of(model)
    side = showo_meta["image_side"] ** 2
    recorded = cases["gen.input_ids_per_step"][:, :, -(side + 1) : -1].transpose(0, 1)
    inputs = torch.where(recorded == ids.mask, -1, recorded - ids.first_code)
    assert torch.equal(inputs == -1, cases["traj.unknown"])
    settings = showo_meta["grpo"]
    images = ImageTrajectories(
        prompts=[model.prompt_ids(text) for text in showo_meta["text_ids"]],
        prompt_of_row=[0, 1],
        inputs_RTN=inputs,
        chosen_RTN=cases["traj.chosen"],
        old_logp_RTN=cases["grpo.old_logps"],
        empty_prompt=model.prompt_ids([]),
        guidance_scale=showo_meta["generate"]["guidance_scale"],
        ref_logp_RTN=cases["grpo.ref_logps"],
    )
    assert (image_logprobs(model, images) - cases["grpo.logps"]).abs().max() <= 1e-4 * cases["grpo.logps"].abs().max()
    loss = LossSettings(
        beta=settings["beta"],
        clip_low=settings["clip"],
        clip_high=settings["clip"],
        alpha_image=settings["alpha_gen"],
        micro_rows=1,
        micro_timesteps=4,
    )
    stats = streamed_backward(model, cases["grpo.advantages"], loss, images)
    assert stats.loss == pytest.approx(float(cases["grpo.loss"]), rel=1e-4)
    assert stats.kl == pytest.approx(float(cases["grpo.kl"].mean()), rel=1e-4)
    decoder = model.showo.model
    for name, parameter in {
        "lm_head.weight": model.showo.lm_head.weight,
        "lm_head.bias": model.showo.lm_head.bias,
        "embed_tokens": decoder.embed_tokens.weight,
        "layers.0.q_proj": decoder.layers[0].self_attn.q_proj.weight,
    }.items():
        wanted = cases[f"grpo.grad.{name}"]
        assert (parameter.grad - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name


def peak_bytes(steps: int, tmp_path: Path, settings: LossSettings | None = None) -> int:
    """Most bytes PyTorch's CPU allocator held at once during one update, beyond what it held before."""
    model = tiny_model(width=64, layers=1)
    model.requires_grad_(True)
    images = fake_images(model, steps=steps, rows=2)

    def run() -> None:
        streamed_backward(model, torch.tensor([0.7, -0.7]), settings or LossSettings(micro_rows=2), images)

    run()
    model.zero_grad()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    trace = tmp_path / f"trace{steps}.json"
    profile.export_chrome_trace(str(trace))
    changes = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = top = 0
    for event in sorted(changes, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        top = max(top, held)
    return top


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_memory_does_not_depend_on_the_number_of_timesteps(tmp_path: Path) -> None:
    few, many = peak_bytes(5, tmp_path), peak_bytes(50, tmp_path)
    assert few > 300_000, "the measurement sees the activations"
    assert many <= 1.10 * few


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_text_logprob_is_the_whole_vocabulary(temperature: float) -> None:
    model = tiny_model().requires_grad_(True)
    concept = tiny_concept().requires_grad_(True)
    model.attach(concept)
    hidden = torch.randn(4, 3, 32, requires_grad=True)
    first = model.config.first_code_id
    target = torch.tensor([[0, first - 1, first], [first + 5, first + 6, 7], [first + 2, 1, 2], [3, first + 9, 4]])
    weight, bias = model.text_head()
    wanted = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    wanted = wanted.gather(-1, target[..., None])[..., 0]
    found = model.text_logprob(hidden, target, temperature=temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    learn = [hidden, concept.head_weight, concept.head_bias, model.showo.lm_head.weight, model.showo.lm_head.bias]
    push = torch.randn(found.shape)
    for mine, theirs in zip(
        torch.autograd.grad(found, learn, push), torch.autograd.grad(wanted, learn, push), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_token_scopes() -> None:
    unknown, known = -1, 7
    inputs = torch.tensor([[[unknown, unknown, unknown, known], [unknown, known, unknown, known]]])
    assert token_mask(inputs, "all") is None
    assert token_mask(inputs, "masked").tolist() == [[[True, True, True, False], [True, False, True, False]]]
    assert token_mask(inputs, "newly_unmasked").tolist() == [[[False, True, False, False], [True, False, True, False]]]
    with pytest.raises(ValueError, match="newly_unmasked"):
        token_mask(inputs, "some")
