"""Image generation: the golden trajectories, the plain published loop, and the same noise in any batch."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.baselines import showo_plain
from pyunictokens import MASK, ConceptTokens, RolloutEngine, ops
from pyunictokens.models import MagvitV2, Showo

from .tiny import CONFIG, MAX_TEXT, CodesAsPixels, philox_noise, tiny_engine, tiny_model


def replay(cases, prefix):
    """The recorded noise, as the engine's private hook wants it."""

    def noise(sample_ids, steps):
        pairs = list(zip(sample_ids, steps, strict=True))
        tokens = torch.stack([cases[prefix + "token_gumbel"][step, row] for row, step in pairs])
        return tokens, torch.stack([cases[prefix + "rank_gumbel"][step, row] for row, step in pairs])

    return noise


@pytest.mark.parametrize("prefix", ["gen.", "inpaint."])
def test_golden_trajectories_code_for_code(showo_tiny, showo_cases, showo_meta, prefix):
    cases, settings_ = showo_cases, showo_meta["generate"]
    engine = RolloutEngine(showo_tiny, schedule=settings_["schedule"])
    engine._noise = replay(cases, prefix)
    known = torch.where(cases["inpaint.hole"], MASK, cases["inpaint.known_codes"]) if prefix == "inpaint." else None
    rollout = engine.generate_images(
        showo_meta["text_ids"],
        steps=settings_["steps"],
        guidance_scale=settings_["guidance_scale"],
        temperature=settings_["temperature"],
        known_codes=known,
        decode=False,
    )
    assert torch.equal(rollout.codes, cases[prefix + "final_codes"])
    before = cases[prefix + "input_ids_per_step"][:, :, -17:-1].transpose(0, 1)
    before = torch.where(before == showo_meta["special_ids"]["mask"], MASK, before - showo_meta["first_code_id"])
    assert torch.equal(rollout.inputs.long(), before)
    if prefix == "gen.":
        assert torch.equal(rollout.chosen.long(), cases["traj.chosen"])
        assert (rollout.logp - cases["grpo.logps"]).abs().max() < 1e-4
        assert torch.equal(rollout.inputs == MASK, cases["traj.unknown"])


def known_of(kind, rows, count, generator):
    codes = torch.randint(0, CONFIG.codebook_size, (rows, count), generator=generator)
    holes = {"none": 1.0, "some": 0.5, "all": 0.0}[kind]
    return torch.where(torch.rand(rows, count, generator=generator) < holes, MASK, codes)


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 49), max_size=14), min_size=1, max_size=3),
    grid=st.tuples(st.integers(1, 5), st.integers(2, 4)),
    guidance=st.sampled_from([0.0, 1.0, 5.0]),
    steps=st.integers(1, 6),
    known=st.sampled_from(["none", "some", "all"]),
    temperature=st.sampled_from([0.0, 1.0, 2.5]),
    seed=st.integers(0, 2**63 - 1),
)
def test_equals_the_plain_loop_code_for_code(prompts, grid, guidance, steps, known, temperature, seed):
    model, count = tiny_model(), grid[0] * grid[1]
    codes = known_of(known, len(prompts), count, torch.Generator().manual_seed(seed % 2**31))
    engine = tiny_engine(model)
    options = dict(steps=steps, guidance_scale=guidance, temperature=temperature)
    with pytest.warns(UserWarning) if any(len(p) + 3 > MAX_TEXT + 1 for p in prompts) else nullcontext():
        ours = engine.generate_images(prompts, grid=grid, known_codes=codes, seed=seed, **options)
    noise = philox_noise(seed, list(range(len(prompts))), count, CONFIG.codebook_size)
    final, inputs, chosen, logp = showo_plain.generate_images(
        model, prompts, codes, max_text=MAX_TEXT, noise=noise, **options
    )
    assert torch.equal(ours.codes, final)
    assert torch.equal(ours.inputs.long(), inputs)
    assert torch.equal(ours.chosen.long(), chosen)
    assert (ours.logp - logp).abs().max() < 1e-5
    assert torch.equal(ours.pixels[:, 0].long(), final.unflatten(1, grid))


def rows_equal(a, b, rows):
    assert torch.equal(a.codes[rows], b.codes)
    assert torch.equal(a.inputs[rows], b.inputs)
    assert torch.equal(a.chosen[rows], b.chosen)
    assert (a.logp[rows] - b.logp).abs().max() < 1e-6


def test_a_sample_id_draws_the_same_image_in_any_batch():
    engine = tiny_engine()
    prompts = [[1, 2, 3], [4], list(range(9)), [1, 2, 3]]
    together = engine.generate_images(prompts, samples=2, steps=5, seed=11, sample_ids=[5, 2, 9, 9, 0, 7, 2**40, 1])
    assert together.prompt_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for row, sample in enumerate(together.sample_ids.tolist()):
        alone = engine.generate_images([prompts[row // 2]], steps=5, seed=11, sample_ids=[sample])
        rows_equal(together, alone, [row])
    assert torch.equal(together.codes[2], together.codes[3])  # the same prompt, id and seed
    other = engine.generate_images(prompts, samples=2, steps=5, seed=12, sample_ids=together.sample_ids)
    assert not torch.equal(together.codes, other.codes)


@pytest.mark.parametrize("max_rows", [1, 3, 5])
def test_more_rows_than_fit_wait_their_turn(max_rows):
    prompts = [[1, 2, 3], [4], list(range(9))]
    whole = tiny_engine().generate_images(prompts, samples=2, steps=4, seed=3)
    split = tiny_engine(max_rows=max_rows).generate_images(prompts, samples=2, steps=4, seed=3)
    rows_equal(whole, split, list(range(6)))
    assert torch.equal(whole.pixels, split.pixels)


def test_rows_taken_through_the_head_in_parts_are_the_same(monkeypatch):
    whole = tiny_engine().generate_images([[1, 2], [3]], samples=3, steps=4)
    monkeypatch.setattr("pyunictokens.rollout.sampler.LOGITS_BYTES", 2 * 9 * 24 * 4)
    rows_equal(whole, tiny_engine().generate_images([[1, 2], [3]], samples=3, steps=4), list(range(6)))


def test_without_guidance_the_empty_prompt_is_never_computed(monkeypatch):
    rows, prefixes = [], []

    real, prefill = Showo.image_hidden, Showo.prefill

    def counted(model, codes, *rest):
        rows.append(len(codes))
        return real(model, codes, *rest)

    def prefixed(model, prompts):
        prefixes.append(len(prompts))
        return prefill(model, prompts)

    monkeypatch.setattr(Showo, "image_hidden", counted)
    monkeypatch.setattr(Showo, "prefill", prefixed)
    engine = tiny_engine()
    engine.generate_images([[1, 2], [3], [1, 2]], samples=2, steps=3, guidance_scale=0)
    assert (rows, prefixes) == ([2, 6, 6], [2])  # equal prompts once; equal all-masked rows once at step 0
    rows.clear(), prefixes.clear()
    engine.generate_images([[1, 2], [3], [1, 2]], samples=2, steps=3, guidance_scale=2)
    assert (rows, prefixes) == ([3, 12, 12], [3])  # without a prompt all rows look alike at step 0


def test_records_are_consistent_and_small():
    rollout = tiny_engine().generate_images([[1, 2], [3]], samples=2, steps=6, seed=4)
    assert (rollout.inputs.dtype, rollout.chosen.dtype, rollout.logp.dtype) == (torch.int16, torch.int16, torch.float32)
    assert rollout.inputs.shape == (4, 6, 9)
    assert bool((rollout.inputs[:, 0] == MASK).all())
    known = rollout.inputs != MASK
    assert torch.equal(rollout.inputs[:, 1:][known[:, 1:]], rollout.chosen[:, :-1][known[:, 1:]])
    assert torch.equal(rollout.chosen[known], rollout.inputs[known])
    left = (rollout.inputs == MASK).sum(-1)
    for step in range(1, 6):
        before = left[:, step - 1]
        assert torch.equal(left[:, step], ops.mask_len("cosine", 9, before, step - 1, 6))
    assert torch.equal(rollout.chosen[:, -1].long(), rollout.codes)
    bare = tiny_engine().generate_images([[1, 2], [3]], samples=2, steps=6, seed=4, record=False, decode=False)
    assert (bare.inputs, bare.chosen, bare.logp, bare.pixels) == (None, None, None, None)
    assert torch.equal(bare.codes, rollout.codes)


def test_recorded_log_probs_are_those_of_the_plain_model():
    model = tiny_model()
    rollout = tiny_engine(model).generate_images([[1, 2], [3]], samples=2, steps=4, seed=5, guidance_scale=3.0)
    texts = [rollout.prompt_ids[index] for index in rollout.prompt_index]
    for step in range(4):
        logits = showo_plain.guided_logits(model, texts, rollout.inputs[:, step].long(), MAX_TEXT, 3.0)
        plain = logits.log_softmax(-1).gather(-1, rollout.chosen[:, step].long()[..., None])[..., 0]
        assert (plain - rollout.logp[:, step]).abs().max() < 1e-5


def test_a_concept_moves_ids_and_changes_images_only_through_its_own_rows():
    model = tiny_model()
    plain = tiny_engine(model).generate_images([[1, 2]], samples=2, steps=4)
    model.attach(ConceptTokens("bo", CONFIG.hidden_size, 2, 1).double())
    same = tiny_engine(model).generate_images([[1, 2]], samples=2, steps=4)
    assert torch.equal(plain.codes, same.codes)
    with_concept = tiny_engine(model).generate_images([[60, 1, 2]], samples=2, steps=4)
    assert (with_concept.logp[:, 0] - same.logp[:, 0]).abs().max() > 1e-3


def test_every_schedule_ends_with_all_codes_known():
    for schedule in ("cosine", "linear", "pow2", "sigmoid"):
        rollout = tiny_engine(schedule=schedule).generate_images([[1]], steps=5, samples=2)
        assert int(rollout.codes.min()) >= 0
        assert torch.equal(rollout.chosen[:, -1].long(), rollout.codes)


def test_progress_counts_row_steps():
    seen = []
    tiny_engine(max_rows=2).generate_images([[1]], samples=3, steps=4, progress=lambda *at: seen.append(at))
    assert seen == [(2, 12), (4, 12), (6, 12), (8, 12), (9, 12), (10, 12), (11, 12), (12, 12)]


def test_half_precision_runs_and_scores_in_float32():
    model = tiny_model(dtype=torch.bfloat16)
    rollout = tiny_engine(model).generate_images([[1, 2]], samples=2, steps=4, guidance_scale=2.0)
    exact = tiny_engine(tiny_model(dtype=torch.float32)).generate_images([[1, 2]], samples=2, steps=1)
    assert rollout.logp.dtype == torch.float32
    assert rollout.logp.unique().numel() > rollout.logp.numel() // 2  # not rounded to bfloat16
    assert (rollout.logp[:, 0].mean() - exact.logp[:, 0].mean()).abs() < 1.0


def test_real_tokenizer_decodes_any_grid(golden, showo_tiny):
    engine = RolloutEngine(showo_tiny, MagvitV2.from_pretrained(golden / "magvit_tiny"))
    rollout = engine.generate_images([[3, 4]], samples=2, steps=3, grid=(4, 6))
    assert rollout.grid == (4, 6)
    assert torch.equal(rollout.pixels, engine.vq.decode(rollout.codes, (4, 6)))
    assert rollout.pixels.shape == (2, 3, 16, 24)


def test_text_prompts_go_through_the_tokenizer():
    class Letters:
        def encode(self, text):
            return [ord(letter) - ord("a") for letter in text]

    engine = RolloutEngine(tiny_model(), CodesAsPixels(), Letters())
    assert engine.generate_images("bcd", steps=2).prompt_ids == [[1, 2, 3]]
    text, ids = engine.generate_images(["bcd", "e"], steps=3), engine.generate_images([[1, 2, 3], [4]], steps=3)
    assert torch.equal(text.codes, ids.codes)
