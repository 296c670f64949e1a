"""Yo'Chameleon on a tiny random Chameleon: samples, ids, loss and trained rows of the published recipe, by the
library's own code; the VQGAN decoder against that of diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyunictokens.baselines import answering, yochameleon
from pyunictokens.baselines.base import Job, run
from pyunictokens.baselines.chameleon import Chameleon, VqDecoder, decoder_weights
from pyunictokens.baselines.registry import method
from pyunictokens.baselines.token_rows import FILE
from pyunictokens.baselines.yochameleon import Drawing, Tokens, YoChameleonSettings, reserved_ids, sequence
from pyunictokens.data.folder import load_concept
from pyunictokens.data.images import read_image
from pyunictokens.evaluate.core import Unsupported
from pyunictokens.evaluate.retrieval import Picture, Ranking
from pyunictokens.evaluate.tasks import Subject
from pyunictokens.models.bundle import Sources
from pyunictokens.models.checkpoint import load_tensors
from pyunictokens.utils.errors import UserError
from tests.baselines.tiny_chameleon import RESERVED, chameleon

SMALL: dict[str, Any] = {"generation": 3, "understanding": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    made = tmp_path_factory.mktemp("chameleon")
    chameleon(made)
    return made


@pytest.fixture(scope="module")
def ranked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of random_images in two bands, with two hard and one easy negative."""
    files = sorted((data / "random_images").glob("*.png"))[:7]
    kinds = [(2, "hard"), (2, "hard"), (2, ""), (1, ""), (1, ""), (1, ""), (0, "easy")]
    pictures = [Picture(f, 0.9 - i / 10, 0.9, b, n) for i, (f, (b, n)) in enumerate(zip(files, kinds, strict=True))]
    out = tmp_path_factory.mktemp("ranked")
    Ranking("bo", "toy", [], pictures, 2, 0.95).save(out / "ranked.json")
    return out


def job_of(data: Path, out: Path, place: Path, ranked: Path, **more: Any) -> Job[Any]:
    settings = YoChameleonSettings(ranked=str(ranked), **{**SMALL, **more})
    return Job(load_concept(data, "bo"), out, settings, Sources(str(place)))


def test_samples_are_the_published_mix(data: Path, place: Path, ranked: Path, tmp_path: Path) -> None:
    job = job_of(data, tmp_path, place, ranked)
    samples = yochameleon.samples_of(job.concept, yochameleon.ranking_of(job), job.settings)
    drawings = [each for each in samples if isinstance(each, Drawing)]
    assert [(d.tokens, d.prompt) for d in drawings[:6]] == [
        *[(1, "A photo of <reserved16201>.")] * 3,
        *[(2, "A photo of <reserved16201><reserved16202>.")] * 3,
    ]
    full = "<reserved16200> is " + "".join(RESERVED[1:]) + ". A photo of <reserved16200>."
    assert [(d.tokens, d.prompt) for d in drawings[6:]] == [(3, full)] * 4  # four photos, at least as many as a band
    questions = [each for each in samples if not isinstance(each, Drawing)]
    own = set(job.concept.train_images)
    no, yes = ([q for q in questions if q.answer.startswith(w)] for w in ("No, <bo>", "Yes, this is"))
    assert len(no) == 3 and not own & {q.image for q in no}
    assert len(yes) == 3 + 5 and {q.image for q in yes} == set(job.concept.train_images[:5])
    assert len(questions) == 11 + len(job.concept.conversations) + len(job.concept.text_only)


def test_ids_and_loss_of_a_batch_in_float64_are_those_of_the_library(
    data: Path, place: Path, ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(data, tmp_path, place, ranked)
    tokens, concept = Tokens.of(job.settings), job.concept
    mine = Chameleon(str(place), dtype=torch.float64)
    photo = concept.train_images[0]
    batch = [
        Drawing(photo, f"{tokens.before} A photo of {tokens.identifier}.", 3),
        answering.Sample(concept.train_images[1], "what is <bo>?", "<bo> is a dog"),
        answering.Sample(None, "what colour is <bo>?", "pink"),
    ]
    generator = torch.Generator().manual_seed(0)
    made = [sequence(mine, tokens, concept, each, 0.0, generator) for each in batch]
    total = sum(len(answer) for _, answer in made)
    got = sum(mine.loss(prompt, answer) / total for prompt, answer in made)

    # the published way: texts through the processor, placeholders for images, labels with codes put in on the fly
    plain = Chameleon(str(place), dtype=torch.float64)
    g, u = "".join(tokens.generation), "".join(tokens.understanding)
    end = "<reserved08706>"
    texts = [
        (f"{tokens.before} A photo of {tokens.identifier}.{end}{g}<image>", [photo]),
        (
            f"<image>\n{tokens.before} what is {tokens.identifier}?{end}{u}{tokens.identifier} is a dog",
            [concept.train_images[1]],
        ),
        (f"{tokens.before} what colour is {tokens.identifier}?{end}{u}pink", []),
    ]
    parts, count = [], 0
    boi, eoi = plain.processor.image_start_token_id, plain.processor.image_end_token_id
    mapping = plain.model.model.vocabulary_mapping
    assert len(mapping.img2bpe_mapping_tensor) == 8  # made once, from the tokens that are taken away now
    monkeypatch.setattr(mapping, "image_tokens", [])  # the library masks image tokens
    for (text, photos), (prompt, answer) in zip(texts, made, strict=True):
        images = [read_image(each) for each in photos]
        inputs = plain.processor(text=[text], images=images or None, return_tensors="pt")
        ids = inputs["input_ids"][0]
        labels = ids.clone()
        if photos:
            pixels = inputs["pixel_values"].double()
            inputs["pixel_values"] = pixels
            codes = plain.model.model.get_image_tokens(pixels)[0]
            soi, eot = int((labels == boi).nonzero()) + 1, int((labels == eoi).nonzero())
            labels[soi:eot] = codes
        assert labels.tolist() == [*prompt, *answer]
        first = int((ids == plain.end_of_turn).nonzero()[0]) + 1
        labels[:first] = -100
        out = plain.model(**inputs, labels=labels[None])
        size = int((labels != -100).sum())
        part = torch.nn.functional.cross_entropy(out.logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")
        assert float(out.loss.detach()) * size == pytest.approx(
            float(part.detach()), rel=1e-6
        )  # the library's own loss is in float32
        parts.append(part.detach())
        count += size
    assert count == total
    assert float(got.detach()) == pytest.approx(float(sum(parts)) / count, rel=1e-12)  # type: ignore[arg-type]


def test_image_tokens_keep_their_logits(place: Path) -> None:
    mine = Chameleon(str(place))
    ids = torch.tensor([[5, 6, 7, 8]])
    images = mine.model.model.vocabulary_mapping.image_tokens
    masked, own = mine.model(input_ids=ids).logits, mine.logits(ids, 4)
    text = [index for index in range(masked.shape[-1]) if index not in images]
    assert torch.equal(masked[..., text], own[..., text])
    assert (masked[..., images] == torch.finfo(masked.dtype).min).all() and (own[..., images].abs() < 100).all()


def test_the_trained_rows_are_those_of_the_published_way(data: Path, place: Path, ranked: Path, tmp_path: Path) -> None:
    job = job_of(data, tmp_path / "out", place, ranked, max_steps=3, batch=2, flip=0.0)
    done = run(method("yochameleon"), job)
    assert done.facts["rows"] == 6 and done.facts["drawings"] == 10 and done.facts["decoder"] is True
    plain, settings, tokens = Chameleon(str(place)), job.settings, Tokens.of(job.settings)
    model, ids = plain.model, reserved_ids(plain, tokens)
    tables = [model.get_input_embeddings().weight, model.lm_head.weight]
    model.requires_grad_(False)
    for table in tables:
        table.requires_grad_(True)
    kept = [table.detach().clone() for table in tables]
    others = torch.ones(len(tables[0]), dtype=torch.bool)
    others[ids] = False
    adam = torch.optim.AdamW(tables, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-6)
    samples = yochameleon.samples_of(job.concept, yochameleon.ranking_of(job), settings)
    for step in range(3):
        batch = [samples[i] for i in answering.picked(len(samples), settings, step)]
        pairs = [sequence(plain, tokens, job.concept, each, 0.0, torch.Generator()) for each in batch]
        longest = max(len(p) + len(a) for p, a in pairs)
        ids_BL, labels = torch.ones(len(pairs), longest, dtype=torch.int64), torch.full((len(pairs), longest), -100)
        for row, (p, a) in enumerate(pairs):
            ids_BL[row, : len(p) + len(a)] = torch.tensor([*p, *a])
            labels[row, len(p) : len(p) + len(a)] = torch.tensor(a)
        logits = model.lm_head(model.model(input_ids=ids_BL).last_hidden_state)
        adam.zero_grad()
        model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1]).backward()
        adam.step()
        with torch.no_grad():
            for table, before in zip(tables, kept, strict=True):
                table[others] = before[others]
    mine = load_tensors(tmp_path / "out" / FILE)
    assert torch.allclose(mine["embed"], tables[0].detach()[ids], atol=1e-6)
    assert torch.allclose(mine["head"], tables[1].detach()[ids], atol=1e-6)
    assert (mine["embed"] - kept[0][ids]).abs().max() > 1e-3


def test_the_decoder_is_a_vqgan_decoder(place: Path) -> None:
    """The same numbers as diffusers' decoder with the same weights."""
    from diffusers.models.autoencoders.vae import Decoder

    config = Chameleon(str(place)).model.config.vq_config
    mine = VqDecoder(config)
    mine.load_state_dict(decoder_weights(str(place)))
    theirs = Decoder(8, 3, ("UpDecoderBlock2D",) * 2, (32, 64), 1, 32, "silu", "group")
    renamed = {}
    for name, value in mine.state_dict().items():
        new = name.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
        new = re.sub(r"^mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", new)
        new = re.sub(r"^mid\.attn_1\.norm", "mid_block.attentions.0.group_norm", new)
        new = re.sub(r"^mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1.", new)
        new = new.replace("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0")
        new = re.sub(r"^up\.(\d)\.block\.(\d)", lambda m: f"up_blocks.{1 - int(m[1])}.resnets.{m[2]}", new)
        new = re.sub(r"^up\.(\d)\.upsample", lambda m: f"up_blocks.{1 - int(m[1])}.upsamplers.0", new)
        renamed[new] = value[..., 0, 0] if "attentions" in new and value.ndim == 4 else value
    theirs.load_state_dict(renamed)
    features = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        assert torch.allclose(mine(features), theirs(features), atol=1e-5)


def test_images_are_drawn_among_image_tokens_by_seed_and_with_a_cache(place: Path) -> None:
    mine = Chameleon(str(place))
    prompt = [5, 6, int(mine.processor.image_start_token_id)]
    codes = mine.sample_codes(prompt, 2, seed=3)
    allowed = mine.model.model.vocabulary_mapping.image_tokens
    assert codes.shape == (2, 16) and set(codes.flatten().tolist()) <= set(allowed)
    assert torch.equal(codes, mine.sample_codes(prompt, 2, seed=3))
    assert torch.equal(codes[:1], mine.sample_codes(prompt, 1, seed=3))  # the number decides, not the batch
    assert not torch.equal(codes, mine.sample_codes(prompt, 2, seed=4))
    for row in range(2):  # anew, without a cache
        generator, ids = torch.Generator().manual_seed(3000 + row), torch.tensor([prompt])
        for place_ in range(16):
            chances = mine.logits(ids, 1)[0, 0, allowed].softmax(-1)
            drawn = allowed[int(torch.multinomial(chances.detach(), 1, generator=generator))]
            assert drawn == int(codes[row, place_])
            ids = torch.cat([ids, torch.tensor([[drawn]])], dim=1)
    pixels = mine.decode(codes)
    assert pixels.shape == (2, 3, 8, 8) and pixels.abs().max() <= 1
    wanted = [mine.model.model.vocabulary_mapping.bpe2img[int(index)] for index in codes[0]]
    features = mine.model.model.vqmodel.quantize.embedding(torch.tensor(wanted)).T.reshape(1, 8, 4, 4)
    with torch.no_grad():
        alone = mine.decoder()(mine.model.model.vqmodel.post_quant_conv(features))[0].clamp(-1, 1)
    assert torch.allclose(alone, pixels[0], atol=1e-5)


def test_the_command_and_a_table(
    data: Path, place: Path, ranked: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    base = ("baseline", "train", "yochameleon", data, "bo", "--out", tmp_path / "bo", "--model", place)
    small = ("generation=3", "understanding=2", "max_steps=2", "batch=1")
    assert "made by `pyunictokens data negatives`" in call(*base, "--plan", *small)
    assert "ranked is empty" in call(*base, *small, code=2)
    (tmp_path / "bo" / "baseline.json").unlink(missing_ok=True)
    assert "has 2 bands for 2 generation tokens" in call(*base, f"ranked={ranked}", "generation=2", code=2)
    (tmp_path / "bo" / "baseline.json").unlink(missing_ok=True)
    said = call(*base, f"ranked={ranked}", *small)
    assert "Yo'Chameleon" in said
    asked = ("tasks=[vqa, pure]", "limit=1", "samples=2", "max_new_tokens=3", "--device", "cpu", "--clip", "toy")
    rows = ("-m", f"yochameleon:{tmp_path}/{{name}}")
    call("evaluate", "table", data, "--name", "bo", *rows, "--out", tmp_path / "table", *asked)
    records = json.loads((tmp_path / "table" / "results.json").read_text())["records"]
    assert {(r["task"], r["model"]) for r in records} == {("vqa", "Yo'Chameleon"), ("pure", "Yo'Chameleon")}
    assert all("clip_i" in r["scores"] for r in records if r["task"] == "pure")


def test_what_is_lacking_is_told(data: Path, ranked: Path, tmp_path: Path, place: Path) -> None:
    bare = tmp_path / "bare"
    chameleon(bare, decoder=False)
    mine, settings = Chameleon(str(bare)), YoChameleonSettings(**SMALL)
    model = yochameleon.Asked(mine, Tokens.of(settings), Subject("bo", "dog"), 2)
    with pytest.raises(Unsupported, match="holds no weights of a VQGAN decoder"):
        model.generate("A photo of <bo>.", 1, 0)
    again = Chameleon(str(bare), decoder=str(place))
    assert again.decoder() is again.decoder()
    with pytest.raises(UserError, match="no <reserved16206>"):
        reserved_ids(mine, Tokens.of(YoChameleonSettings(generation=4, understanding=2)))
    other = job_of(data, tmp_path, place, ranked)
    other.concept.name = "mo"
    with pytest.raises(UserError, match="ranks pictures for <bo>, not for <mo>"):
        yochameleon.ranking_of(other)
