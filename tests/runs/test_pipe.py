"""Publishing: what a run learned, as a folder with a card that a fresh process, PEFT and `generate` open."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import pyunictokens as uct
from pyunictokens.cli import app
from pyunictokens.models import ConceptTokens
from pyunictokens.models.hub import hub_id
from pyunictokens.runs.pipe import Pipeline
from pyunictokens.utils.errors import UserError

from ..models.amused_tiny import write_pipeline
from ..models.llama_tiny import write_checkpoint

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of a tiny Show-o, whose paths are relative to the present folder."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def codes(pipe: Pipeline, prompt: str = "A photo of <bo>.") -> list[list[int]]:
    images = pipe(prompt, num_images_per_prompt=2, num_inference_steps=3, seed=4, output_type="pt").images
    assert isinstance(images, Tensor)
    return [[round(value, 3) for value in image.flatten()[::97].tolist()] for image in images]


def fresh(folder: str, prompt: str = "A photo of <bo>.") -> Any:
    """The same in a process of its own."""
    code = (
        "import json, sys, torch, pyunictokens as uct\n"
        "torch.set_num_threads(1)\n"
        f"pipe = uct.pipeline({folder!r})\n"
        f"images = pipe({prompt!r}, num_images_per_prompt=2, num_inference_steps=3, seed=4, output_type='pt').images\n"
        "print(json.dumps([[round(v, 3) for v in image.flatten()[::97].tolist()] for image in images]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "lora", "full"])
def test_a_published_run_is_opened_elsewhere(old: Path, name: str) -> None:
    pipe = uct.pipeline(name)
    out = pipe("A photo of <bo>.", num_inference_steps=2)
    assert len(out.images) == 1 and out.images[0].size == (pipe.bundle.size, pipe.bundle.size)  # type: ignore[union-attr]
    place = pipe.save_pretrained("out")
    loaded = fresh("out") if name == "run" else codes(Pipeline.from_pretrained("out"))
    assert loaded == codes(pipe) != codes(uct.pipeline("base"), "A photo of a dog.")
    assert not (place / "about.json").exists() and not (place / "checkpoints").exists()
    card = (place / "README.md").read_text()
    said = {"run": "The tokens of a concept", "lora": "LoRA adapters in PEFT's format", "full": "All weights"}[name]
    assert said in card and "One concept, `<bo>` (animal" in card and "toy" not in (place / "config.yaml").read_text()
    assert "root:" not in (place / "config.yaml").read_text() and card.startswith("---\n")
    if name == "run":
        assert "| measure | before | after |" in card and "[" in card.split("| measure")[1]
    again = Pipeline.from_pretrained("out").save_pretrained("once-more", with_facts=True)
    assert codes(Pipeline.from_pretrained(again)) == codes(pipe)
    with pytest.raises(UserError, match="out: already holds something"):
        pipe.save_pretrained("out")
    result = CliRunner().invoke(app, ["generate", "out", "A photo of <bo>.", "timesteps=2", "--out", "image.png"])
    assert result.exit_code == 0 and (old / "image.png").is_file()


def test_the_command_and_facts_that_go_along(old: Path) -> None:
    result = CliRunner().invoke(app, ["publish", "run", "./there", "--with-facts", "--base", "someone/base"])
    assert result.exit_code == 0 and "there" in result.output
    assert json.loads((old / "there" / "about.json").read_text())["extra_info"]
    card = (old / "there" / "README.md").read_text()
    assert "base_model: someone/base" in card and "license: apache-2.0" in card
    assert "model: someone/base" in (old / "there" / "config.yaml").read_text()


def test_peft_loads_published_adapters(old: Path) -> None:
    from peft import PeftModel

    pipe = uct.pipeline("lora")
    place = pipe.save_pretrained("out", base_model="someone/base")
    assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"
    sources = pipe.bundle.sources
    base = uct.models.load(sources.model or "", vq=sources.vq, tokenizer=sources.tokenizer)
    wrapped = PeftModel.from_pretrained(base.model, str(place)).merge_and_unload()  # type: ignore[arg-type]
    learned = dict(pipe.bundle.model.named_parameters())
    plain = dict(wrapped.named_parameters())
    assert plain.keys() == learned.keys()
    for key, value in learned.items():
        torch.testing.assert_close(plain[key], value, atol=1e-6, rtol=1e-6)


def test_a_run_on_prompts_names_its_model_and_says_what_was_measured(tmp_path: Path) -> None:
    def bright(prompts: list[str], images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    folder = write_pipeline(tmp_path / "amused")
    config = uct.train.GrpoConfig(
        steps=2, group_size=4, timesteps=3, trainable="lora", lr=1e-2, guidance_scale=2.0, token_scope="masked"
    )
    held_out = ["big cat", "a photo of snow", "red"]
    uct.train.reinforce(
        uct.models.load(folder), ["a red dog", "a cat"], bright, config, tmp_path / "run", held_out=held_out
    )
    pipe = uct.pipeline(tmp_path / "run")
    assert pipe.bundle.model.family == "amused" and pipe("a cat").images
    place = pipe.save_pretrained(tmp_path / "out")
    card = (place / "README.md").read_text()
    assert "A list of 2 prompts (SHA-256 begins" in card and "3 held out" in card and "library_name: peft" in card
    assert "| `timesteps` | 3 |" in card and "| reward |" in card and " ± " in card and "openrail++" in card
    assert "3 held-out prompts, before and after 2 steps" in card
    assert codes(Pipeline.from_pretrained(place), "a cat") == codes(pipe, "a cat")
    with pytest.raises(UserError, match=r"base_model \(.*pipe\).* on this machine alone"):
        pipe.push_to_hub("someone/red")


@pytest.mark.slow
def test_models_and_tokens_to_a_folder(tmp_path: Path) -> None:
    bundle = uct.models.load(write_checkpoint(tmp_path / "llada", "llada"))
    place = bundle.model.push_to_hub(tmp_path / "out")
    card = (Path(place) / "README.md").read_text()
    assert "license: mit" in card and "pipeline_tag: text-generation" in card
    pipe = uct.pipeline(place)
    said = pipe("a cat", max_new_tokens=8)
    assert said.texts == uct.RolloutEngine.of(bundle).write(["a cat"], max_new_tokens=8).texts and said.images == []
    with pytest.raises(UserError, match="this is a model as it is, no run"):
        pipe.save_pretrained(tmp_path / "nothing")
    tokens = ConceptTokens("bo", 24, 2, 1)
    there = tokens.push_to_hub(tmp_path / "tokens", base_model="showlab/show-o-512x512")
    again = ConceptTokens.from_pretrained(there)
    assert torch.equal(again.embed, tokens.embed) and again.name == "bo"
    code = (
        "import json, sys, pyunictokens as uct\n"
        "said = uct.pipeline(sys.argv[1])('a cat', max_new_tokens=8).texts\n"
        "print(json.dumps([said, uct.ConceptTokens.from_pretrained(sys.argv[2]).embed.tolist()]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(place), str(there)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [said.texts, tokens.embed.tolist()], "a fresh process reads both"
    assert "base_model: showlab/show-o-512x512" in (Path(there) / "README.md").read_text()


def test_what_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: list[Any] = []

    def create(self: object, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        seen.append((repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload(self: object, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        seen.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    tokens = ConceptTokens("bo", 24)
    assert tokens.push_to_hub("someone/bo") == "https://huggingface.co/someone/bo"
    assert seen == [("someone/bo", True, True), ("someone/bo", ["README.md", "concept.json", "concept.safetensors"])]

    def refused(self: object, *_: object, **__: object) -> None:
        raise ValueError("no token")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refused)
    with pytest.raises(UserError, match=r"someone/bo: the hub refused .*no token.*hf auth login"):
        tokens.push_to_hub("hub:someone/bo")


@pytest.mark.parametrize(
    ("to", "found"),
    [("a/b", "a/b"), ("hub:a/b", "a/b"), ("./a/b", None), ("/a/b", None), ("a", None), ("a/b/c", None), ("~/a", None)],
)
def test_hub_ids_and_folders(to: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id(to) == found and hub_id(Path(to)) == (found if to.startswith("hub:") else None)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert hub_id("a/b") is None and hub_id("hub:a/b") == "a/b"
    with pytest.raises(UserError, match="must be hub:owner/name"):
        hub_id("hub:a")


def test_a_run_is_asked_about_an_image(old: Path) -> None:
    from PIL import Image

    pipe = uct.pipeline("run")
    image = pipe("A photo of <bo>.", seed=4).images[0]
    assert isinstance(image, Image.Image)
    image.save("bo.png")
    told = [pipe.ask(about, "What colour is <bo>?", max_new_tokens=6) for about in (image, "bo.png", None)]
    assert told[0] == told[1], "the file holds the same pixels"
    asked = CliRunner().invoke(app, ["understand", "run", "bo.png", "What colour is <bo>?", "max_new_tokens=6"])
    assert asked.exit_code == 0 and asked.output.strip() == told[0].strip()
    with pytest.raises(UserError, match="<mug> is not a token of this model"):
        pipe.ask("bo.png", "What colour is <mug>?")
