"""Yo'LLaVA and MC-LLaVA on tiny random LLaVAs: the trained rows are those of the published way, which trains whole
matrices and puts everything else back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans

from pyunictokens.baselines import answering, mcllava
from pyunictokens.baselines.base import Job, Trained, run
from pyunictokens.baselines.registry import method
from pyunictokens.baselines.token_rows import FILE, TokenRows, add_tokens
from pyunictokens.data.folder import load_concept
from pyunictokens.data.images import read_image
from pyunictokens.evaluate.baselines.vlm import Backbone
from pyunictokens.models.bundle import Sources
from pyunictokens.models.checkpoint import load_tensors
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.signals import Stopped
from tests.evaluate.test_vlm import llava


def phi(place: Path) -> None:
    """A LLaVA with Phi inside."""
    from transformers import PhiConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llava(place, PhiConfig(vocab_size=24, partial_rotary_factor=0.5, **sizes))


@pytest.fixture(scope="module", params=[("yollava", llava), ("yollava-phi", phi)], ids=["llama", "phi"])
def named(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    torch.manual_seed(0)
    name, make = request.param
    place = tmp_path_factory.mktemp(name)
    make(place)
    return name, place


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("llava")
    llava(place)
    return place


def job_of(kind: Any, data: Path, out: Path, model: Path, **settings: Any) -> Job[Any]:
    return Job(load_concept(data, "bo"), out, kind.settings(**settings), Sources(str(model)))


def published(
    job: Job[Any],
    backbone: Backbone,
    names: list[str],
    before: str,
    start: tuple[torch.Tensor, torch.Tensor],
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Whole matrices under AdamW by the library's own loss, all other rows restored after each step."""
    model, processor, settings = backbone.model, backbone.processor, job.settings
    processor.tokenizer.add_tokens(names)
    ids = processor.tokenizer.convert_tokens_to_ids(names)
    model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    model.requires_grad_(False)
    for table, rows in zip(tables, start, strict=True):
        table.data[ids] = rows
        table.requires_grad_(True)
    kept = [table.detach().clone() for table in tables]
    others = torch.ones(len(tables[0]), dtype=torch.bool)
    others[ids] = False
    adam = torch.optim.AdamW(tables, lr=settings.lr, betas=(0.9, 0.999), weight_decay=settings.weight_decay, eps=1e-8)
    samples, seen = answering.samples_of(job.concept), []
    for step in range(steps):
        (place,) = answering.picked(len(samples), settings, step)
        sample = samples[place]
        images = [] if sample.image is None else [read_image(sample.image)]
        inputs = dict(backbone.inputs(images, f"{before} {sample.question}"))
        answer = processor.tokenizer(f" {sample.answer.strip()}", add_special_tokens=False)["input_ids"]
        answer = torch.tensor([[*answer, processor.tokenizer.eos_token_id]])
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        adam.zero_grad()
        loss = model(**inputs, labels=labels).loss
        seen.append(float(loss.detach()))
        loss.backward()
        adam.step()
        with torch.no_grad():
            for table, before_step in zip(tables, kept, strict=True):
                table[others] = before_step[others]
    return tables[0].detach()[ids], tables[1].detach()[ids], seen


def test_the_trained_rows_are_those_of_the_published_way(named: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    name, place = named
    kind = method(name)
    job = job_of(kind, data, tmp_path / "bo", place, tokens=3, max_steps=4, flip=0.0, seed=3)
    done = run(kind, job)
    names = ["<bo>", "<token_0>", "<token_1>", "<token_2>"]
    assert done.facts["tokens"] == names and done.facts["before"] == "<bo> is <token_0><token_1><token_2>."
    fresh = Backbone(str(place))
    first = TokenRows(fresh.model, names, add_tokens(fresh.model, fresh.processor.tokenizer, names, 3))
    start = (first.embed.detach().clone(), first.head.detach().clone())
    embed, head, seen = published(job, Backbone(str(place)), names, str(done.facts["before"]), start, 4)
    mine = load_tensors(tmp_path / "bo" / FILE)
    assert torch.allclose(mine["embed"], embed, atol=1e-6) and torch.allclose(mine["head"], head, atol=1e-6)
    assert (mine["embed"] - start[0]).abs().max() > 1e-3 and (mine["head"] - start[1]).abs().max() > 1e-3
    log = [json.loads(line)["loss"] for line in (tmp_path / "bo" / "tokens.jsonl").read_text().splitlines()]
    assert log == pytest.approx(seen, rel=1e-5)


def test_loss_and_gradients_of_a_batch_in_float64(named: tuple[str, Path], data: Path) -> None:
    _, place = named
    backbone = Backbone(str(place), dtype=torch.float64)
    names = ["<bo>", "<token_0>"]
    rows = TokenRows(backbone.model, names, add_tokens(backbone.model, backbone.processor.tokenizer, names, 1))
    start = (rows.embed.detach().clone(), rows.head.detach().clone())
    concept = load_concept(data, "bo")
    samples = answering.samples_of(concept)[:3]
    asked = [([] if s.image is None else [read_image(s.image)], s.question, s.answer) for s in samples]
    total = sum(answering.losses(backbone, asked), torch.zeros((), dtype=torch.float64))
    total.backward()
    # the library's own loss, one by one, weighted by the number of answer tokens
    plain = Backbone(str(place), dtype=torch.float64)
    plain.processor.tokenizer.add_tokens(names)
    ids = plain.processor.tokenizer.convert_tokens_to_ids(names)
    plain.model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    tables = [plain.model.get_input_embeddings().weight, plain.model.get_output_embeddings().weight]
    for table, value in zip(tables, start, strict=True):
        table.data[ids] = value
    parts, counts = [], []
    for images, question, answer in asked:
        inputs = dict(plain.inputs(images, question))
        target = answering.answer_ids(plain, answer)[None]
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), target], 1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], target], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = plain.model(**inputs).logits[:, :-1].flatten(0, 1)
        parts.append(
            torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        )
        counts.append(target.shape[1])
    wanted = sum(parts) / sum(counts)
    wanted.backward()
    assert float(total) == pytest.approx(float(wanted), rel=1e-12)
    assert torch.allclose(rows.embed.grad, tables[0].grad[ids], atol=1e-12)  # type: ignore[arg-type, index]
    assert torch.allclose(rows.head.grad, tables[1].grad[ids], atol=1e-12)  # type: ignore[arg-type, index]


def test_a_table_asks_what_was_learned(tiny_llava: Path, data: Path, call: Callable[..., str], tmp_path: Path) -> None:
    words = ("--model", tiny_llava, "tokens=2", "max_steps=2", "lr=0.5")
    planned = call("baseline", "train", "yollava", data, "bo", "--out", tmp_path / "bo", "--plan", *words)
    assert "steps      2" in planned and not (tmp_path / "bo").exists()
    said = call("baseline", "train", "yollava", data, "bo", "--out", tmp_path / "bo", *words)
    assert "Yo'LLaVA" in said
    rows = ("-m", f"yollava:{tmp_path}/{{name}}", "-m", f"transformers:{tiny_llava}")
    asked = (
        "--name",
        "bo",
        "--out",
        tmp_path / "table",
        "tasks=[vqa, pure]",
        "limit=1",
        "samples=1",
        "max_new_tokens=3",
    )
    call("evaluate", "table", data, *rows, *asked, "--device", "cpu")
    records = json.loads((tmp_path / "table" / "results.json").read_text())["records"]
    assert {(r["model"], r["task"]) for r in records if r["model"].startswith("Yo")} == {("Yo'LLaVA", "vqa")}


def test_it_ends_as_if_it_had_never_been_stopped(tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    kind = method("yollava")
    settings = {"tokens": 2, "max_steps": 4, "seed": 5}
    run(kind, job_of(kind, data, tmp_path / "whole", tiny_llava, **settings))
    cut, calls = job_of(kind, data, tmp_path / "cut", tiny_llava, **settings), iter([False, True])
    cut.stop = lambda: next(calls)
    with pytest.raises(Stopped):
        run(kind, cut)
    assert not Trained.read(tmp_path / "cut").done
    again = job_of(kind, data, tmp_path / "cut", tiny_llava, **settings)
    again.resume = True
    run(kind, again)
    whole, mine = (load_tensors(tmp_path / name / FILE) for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], mine[key]) for key in whole)


def test_mcllava_begins_with_the_published_centres_and_learns_concepts_together(
    tiny_llava: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    for name, seed in (("bo", 1), ("mo", 2)):
        write_toy_concept(root, seed=seed, kind="animal", name=name)
    backbone = Backbone(str(tiny_llava))
    train = root / "concept" / "train" / "bo"
    for photo in sorted(train.glob("*.png")):
        levels = np.zeros((256, 256), np.uint8)
        levels[:128] = 255  # the upper half: two of the four visual tokens
        Image.fromarray(levels).save(train / f"{photo.stem}_mask.png")
    kind = method("mcllava")
    job = Job(load_concept(root, "bo"), tmp_path / "out", kind.settings(tokens=3, max_steps=1, others=("mo",)))
    job.sources = Sources(str(tiny_llava))
    names = kind.tokens(job)  # type: ignore[attr-defined]
    assert names == ["<bo>", "<token_0>", "<token_1>", "<token_2>", "<mo>", "<token_3>", "<token_4>", "<token_5>"]
    rows = TokenRows(backbone.model, names, add_tokens(backbone.model, backbone.processor.tokenizer, names, 0))
    length = float(Backbone(str(tiny_llava)).model.get_input_embeddings().weight.norm(dim=1).mean())
    assert mcllava.mean_length(backbone, rows) == pytest.approx(length, rel=1e-6)
    points = torch.cat([mcllava.visual_tokens(backbone, path) for path in job.concept.train_images])
    assert len(points) == 2 * len(job.concept.train_images)
    everything = torch.cat([mcllava.visual_tokens(backbone, path, masks=False) for path in job.concept.train_images])
    assert torch.equal(everything.view(-1, 4, 16)[:, :2].reshape(-1, 16), points)
    kind.begin(job, backbone, rows)  # type: ignore[attr-defined]
    distinct, weights = points.unique(dim=0, return_counts=True)
    fitted = KMeans(3, random_state=0, n_init=1).fit(distinct.detach().numpy(), sample_weight=weights.numpy())
    wanted = torch.from_numpy(fitted.cluster_centers_)
    wanted = wanted / wanted.norm(dim=1, keepdim=True) * length
    assert torch.allclose(rows.embed[1:4], wanted, atol=1e-5)
    assert torch.allclose(rows.embed[0], wanted.mean(0), atol=1e-5)
    done = run(kind, job)
    assert done.facts["before"] == "<bo> is <token_0><token_1><token_2>.<mo> is <token_3><token_4><token_5>."
    assert len(kind.samples(job)) == sum(len(answering.samples_of(load_concept(root, n))) for n in ("bo", "mo"))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="name each concept once"):
        kind.tokens(Job(job.concept, tmp_path, kind.settings(others=("bo",))))  # type: ignore[attr-defined]


def test_what_cannot_be_is_told(tiny_llava: Path, data: Path, call: Callable[..., str], tmp_path: Path) -> None:
    train = ("baseline", "train", "yollava", data, "bo", "--out", tmp_path / "x")
    assert "tokens=0: must be between 1" in call(*train, "--model", tiny_llava, "tokens=0", code=2)
    phi_said = call("baseline", "train", "yollava-phi", data, "bo", "--out", tmp_path / "p", code=2)
    assert "give --model" in phi_said
    backbone = Backbone(str(tiny_llava))
    with pytest.raises(UserError, match=r"\[end\]: is a token of the model already"):
        add_tokens(backbone.model, backbone.processor.tokenizer, ["[end]"], 0)
    rows = TokenRows(backbone.model, ["<bo>"], add_tokens(backbone.model, backbone.processor.tokenizer, ["<bo>"], 0))
    rows.save(tmp_path)
    other = Backbone(str(tiny_llava))
    more = ["<bo>", "<a>"]
    with pytest.raises(UserError, match="another model"):
        TokenRows(other.model, more, add_tokens(other.model, other.processor.tokenizer, more, 0)).restore(tmp_path)
