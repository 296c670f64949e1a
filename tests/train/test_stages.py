"""Concept stages: where rows begin, which of them change, and that the losses are what they say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyunictokens.models import ConceptTokens, PromptKV
from pyunictokens.models.showo import prompting
from pyunictokens.ops import mask_rate
from pyunictokens.train import as_prompt, as_question, read_metrics, train_concept_tokens
from pyunictokens.train.concept_tokens import token_init as rows
from pyunictokens.train.concept_tokens.checkpoint import StageCheckpoint
from pyunictokens.train.concept_tokens.losses import generation_loss, random_mask, text_row, understanding_loss
from pyunictokens.train.images import ReferenceImages
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import read_json, write_json
from pyunictokens.utils.signals import Stopped
from tests.train.world import World, stage_config, tiny_concept, tiny_model, world

ALL = ("understanding", "generation", "deepening", "joint")


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


def learn(here: World, out: Path, config: Any = None, **options: Any) -> ConceptTokens:
    return train_concept_tokens(
        here.model, here.vq, here.tokenizer, here.data, config or stage_config(), out, **options
    )


def moved(one: ConceptTokens, other: ConceptTokens, group: str) -> float:
    return float((one.embed[one.rows(group)] - other.embed[other.rows(group)]).detach().abs().max())


# --- the stages ----------------------------------------------------------------------------------------------------


def test_each_stage_changes_its_own_rows_and_nothing_else(here: World, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in here.model.state_dict().items()}
    events: list[tuple[str, int, int]] = []
    config = stage_config(stages=ALL, max_steps=4)
    learned = learn(here, tmp_path / "c", config, progress=lambda *event: events.append(event[:3]))
    assert all(torch.equal(value, weights[name]) for name, value in here.model.state_dict().items())
    assert here.model.concept is learned and not learned.embed.requires_grad
    stage = {name: ConceptTokens.load(tmp_path / "c" / name) for name in ALL}
    assert torch.equal(ConceptTokens.load(tmp_path / "c" / "concept").embed, stage["joint"].embed)
    assert [stage[name].num_tokens for name in ALL] == [6, 6, 8, 8]

    begin = ConceptTokens("bo", 32, 3, 2, seed=0)
    rows.from_noise(begin, "generation", 1)
    assert moved(stage["understanding"], begin, "generation") == 0
    for group in ("sks", "understanding", "generation"):
        assert moved(stage["generation"], stage["understanding"], group) > 1e-4, group
        if group != "sks":
            assert moved(stage["deepening"], stage["generation"], group) == 0, group
    assert moved(stage["deepening"], stage["generation"], "sks") > 1e-4
    for group in ("sks", "understanding", "generation", "extra"):
        assert moved(stage["joint"], stage["deepening"], group) > 1e-4, group
    assert (stage["understanding"].head_weight[4:] == begin.head_weight[4:]).all()

    lines = read_metrics(tmp_path / "c", "stages.jsonl")
    assert [(line["stage"], line["step"]) for line in lines] == [
        (name, number) for number, name in enumerate(name for name, _, _ in events)
    ]
    for line in lines[:: len(lines) - 1]:
        both = 0.2 * line["loss_understanding"] + 0.8 * line.get("loss_generation", 0.0)
        assert line["loss"] == pytest.approx(
            both if "loss_generation" in line else line["loss_understanding"], rel=1e-4
        )
    per_stage = {name: max(done for each, done, _ in events if each == name) for name in ALL}
    assert all(total == per_stage[name] for name, _, total in events)


def test_the_losses_go_down(here: World, tmp_path: Path) -> None:
    config = stage_config(
        epochs=99,
        max_steps=60,
        lr=1e-2,
        lr_generation=3e-2,
        batch_generation=3,
        condition_dropout=0.0,
        flip=False,
        crop=1,
    )
    learn(here, tmp_path / "c", config)
    lines = read_metrics(tmp_path / "c", "stages.jsonl")
    for stage, loss in (("understanding", "loss_understanding"), ("generation", "loss_generation")):
        values = torch.tensor([line[loss] for line in lines if line["stage"] == stage])
        assert values[-20:].mean() < values[:20].mean() - 0.3, stage


def test_pull_keeps_the_name_near(here: World, tmp_path: Path) -> None:
    far = {}
    for pull in (0.0, 100.0):
        config = stage_config(max_steps=12, l2_pull=pull, lr_generation=1e-2)
        learn(here, tmp_path / str(pull), config)
        stage = [ConceptTokens.load(tmp_path / str(pull) / name) for name in ("understanding", "generation")]
        far[pull] = {group: moved(stage[1], stage[0], group) for group in ("sks", "generation")}
    assert far[100.0]["sks"] < 0.5 * far[0.0]["sks"]
    assert far[100.0]["generation"] > 0.5 * far[0.0]["generation"]


def test_stages_are_repeatable_and_go_on_where_they_stopped(here: World, tmp_path: Path) -> None:
    whole = learn(here, tmp_path / "a")

    def stop(stage: str, done: int, total: int, values: dict[str, Any]) -> None:
        if stage == "generation" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(here, tmp_path / "b", progress=stop)
    with pytest.raises(UserError, match=r"already holds concept stages.*--resume"):
        learn(here, tmp_path / "b")
    with pytest.raises(UserError, match="other settings"):
        learn(here, tmp_path / "b", stage_config(epochs=3), resume=True)
    seen = []
    again = learn(here, tmp_path / "b", resume=True, progress=lambda stage, *_: seen.append(stage))
    assert set(seen) == {"generation"}
    assert torch.equal(again.embed, whole.embed) and torch.equal(again.head_weight, whole.head_weight)
    assert read_metrics(tmp_path / "a", "stages.jsonl") == read_metrics(tmp_path / "b", "stages.jsonl")


def test_a_stage_that_is_cut_off_goes_on_inside_and_ends_as_if_it_had_not_been(here: World, tmp_path: Path) -> None:
    config = stage_config(stages=ALL, max_steps=7, epochs=9, save_every=3)
    whole = learn(here, tmp_path / "a", config)
    seen: list[tuple[str, int]] = []

    def cut(at: tuple[str, int] | None) -> Any:
        def progress(stage: str, done: int, *_: Any) -> None:
            seen.append((stage, done))
            if (stage, done) == at:
                raise KeyboardInterrupt

        return progress

    out = tmp_path / "b"
    for place, stage in enumerate(ALL):  # five steps in, of which three are in the checkpoint
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            learn(here, out, config, resume=place > 0, progress=cut((stage, 5)))
        assert seen[0] == ((ALL[place - 1], 4) if place else (ALL[0], 1))
        assert (out / "stage.safetensors").exists() and not (out / stage).exists()
    again = learn(here, out, replace(config, save_every=2), resume=True)  # it changes no number
    for name, value in whole.named_parameters():
        assert torch.equal(value, dict(again.named_parameters())[name]), name
    for stage in ALL:
        assert torch.equal(ConceptTokens.load(tmp_path / "a" / stage).embed, ConceptTokens.load(out / stage).embed)
    assert read_metrics(tmp_path / "a", "stages.jsonl") == read_metrics(out, "stages.jsonl")
    assert not list(tmp_path.rglob("stage.safetensors")), "a finished stage leaves no checkpoint"


def test_a_stage_that_is_asked_to_stop_writes_its_checkpoint(here: World, tmp_path: Path) -> None:
    config, asked, seen = stage_config(save_every=0), iter([False, False, True]), []
    whole = learn(here, tmp_path / "a", config)
    with pytest.raises(Stopped, match=r"in stage understanding at step 3 of .*, its checkpoint is written"):
        learn(here, tmp_path / "b", config, stop=lambda: next(asked))
    again = learn(here, tmp_path / "b", config, resume=True, progress=lambda stage, done, *_: seen.append(done))
    assert seen[0] == 4 and torch.equal(again.embed, whole.embed) and torch.equal(again.head_bias, whole.head_bias)


def test_a_checkpoint_of_a_stage_is_taken_by_its_own_run_alone(
    here: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, asked = stage_config(save_every=1), iter([False, True])
    with pytest.raises(Stopped):
        learn(here, tmp_path / "b", config, stop=lambda: next(asked))
    kept = (tmp_path / "b" / "stage.safetensors").read_bytes()
    whole = learn(here, tmp_path / "b", config, resume=True)
    (tmp_path / "b" / "stage.safetensors").write_bytes(kept)  # as a kill leaves it after the stage's last file
    again = learn(here, tmp_path / "b", config, resume=True)
    assert torch.equal(again.embed, whole.embed) and not (tmp_path / "b" / "stage.safetensors").exists()

    shutil.rmtree(tmp_path / "b" / "understanding")
    (tmp_path / "b" / "stage.safetensors").write_bytes(kept)
    here.data.conversations = here.data.conversations[:-1]
    seen: list[int] = []
    learn(here, tmp_path / "b", config, resume=True, progress=lambda stage, done, *_: seen.append(done))
    assert seen[0] == 1 and "folder has changed" in caplog.text


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_a_damaged_checkpoint_of_a_stage_begins_it_anew(
    here: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: float
) -> None:
    config, asked, seen = stage_config(save_every=1), iter([False, True]), []
    whole = learn(here, tmp_path / "a", config)
    with pytest.raises(Stopped):
        learn(here, tmp_path / "b", config, stop=lambda: next(asked))
    file = tmp_path / "b" / "stage.safetensors"
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)
    again = learn(here, tmp_path / "b", config, resume=True, progress=lambda stage, done, *_: seen.append(done))
    assert seen[0] == 1 and "stage.safetensors is left out" in caplog.text
    assert torch.equal(again.embed, whole.embed)
    assert read_metrics(tmp_path / "a", "stages.jsonl") == read_metrics(tmp_path / "b", "stages.jsonl")


def test_bytes_that_are_no_checkpoint_of_a_stage_are_left_out(
    here: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = iter([True])
    with pytest.raises(Stopped):
        learn(here, tmp_path / "b", stop=lambda: next(asked))
    file = tmp_path / "b" / "stage.safetensors"
    good = load_file(file)
    assert StageCheckpoint.load(tmp_path / "b") is not None

    def said(**changes: Any) -> dict[str, torch.Tensor]:
        state = {**json.loads(good["state"].numpy().tobytes()), **changes}
        return {**good, "state": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    wrong = [
        {"x": torch.zeros(2)},
        {**good, "state": torch.zeros(9, dtype=torch.uint8)},
        {**good, "generator": torch.zeros(9, dtype=torch.uint8)},
        {**good, "begin.embed": torch.zeros(2, 2)},
        {name: value for name, value in good.items() if name != "rows.head_bias"},
        said(sizes={"num_understanding": 10**12}),
        said(sizes=[3]),
        said(name="../x"),
        said(questions=3),
        said(step="x"),
    ]
    for tensors in wrong:
        caplog.clear()
        save_file(tensors, file)
        assert StageCheckpoint.load(tmp_path / "b") is None and "is left out" in caplog.text
    for data in (b"", b"garbage" * 9, b"version https://git-lfs.github.com/spec/v1\n", b"\x80" * 64):
        file.write_bytes(data)
        assert StageCheckpoint.load(tmp_path / "b") is None


def test_stages_of_an_older_version_are_gone_on_with(here: World, tmp_path: Path) -> None:
    whole = learn(here, tmp_path / "a")
    about = read_json(tmp_path / "a" / "stages.json")
    del about["save_every"]
    write_json(tmp_path / "a" / "stages.json", about)
    assert torch.equal(learn(here, tmp_path / "a", resume=True).embed, whole.embed)


def test_training_in_float16_says_why_not(here: World, tmp_path: Path) -> None:
    learn(here, tmp_path / "a")
    here.model = tiny_model().half()
    with pytest.raises(UserError, match=r"gradients below 6e-8 vanish.*dtype=bfloat16"):
        learn(here, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.warns(UserWarning, match="begun in float16 and goes on"):
        learn(here, tmp_path / "a", resume=True)


def test_bad_input(here: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 steps in a row, .*step 2 of stage understanding, are not finite: loss nan"):
        here.model.showo.lm_head.bias.data[3] = float("nan")
        learn(here, tmp_path / "a")
    here.model = tiny_model()
    here.data.class_word = ""
    with pytest.raises(UserError, match="class word ''"):
        learn(here, tmp_path / "b")
    here.data.train_images = []
    with pytest.raises(UserError, match="no training images"):
        learn(here, tmp_path / "c")
    here.vq = here.vq.__class__(replace(here.vq.config, z_channels=6))
    with pytest.raises(UserError, match="64 codes, the model 32"):
        learn(here, tmp_path / "d")


# --- starting rows -------------------------------------------------------------------------------------------------


def test_rows_begin_where_they_should(here: World) -> None:
    model, concept = here.model, ConceptTokens("bo", 32, 3, 2)
    table = model.showo.model.embed_tokens.weight
    rows.from_class_word(concept, model, here.tokenizer, "small dog")
    ids = here.tokenizer.encode("small dog")
    assert len(ids) == 2 and torch.allclose(concept.embed[0], table[ids].mean(0))
    codes = torch.tensor([[1, 1, 1, 9], [1, 20, 9, 9]])
    rows.from_codes(concept, model, codes, "understanding", seed=0)
    centres = {tuple(row.tolist()) for row in concept.embed[1:4]}
    assert centres == {tuple(row.tolist()) for row in model.embed_codes(torch.tensor([1, 9, 20]))}
    points = torch.cat([torch.randn(30, 4) * 0.01 + at for at in (torch.zeros(4), torch.ones(4), -torch.ones(4))])
    found = rows.kmeans(points, 3, seed=0)
    assert torch.allclose(found[found[:, 0].argsort()], torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, 4), atol=0.02)
    assert torch.equal(rows.kmeans(torch.ones(7, 4), 3, seed=0), torch.ones(3, 4))
    face = torch.arange(10.0)
    rows.from_face(concept, torch.zeros(2, 3, 4, 4), lambda pixels: torch.stack([face, face + 2]))
    start = concept.embed[concept.rows("generation")]
    assert torch.allclose(start.mean(1), torch.tensor([3.0, 8.0])) and bool((start.diff(dim=1) >= 0).all())
    with pytest.raises(UserError, match="face embedding"):
        rows.from_face(concept, torch.zeros(1, 3, 4, 4), lambda pixels: torch.full((1, 4), float("nan")))


def test_faces_start_a_human(here: World, tmp_path: Path) -> None:
    asked = []

    def faces(pixels: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(pixels.shape))
        return torch.full((len(pixels), 8), 3.0)

    slow = stage_config(epochs=1, max_steps=1, lr_generation=1e-6)
    learn(here, tmp_path / "animal", slow, face_embedding=faces)
    assert not asked
    here.data.kind = "human"
    concept = learn(here, tmp_path / "human", slow, face_embedding=faces)
    assert asked == [(3, 3, 16, 16)]
    assert torch.allclose(concept.embed[concept.rows("generation")], torch.tensor(3.0), atol=1e-3)


# --- losses --------------------------------------------------------------------------------------------------------


def test_understanding_is_the_answers_tokens_alone(here: World) -> None:
    model = here.model.attach(tiny_concept().requires_grad_(True))
    tokenizer, ids = here.tokenizer.with_concept(model.concept.tokens), prompting.SpecialIds.of(model)
    pictures = ReferenceImages(model, here.vq)
    asked = [
        ("what is <bo>?", "a dog"),
        (as_question(model.concept, "is <bo> here?"), "yes"),
        ("small?", "<bo> red ball"),
    ]
    images = [here.data.train_images[0], None, here.data.train_images[0]]
    prefixes = PromptKV([], [], [])
    total, count = torch.zeros(()), 0
    for (question, answer), image in zip(asked, images, strict=True):
        prefixes = prefixes + pictures.prefix(image)
        text = tokenizer.encode(prompting.chat_question(question))
        said = [*tokenizer.encode(answer), ids.eot]
        sequence = prompting.mmu(pictures.codes(image), text, ids, said[:-1])[None]
        assert sequence[0, -1] == ids.eot
        logits = model(sequence, prompting.attention_allowed(sequence, "mmu", ids))[0, -len(said) - 1 : -1]
        total = total - logits.log_softmax(-1).gather(-1, torch.tensor(said)[:, None]).sum()
        count += len(said)
    found = understanding_loss(
        model, prefixes, [text_row(tokenizer, model, model.question_text(q), a) for q, a in asked]
    )
    assert float(found) == pytest.approx(float(total / count), rel=1e-5)
    learn = list(model.concept.parameters())
    for mine, theirs in zip(torch.autograd.grad(found, learn), torch.autograd.grad(total / count, learn), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_generation_is_the_masked_codes_alone(here: World) -> None:
    model = here.model.attach(tiny_concept().requires_grad_(True))
    model.max_text = 8
    ids, generator = prompting.SpecialIds.of(model), torch.Generator().manual_seed(1)
    codes = torch.randint(0, 32, (3, 16), generator=generator)
    mask, at = random_mask(*codes.shape, "cosine", generator)
    first = model.config.first_code_id
    texts = [[5, first, first + 2], [], [5, first, first + 2]]
    prompts = [prompting.t2i_text(text, ids, 8) for text in texts]
    total = torch.zeros(())
    for row, text in enumerate(texts):
        sequence = prompting.t2i(text, codes[row].masked_fill(mask[row], -1), ids, 8)[None]
        logits = model(sequence, prompting.attention_allowed(sequence, "t2i", ids))[0, -17:-1, first + 6 : first + 38]
        logp = logits.log_softmax(-1).gather(-1, codes[row][:, None])[:, 0]
        total = total - logp[mask[row]].sum()
    found = generation_loss(model, codes, mask, prompts, at)
    assert float(found) == pytest.approx(float(total / mask.sum()), rel=1e-5)
    mine, theirs = (torch.autograd.grad(loss, model.concept.embed)[0] for loss in (found, total / mask.sum()))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_masks_follow_the_schedule() -> None:
    codes = torch.zeros(4000, 16, dtype=torch.int64)
    mask, _ = random_mask(*codes.shape, "cosine", torch.Generator().manual_seed(0))
    counts = mask.sum(1)
    assert counts.min() == 1 and counts.max() == 16
    wanted = sum(max(1, round(16 * mask_rate("cosine", place / 999))) for place in range(1000)) / 1000
    assert float(counts.float().mean()) == pytest.approx(wanted, abs=0.25)
    assert (mask.float().mean(0) - counts.float().mean() / 16).abs().max() < 0.03  # no position is preferred


# --- texts and pictures --------------------------------------------------------------------------------------------


def test_texts_name_the_concept_the_same_way_everywhere() -> None:
    concept = tiny_concept()
    helpers = "<token_0><token_1><token_2><token_3><token_4>"
    assert as_prompt(concept, "A photo of <bo>. <bo> is red.") == f"A photo of {helpers}<bo>. <bo> is red."
    assert as_question(concept, "Is <bo> here?", ("understanding",)) == "Is <token_0><token_1><token_2><bo> here?"
    prefixed = as_question(concept, "Is <bo> here?", ("understanding",), "prefix")
    assert prefixed == "<bo> is <token_0><token_1><token_2>.Is <bo> here?"
    assert as_question(concept, "Is it red?") == "Is it red?"
    with pytest.raises(ValueError, match="expand or prefix"):
        as_question(concept, "?", form="suffix")


def test_pictures(here: World) -> None:
    model = here.model.attach(tiny_concept())
    pictures, path = ReferenceImages(model, here.vq, crop=1.25, flip=True), here.data.train_images[0]
    assert pictures.size == 16 and pictures.pixels(None).eq(-1).all()
    assert torch.equal(pictures.codes(path), here.vq.encode(pictures.pixels(path)[None])[0])
    generator = torch.Generator().manual_seed(0)
    many = pictures.augmented([path] * 40, generator)
    assert len(many.unique(dim=0)) > 10 and many.shape == (40, 16)
    still = ReferenceImages(model, here.vq).augmented([path, path], generator)
    assert torch.equal(still, pictures.codes(path).expand(2, 16))
    kept = pictures.prefix(path)
    assert pictures.prefix(path) is kept and kept.lengths == [19] and kept.next_position == [19]
    assert ReferenceImages(model, here.vq, cache_mb=0).prefix(path) is not kept
