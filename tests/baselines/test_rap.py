"""RAP on a tiny random LLaVA and a tiny random CLIP: retrieval, prompt and ids as published, LoRA by peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyunictokens.baselines import answering, rap
from pyunictokens.baselines.base import Job, run
from pyunictokens.baselines.rap import Database, RapSettings, prompt_of, with_lora
from pyunictokens.baselines.registry import method
from pyunictokens.data.folder import load_concept
from pyunictokens.data.images import from_pil, read_image
from pyunictokens.evaluate.baselines.vlm import Backbone
from pyunictokens.evaluate.clip import Embeddings, OpenClip
from pyunictokens.models.bundle import Sources
from pyunictokens.models.checkpoint import load_tensors
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.utils.errors import UserError
from tests.evaluate.test_clip import CONFIG
from tests.evaluate.test_vlm import llava

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(3)
    place = tmp_path_factory.mktemp("clip")
    weights = {key: value.contiguous() for key, value in open_clip.CLIP(**CONFIG["model_cfg"]).state_dict().items()}
    save_file(weights, place / "open_clip_model.safetensors")
    (place / "open_clip_config.json").write_text(json.dumps(CONFIG))
    return str(place)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("llava")
    llava(place)
    return place


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    for seed, name in enumerate(("bo", "mo", "zo")):
        write_toy_concept(root, seed=seed, kind="animal", name=name)
    return root


def job_of(root: Path, out: Path, model: Path, clip: str, **settings: Any) -> Job[Any]:
    return Job(load_concept(root, "bo"), out, RapSettings(clip=clip, **settings), Sources(str(model)))


def test_retrieval_is_that_of_the_published_index(many: Path, clip: str, model: Path, tmp_path: Path) -> None:
    """Names first; then the two nearest of each image by squared distance of normalised CLIP features."""
    job = job_of(many, tmp_path, model, clip)
    done = run(method("rap"), job)
    assert done.facts["concepts"] == 3 and done.facts["steps"] == 0
    database = Database.load(tmp_path, many)
    assert [entry.token for entry in database.entries] == ["<bo>", "<mo>", "<zo>"]
    embeddings = Embeddings(OpenClip(clip), "clip")
    features = embeddings.references([entry.image for entry in database.entries]).double().numpy()
    for concept in ("bo", "mo", "zo"):
        for photo in load_concept(many, concept).test_images:
            query = embeddings.samples(from_pil(read_image(photo))[None])[0]
            far = ((features - query.double().numpy()) ** 2).sum(1)
            order = np.argsort(far)
            found = database.nearest(query, 3)
            assert [place for _, place in found] == order.tolist()
            assert [value for value, _ in found] == pytest.approx(far[order].tolist(), abs=1e-5)
            tokens = [entry.token for entry in database.retrieve("what is this?", [query], 2)]
            assert tokens == [database.entries[place].token for place in order[:2]]
            named = [entry.token for entry in database.retrieve("where is <zo>?", [query], 2)]
            assert named[0] == "<zo>" and named[1] == next(t for t in tokens if t != "<zo>")
    assert [e.token for e in database.retrieve("<mo> and <zo> and <bo>?", [], 2)] == ["<bo>", "<mo>", "<zo>"]
    assert database.search.split(",")[0] in ("faiss", "torch")


def test_search_without_faiss_says_so_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    entries = [rap.Entry(f"<c{i}>", Path(f"{i}.png"), "", "") for i in range(9)]
    embed, query = torch.randn(9, 5), torch.randn(5)
    usual = Database(entries, embed)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plain = Database(entries, embed)
    assert "faiss is not installed" in plain.search and "pyunictokens[faiss]" in plain.search
    assert [place for _, place in plain.nearest(query, 9)] == [place for _, place in usual.nearest(query, 9)]


def test_prompt_ids_are_the_published_ones(many: Path, clip: str, model: Path, tmp_path: Path) -> None:
    database = Database.of([load_concept(many, name) for name in ("bo", "mo")], Embeddings(OpenClip(clip), ""), False)
    backbone = Backbone(str(model))
    mine = prompt_of(database.entries, "what is <bo>?", True, backbone.token)
    extra = ""
    for number, entry in enumerate(database.entries):  # as the published retriever and command line write it
        name = entry.token[1:-1]
        extra += f"{number + 1}.<image>\n Name: <{name}>, Info: {entry.info}\n"
    assert mine == "<image>" + f"\n[{extra}]" + "what is <bo>?"
    photos = [read_image(entry.image) for entry in (database.entries[0], *database.entries)]
    got = backbone.inputs(photos, mine, placed=True)
    wanted = backbone.processor(text=[f"<image>\n[{extra}]what is <bo>?"], images=photos, return_tensors="pt")
    assert torch.equal(got["input_ids"], wanted["input_ids"]) and torch.equal(
        got["pixel_values"], wanted["pixel_values"]
    )
    assert prompt_of(database.entries[:1], "q", False, "<image>").startswith("[1.<image>\n Name: <bo>, Info: ")


def test_lora_goes_to_the_language_model_alone_and_starts_from_nothing(model: Path) -> None:
    backbone = Backbone(str(model), dtype=torch.float64)
    asked = [([], "what is <bo>?", "a dog"), ([], "what colour is it?", "pink")]
    before = float(sum(answering.losses(backbone, asked)).detach())  # type: ignore[union-attr]
    backbone.model = with_lora(backbone.model, RapSettings(rank=4, alpha=8, dropout=0.0))
    learned = {name for name, value in backbone.model.named_parameters() if value.requires_grad}
    assert learned and all("language_model" in name and "lora_" in name for name in learned)
    layers = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for name in learned}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert float(sum(answering.losses(backbone, asked)).detach()) == pytest.approx(before, rel=1e-12)  # type: ignore[union-attr]


def test_post_training_and_a_table(
    many: Path, clip: str, model: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    words = ("--model", model, f"clip={clip}", "post_train=true", "rank=2", "alpha=4", "max_steps=2", "batch=2")
    planned = call("baseline", "train", "rap", many, "bo", "--out", tmp_path / "bo", "--plan", *words)
    assert "steps      2" in planned
    call("baseline", "train", "rap", many, "bo", "--out", tmp_path / "bo", *words, "lr=0.1", "dropout=0")
    adapter = load_tensors(tmp_path / "bo" / "adapter" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    call("baseline", "train", "rap", many, "bo", "--out", tmp_path / "plain", "--model", model, f"clip={clip}")
    asked = ("--name", "bo", "tasks=[vqa]", "limit=2", "max_new_tokens=4", "--device", "cpu")
    call("evaluate", "table", many, "-m", f"rap:{tmp_path}/bo", "--out", tmp_path / "table", *asked)
    records = json.loads((tmp_path / "table" / "results.json").read_text())["records"]
    assert {record["model"] for record in records} == {"RAP-MLLM"} and len(records) == 2


def test_what_cannot_be_is_told(data: Path, clip: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no concept beside bo"):
        run(method("rap"), job_of(data, tmp_path / "a", model, clip, post_train=True))
    run(method("rap"), job_of(data, tmp_path / "b", model, clip))
    (tmp_path / "b" / "database.json").write_text('{"concept_dict": {"<bo>": {}}}')
    with pytest.raises(UserError, match="is no database of RAP"):
        Database.load(tmp_path / "b", data)
    with pytest.raises(UserError, match="top_k=0"):
        RapSettings(top_k=0)
