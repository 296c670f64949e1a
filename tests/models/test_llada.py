"""LLaDA behind the seam of models that write: the plain loop's tokens, and files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pyunictokens as uct
from pyunictokens import RolloutEngine, ops
from pyunictokens.models import BlockRule, ModelBundle, Sources
from pyunictokens.models.llada import LlamaWriter
from pyunictokens.utils.errors import UserError

from .llama_tiny import Plain, plain_text, write_checkpoint

PROMPTS = ["what is the colour of the dog ?", "big cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llada"), "llada")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> ModelBundle:
    return uct.models.load(folder, torch.float64)


def gumbel(seed: int, sample: int, block: int, entries: int):
    def noise(step: int) -> Tensor:
        rows, places = torch.full((block,), sample), torch.arange(block)
        return ops.philox.gumbel(seed, rows, torch.full((block,), step), places, entries, ops.philox.STREAM_TOKEN)

    return noise


@pytest.mark.parametrize(
    ("length", "block", "steps", "heat"), [(12, 4, 6, 1.0), (12, 12, 5, 0.0), (10, 5, 6, 0.7), (8, 8, 8, 1.0)]
)
def test_writes_what_the_published_loop_writes(
    folder: Path, bundle: ModelBundle, length: int, block: int, steps: int, heat: float
) -> None:
    plain, model = Plain(folder), bundle.model
    assert isinstance(model, LlamaWriter)
    engine = RolloutEngine.of(bundle)
    rollout = engine.write(
        PROMPTS,
        samples=2,
        max_new_tokens=length,
        block_length=block,
        steps=steps,
        temperature=heat,
        seed=5,
        record=True,
    )
    assert rollout.steps is not None and len(rollout) == 4
    for row, which in enumerate(rollout.prompt_index.tolist()):
        ids = bundle.tokenizer.encode(model.asked(PROMPTS[which]))
        noise = gumbel(5, row, block, model.codebook_size)
        tokens, trail, logp = plain_text(plain, ids, length, block, steps, heat, noise, model.mask_id)
        ends = [place for place, token in enumerate(tokens) if token in model.end_ids]
        size = ends[0] + 1 if ends else length
        assert int(rollout.lengths[row]) == size
        assert rollout.tokens[row, :size].tolist() == tokens[:size]
        assert bool((rollout.tokens[row, size:] == -1).all())
        assert (rollout.logp[row, :size] - logp[:size]).abs().max() < 1e-5  # recorded in float32
        last = -(-size // block) * steps // (length // block)  # the step that ends the block of the end
        assert rollout.steps.inputs[row, :last].tolist() == trail[:last]
    assert len({tuple(row) for row in rollout.tokens.tolist()}) > 1, "prompts and samples matter"


def test_a_text_is_the_same_in_any_batch(bundle: ModelBundle) -> None:
    engine = RolloutEngine.of(bundle)
    numbers = {"max_new_tokens": 8, "block_length": 4, "temperature": 1.0, "seed": 3}
    both = engine.write(PROMPTS, samples=2, **numbers)
    alone = engine.write(PROMPTS[1:], samples=1, sample_ids=[3], **numbers)
    assert alone.tokens[0, : int(alone.lengths[0])].tolist() == both.tokens[3, : int(both.lengths[3])].tolist()
    small = RolloutEngine(bundle.model, None, bundle.tokenizer, max_rows=1).write(PROMPTS, samples=2, **numbers)
    assert small.texts == both.texts and len(both.texts) == 4


def test_the_end_of_a_text_ends_its_row(bundle: ModelBundle) -> None:
    """What would follow an end token is neither computed nor part of the text."""
    model, calls = bundle.model, []
    assert isinstance(model, LlamaWriter)
    hidden = model.block_hidden

    def counted(codes: Tensor, *rest: object) -> Tensor:
        calls.append(len(codes))
        return hidden(codes, *rest)  # type: ignore[arg-type]

    engine = RolloutEngine.of(bundle)
    likeliest = engine.write(PROMPTS, max_new_tokens=8, block_length=4, steps=4, seed=0)
    second = int(likeliest.tokens[0, 1])
    ends = model.end_ids
    try:
        model.end_ids = (second,)
        model.block_hidden = counted  # type: ignore[method-assign]
        ended = engine.write(PROMPTS[:1], max_new_tokens=8, block_length=4, steps=4, seed=0, record=True)
    finally:
        model.end_ids = ends
        del model.__dict__["block_hidden"]
    size = int(ended.lengths[0])
    assert size <= 2 and calls == [1, 1], "one block of two steps"
    assert ended.steps is not None and bool((ended.steps.inputs[0, 2:] >= 0).all())


def test_a_group_begins_with_one_row_a_prompt(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = bundle.model, []
    assert isinstance(model, LlamaWriter)
    hidden, last, seen = model.block_hidden, model.model.transformer.blocks[-1], []

    def counted(codes: Tensor, *rest: object) -> Tensor:
        calls.append(len(codes))
        return hidden(codes, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "block_hidden", counted)
    hook = last.register_forward_hook(lambda *of: seen.append(of[2].shape[1]))
    monkeypatch.setattr(model, "end_ids", (-2,))
    RolloutEngine.of(bundle).write(PROMPTS, samples=3, max_new_tokens=8, block_length=4, steps=4, temperature=1.0)
    hook.remove()
    assert calls == [2, 6, 6, 6], "before the first step rows of one prompt are equal"
    assert seen == [4] * 4, "the last layer computes the block alone"


def test_blocks_and_steps() -> None:
    rule = BlockRule(length=128, block=32, steps=64)
    assert rule.plan(None, None, None) == (128, 32, 64) and rule.plan(20, None, None) == (20, 20, 10)
    assert rule.plan(64, 16, 12) == (64, 16, 12)
    assert BlockRule.unknown_after(7, 3) == [4, 2, 0] and BlockRule.unknown_after(4, 4) == [3, 2, 1, 0]
    with pytest.raises(UserError, match="max_new_tokens=20: must be a multiple of block_length=8"):
        rule.plan(20, 8, None)
    with pytest.raises(UserError, match="steps=5: must be a multiple of the 2 blocks"):
        rule.plan(16, 8, 5)


def test_limits(bundle: ModelBundle) -> None:
    engine = RolloutEngine.of(bundle)
    with pytest.raises(UserError, match="llada writes text and draws nothing"):
        engine.generate_images(["a dog"])
    with pytest.raises(UserError, match="llada writes text by blocks, not token by token"):
        engine.generate_text(torch.zeros(1, 4, dtype=torch.int64), ["what ?"])
    with pytest.raises(UserError, match=r"prompt and max_new_tokens reach position 7.: this model has 64"):
        engine.write(PROMPTS[1:], max_new_tokens=64)
    with pytest.raises(UserError, match="text ids of this model are"):
        engine.write([[10**6]], max_new_tokens=4)
    with pytest.raises(UserError, match="llada reads text alone"):
        bundle.vq.encode(torch.zeros(1, 3, 4, 4))


def test_folders(folder: Path, bundle: ModelBundle, tmp_path: Path) -> None:
    assert Sources.choose(Sources(str(folder))) == Sources(*[str(folder)] * 3)
    assert Sources.choose(Sources("llada-8b")).model == "GSAI-ML/LLaDA-8B-Instruct"
    bundle.model.save_pretrained(tmp_path / "saved")
    again = uct.models.load(tmp_path / "saved", torch.float64)
    one, two = (RolloutEngine.of(each).write(PROMPTS, max_new_tokens=8, seed=1) for each in (bundle, again))
    assert one.texts == two.texts and again.model.identity() == bundle.model.identity()

    shutil.copytree(folder, tmp_path / "tied")
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("model.transformer.ff_out.weight")
    save_file({**weights, "model.transformer.wte.weight": head}, tmp_path / "tied" / "model.safetensors")
    tied = LlamaWriter.from_pretrained(tmp_path / "tied", torch.float64)
    assert torch.equal(tied.image_head()[0], head.double())

    weights.pop("model.transformer.blocks.1.up_proj.weight")
    save_file(weights, tmp_path / "tied" / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing \(model.transformer.blocks.1.up_proj.weight"):
        LlamaWriter.from_pretrained(tmp_path / "tied")
    save_file({"showo.model.norm": head}, tmp_path / "tied" / "model.safetensors")
    with pytest.raises(UserError, match="not a checkpoint of LLaDA's layout"):
        LlamaWriter.from_pretrained(tmp_path / "tied")
    (tmp_path / "tied" / "tokenizer.json").unlink()
    shutil.copy(folder / "model.safetensors", tmp_path / "tied" / "model.safetensors")
    with pytest.raises(UserError, match="no tokenizer here that can be read"):
        LlamaWriter.from_pretrained(tmp_path / "tied")
