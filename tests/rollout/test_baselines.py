"""The plain baselines are the published loops, held against the golden vectors: beating them then means something."""

import pytest
import torch

from benchmarks.baselines import showo_plain
from pyunictokens import MASK
from pyunictokens.models.showo.prompting import SpecialIds


@pytest.mark.parametrize("prefix", ["gen.", "inpaint."])
def test_plain_generation_is_the_golden_one(showo_tiny, showo_cases, showo_meta, prefix):
    known = torch.full((2, 16), MASK)
    if prefix == "inpaint.":
        known = torch.where(showo_cases["inpaint.hole"], MASK, showo_cases["inpaint.known_codes"])
    final, inputs, *_ = showo_plain.generate_images(
        showo_tiny,
        showo_meta["text_ids"],
        known,
        max_text=showo_meta["max_text_tokens"],
        steps=6,
        guidance_scale=5.0,
        noise=lambda step: (showo_cases[prefix + "token_gumbel"][step], showo_cases[prefix + "rank_gumbel"][step]),
    )
    assert torch.equal(final, showo_cases[prefix + "final_codes"])
    before = showo_cases[prefix + "input_ids_per_step"][:, :, -17:-1].transpose(0, 1)
    assert torch.equal(inputs == MASK, before == showo_meta["special_ids"]["mask"])


def test_plain_answers_are_the_golden_ones(showo_tiny, showo_cases):
    ids = SpecialIds.of(showo_tiny)
    sequence = showo_cases["mmu.input_ids"][0].tolist()
    soi, eoi = sequence.index(ids.soi), sequence.index(ids.eoi)
    codes = torch.tensor(sequence[soi + 1 : eoi])[None] - ids.first_code
    tokens, _ = showo_plain.generate_text(
        showo_tiny, codes, [sequence[eoi + 1 :]], max_new_tokens=16, temperature=0.0, end_id=ids.eot
    )
    assert tokens[0].tolist() == showo_cases["mmu.greedy"].tolist()


def test_plain_update_has_the_golden_loss_and_gradients(showo_tiny, showo_cases, showo_meta):
    model, cases = showo_tiny.requires_grad_(True), showo_cases
    before = cases["gen.input_ids_per_step"][:, :, -17:-1].transpose(0, 1)
    inputs = torch.where(before == showo_meta["special_ids"]["mask"], MASK, before - showo_meta["first_code_id"])
    settings = showo_meta["grpo"]
    loss, logp = showo_plain.grpo_loss(
        model,
        showo_meta["text_ids"],
        inputs,
        cases["traj.chosen"],
        cases["grpo.old_logps"],
        cases["grpo.ref_logps"],
        cases["grpo.advantages"],
        max_text=showo_meta["max_text_tokens"],
        guidance_scale=showo_meta["generate"]["guidance_scale"],
        alpha=settings["alpha_gen"],
        beta=settings["beta"],
        clip=settings["clip"],
    )
    loss.backward()
    assert loss.item() == pytest.approx(cases["grpo.loss"].item(), rel=1e-4)
    assert (logp - cases["grpo.logps"]).abs().max() < 1e-4
    phi = model.showo
    for name, gradient in {
        "lm_head.weight": phi.lm_head.weight.grad,
        "lm_head.bias": phi.lm_head.bias.grad,
        "embed_tokens": phi.model.embed_tokens.weight.grad,
        "layers.0.q_proj": phi.model.layers[0].self_attn.q_proj.weight.grad,
    }.items():
        wanted = cases[f"grpo.grad.{name}"]
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm(), name


def test_sampling_without_given_noise_follows_the_distribution(showo_tiny):
    """The benchmarked path draws with torch's own generator: its choices must have the probabilities it reports."""
    torch.manual_seed(0)
    rows = 400
    *_, chosen, logp = showo_plain.generate_images(
        showo_tiny, [[3, 4]] * rows, torch.full((rows, 1), MASK), max_text=6, steps=1, guidance_scale=1.0
    )
    counts = torch.bincount(chosen[:, 0, 0], minlength=32) / rows
    for code in chosen[:, 0, 0].unique():
        expected = logp[chosen[:, 0, 0] == code].exp().mean()
        assert abs(counts[code] - expected) < 0.09
