"""The rivals on the masked model: what learns and what does not, losses written out plainly, rows of a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyunictokens.baselines import showo_yochameleon as yo
from pyunictokens.baselines.base import Trained
from pyunictokens.baselines.loop import batch_of, generator_of
from pyunictokens.baselines.masked import drawing_loss
from pyunictokens.baselines.showo_dreambooth import named
from pyunictokens.data.batches import UnderstandingItem
from pyunictokens.data.folder import load_concept
from pyunictokens.models import ConceptTokens, answering, owning_rows
from pyunictokens.models.checkpoint import load_tensors
from pyunictokens.train.concept_tokens.losses import random_mask
from pyunictokens.train.images import ReferenceImages
from tests.tiny import tiny_toy

ASKED = ("samples=1", "limit=1", "timesteps=2", "max_new_tokens=4", "--device", "cpu")
INVERSION = ("tokens=2", "steps=3", "batch=2")
YO = ("generation=3", "understanding=2", "soft_positives=6", "steps=3", "images=4", "questions=2")
BOOTH = ("steps=2", "batch=2", "prior_images=2", "prior_timesteps=2", "lora_rank=2")


def test_the_image_loss_is_a_plain_mean_over_masked_codes_in_float64() -> None:
    bundle = tiny_toy()
    bundle.model.double()
    generator, plain = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (3, 16), generator=torch.Generator().manual_seed(1))
    prompts = ["a photo of a dog.", "a photo of a cat.", "a cat"]
    mine = drawing_loss(bundle, bundle.tokenizer, codes, prompts, generator, dropout=0.5)

    dropped = [bool(torch.rand((), generator=plain) < 0.5) for _ in prompts]
    mask, _ = random_mask(3, 16, "cosine", plain)
    total, count = 0.0, 0
    weight, bias = bundle.model.image_head()
    for row, prompt in enumerate(prompts):
        ids = bundle.model.prompt_ids([] if dropped[row] else bundle.tokenizer.encode(prompt))
        shown = codes[row : row + 1].masked_fill(mask[row], -1)
        hidden = bundle.model.image_hidden(shown, bundle.model.prefill([ids]), [0], torch.zeros(1))
        logp = torch.log_softmax(hidden[0] @ weight.T + bias, -1)
        total -= float(logp[torch.arange(16), codes[row]][mask[row]].sum())
        count += int(mask[row].sum())
    assert True in dropped and False in dropped
    assert float(mine) == pytest.approx(total / count, abs=1e-12)


@pytest.mark.usefixtures("tiny")
def test_inversion_learns_its_embedding_and_nothing_else(data: Path, call: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "bo"
    call("baseline", "train", "showo-textual-inversion", data, "bo", "--out", out, *INVERSION, "weight_decay=0.1")
    learned, bundle, concept = ConceptTokens.load(out / "concept"), tiny_toy(), load_concept(data, "bo")
    assert learned.num_tokens == 2 and float(learned.head_weight.detach().abs().max()) == 0
    model = owning_rows(bundle.model)
    start = model.embed(torch.tensor(bundle.tokenizer.encode(concept.class_word))).float().mean(0)

    # the same steps, written out: AdamW on the rows by the loss of photos that the seed chooses
    rows = ConceptTokens("bo", model.width, 0, 1)
    with torch.no_grad():
        rows.embed[:] = start
    rows.requires_grad_(False).embed.requires_grad_(True)
    model.attach(rows)
    tokenizer = bundle.tokenizer.with_concept(rows.tokens)
    adam = torch.optim.AdamW([rows.embed], lr=5e-3, weight_decay=0.1)
    photos = ReferenceImages(bundle.model, bundle.vq)
    from pyunictokens.baselines.showo_inversion import PROMPTS

    for step in range(3):
        generator, places = generator_of(0, step), batch_of(10, 2, 0, step)
        codes = torch.stack([photos.codes(concept.train_images[place]) for place in places])
        which = torch.randint(0, len(PROMPTS), (2,), generator=generator).tolist()
        prompts = [PROMPTS[each].format("<token_0><bo>") for each in which]
        adam.zero_grad()
        drawing_loss(bundle, tokenizer, codes, prompts, generator, 0.1).backward()
        adam.step()
    torch.testing.assert_close(learned.embed, rows.embed, rtol=0, atol=1e-6)
    assert not torch.allclose(learned.embed[0], start, atol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_dreambooth_learns_weights_and_draws_alone(
    trainable: str, data: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    out, table = tmp_path / "bo", tmp_path / "table"
    words = (*BOOTH, f"trainable={trainable}", "lr=1e-2")
    call("baseline", "train", "showo-dreambooth", data, "bo", "--out", out, *words)
    prior = load_tensors(out / "prior.safetensors")["codes"]
    assert prior.shape == (2, 16) and int(prior.min()) >= 0
    found = Trained.read(out)
    assert found.title == ("DreamBooth (Show-o, LoRA)" if trainable == "lora" else "DreamBooth (Show-o)")
    whole = sum(value.numel() for value in tiny_toy().model.parameters())
    learned = found.facts["learned"]
    assert learned == whole if trainable == "full" else 0 < learned < whole / 2  # type: ignore[operator]
    call(
        *("evaluate", "table", data, "--name", "bo", "-m", f"showo-dreambooth:{out}", "-m", "showo-tp"),
        *("--out", table, "tasks=[vqa, pure]", *ASKED),
    )
    records = json.loads((table / "results.json").read_text())["records"]
    assert {(r["model"], r["task"]) for r in records} == {
        (found.title, "pure"),
        ("Show-o + TP", "pure"),
        ("Show-o + TP", "vqa"),
    }


def test_dreambooth_names_identifier_and_class() -> None:
    assert named("<bo>", "dog") == "<bo> dog"


@pytest.mark.usefixtures("tiny")
def test_yochameleon_ranks_learns_and_prompts_itself(data: Path, call: Callable[..., str], tmp_path: Path) -> None:
    out, table = tmp_path / "bo", tmp_path / "table"
    call("baseline", "train", "showo-yochameleon", data, "bo", "--out", out, *YO)
    bands = [row["band"] for row in json.loads((out / "soft_positives.json").read_text())["pictures"]]
    assert [band for band in bands if band] == [2, 2, 2, 1, 1, 1]  # the most alike have the most tokens
    found = Trained.read(out)
    assert found.facts["soft"] == 6 and found.facts["learned"] == 6 * (2 * 32 + 1)
    call(
        *("evaluate", "table", data, "--name", "bo", "-m", f"showo-yochameleon:{out}"),
        *("--out", table, "tasks=[vqa, pure]", *ASKED),
    )
    assert len(json.loads((table / "results.json").read_text())["records"]) == 2
    assert "give pool=DIR" not in call("baseline", "train", "showo-yochameleon", data, "bo", "--plan", *YO)


def test_yochameleons_texts() -> None:
    concept, bundle = ConceptTokens("bo", 32, 2, 3), tiny_toy()
    u, g = "<token_0><token_1>", "<token_2><token_3><token_4>"
    assert yo.drawn(concept, "a photo of <bo>.", 3) == f"<bo> is {g}{u}. a photo of <bo>.{g}"
    assert yo.drawn(concept, "a photo of a dog.", 1) == "a photo of a dog.<token_2>"
    tokenizer = bundle.tokenizer.with_concept(concept.tokens)
    row = yo.row_of(concept, tokenizer, answering(bundle.model), UnderstandingItem(None, "is it?", "yes", "positive"))
    assert row.answer == [*tokenizer.encode(u), *tokenizer.encode("yes"), answering(bundle.model).end_id]
