"""Textual inversion and DreamBooth on a tiny random Stable Diffusion: parity with the recipes, files that load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pyunictokens.baselines.base import Job, Trained
from pyunictokens.baselines.dreambooth import StableDreamBoothSettings
from pyunictokens.baselines.loop import batch_of, generator_of
from pyunictokens.baselines.stable_diffusion import Parts, photos
from pyunictokens.baselines.textual_inversion import PROMPTS, TextualInversion, TextualInversionSettings, new_rows
from pyunictokens.data.folder import load_concept
from pyunictokens.models.bundle import Sources
from pyunictokens.models.checkpoint import load_tensors
from tests.tiny_diffusion import tiny_pipeline

ASKED = ("samples=1", "limit=1", "--clip", "toy", "tasks=[pure]", "--no-pages")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_recipes_in_float64(kind: str, pipe: Path) -> None:
    parts = Parts(str(pipe), torch.device("cpu"), torch.float64)
    parts.scheduler.register_to_config(prediction_type=kind)
    latents = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    states = parts.states(["a photo of dog", "dog", "snow"])
    generator, plain = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    mine = parts.loss(latents, states, generator)

    noise = torch.randn(latents.shape, generator=plain, dtype=torch.float64)
    at = torch.randint(0, 1000, (3,), generator=plain)
    kept = torch.cumprod(1 - torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float32) ** 2, 0).double()[at]
    kept = kept.view(-1, 1, 1, 1)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    target = noise if kind == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * latents
    made = parts.unet(noisy, at, states).sample
    assert float(mine) == pytest.approx(float(((made - target) ** 2).mean()), rel=1e-6)
    # the library's own scheduler, to the last digits
    noisy = parts.scheduler.add_noise(latents, noise, at)
    aim = noise if kind == "epsilon" else parts.scheduler.get_velocity(latents, noise, at)
    assert float(mine) == pytest.approx(float(F.mse_loss(parts.unet(noisy, at, states).sample, aim)), abs=1e-12)


@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_are_those_of_training_the_whole_table_and_restoring_the_rest(
    tokens: int, pipe: Path, data: Path, tmp_path: Path
) -> None:
    concept, settings = load_concept(data, "bo"), TextualInversionSettings(tokens=tokens, steps=4, batch=2, lr=0.05)
    job = Job(concept, tmp_path, settings, Sources(str(pipe)), dtype=torch.float64)
    TextualInversion().train(job)
    learned = load_tensors(tmp_path / "learned_embeds.safetensors")["<bo>"].view(tokens, -1)

    parts = Parts(str(pipe), torch.device("cpu"), torch.float64)
    names = ["<bo>", "<bo>_1"][:tokens]
    word = parts.tokenizer(concept.class_word, add_special_tokens=False).input_ids[0]
    first = len(parts.tokenizer)
    parts.tokenizer.add_tokens(names)
    parts.text.resize_token_embeddings(len(parts.tokenizer), mean_resizing=False)
    table = parts.text.get_input_embeddings().weight
    with torch.no_grad():
        table[first:] = table[word]
    before, start = table.detach().clone(), table[word].detach().clone()
    parts.text.requires_grad_(False)
    table.requires_grad_(True)
    adam = torch.optim.AdamW([table], lr=0.05, weight_decay=0.01)
    for step in range(4):
        generator, places = generator_of(0, step), batch_of(10, 2, 0, step)
        pixels = photos([concept.train_images[place] for place in places], parts.size, True, generator)
        which = torch.randint(0, len(PROMPTS), (2,), generator=generator).tolist()
        prompts = [PROMPTS[each].format(" ".join(names)) for each in which]
        adam.zero_grad()
        parts.loss(parts.latents(pixels, generator), parts.states(prompts), generator).backward()
        adam.step()
        with torch.no_grad():
            table[:first] = before[:first]
    torch.testing.assert_close(learned, table[first:].detach().float(), rtol=0, atol=2e-5)
    assert float((learned - start.float()).abs().max()) > 0.05


def test_an_inversion_is_a_row_of_a_table(pipe: Path, data: Path, call: Callable[..., str], tmp_path: Path) -> None:
    out, table = tmp_path / "bo", tmp_path / "table"
    base = ("baseline", "train", "textual-inversion", data, "bo", "--out", out, "--model", pipe)
    planned = call(*base, "steps=3", "batch=2", "--plan")
    assert "steps      3" in planned and "TFLOP" in planned and "GiB" in planned and not out.exists()
    call(*base, "steps=3", "batch=2", "tokens=2")
    call("evaluate", "table", data, "--name", "bo", "-m", f"textual-inversion:{out}", "--out", table, *ASKED)
    (record,) = json.loads((table / "results.json").read_text())["records"]
    assert record["model"] == "Textual inversion" and record["scores"]["clip_i"]
    missing = call("baseline", "train", "textual-inversion", data, "bo", "--plan")
    assert "to fetch   stable-diffusion-v1-5/stable-diffusion-v1-5" in missing and "not known before" in missing


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_dreambooth_leaves_what_diffusers_loads(
    trainable: str, pipe: Path, data: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    out, table = tmp_path / "bo", tmp_path / "table"
    many = data / "concept" / "train" / "bo"
    words = ("steps=2", "prior_images=1", "prior_steps=2", "photos=4", f"trainable={trainable}", "lr=0.01")
    call("baseline", "train", "dreambooth", data, "bo", "--out", out, "--model", pipe, *words, f"pictures={many}")
    found = Trained.read(out)
    assert found.facts["photos"] == 14 and (out / "prior" / "0000.png").is_file()
    assert found.title == f"DreamBooth (SD, {'LoRA, ' if trainable == 'lora' else ''}4 photos and more)"
    whole = sum(value.numel() for value in Parts(str(pipe), torch.device("cpu"), torch.float32).unet.parameters())
    learned: Any = found.facts["learned"]
    assert learned == whole if trainable == "full" else 0 < learned < whole / 4
    call("evaluate", "table", data, "--name", "bo", "-m", f"dreambooth:{out}", "--out", table, *ASKED)
    (record,) = json.loads((table / "results.json").read_text())["records"]
    assert record["model"] == found.title and record["scores"]["clip_t"]


def test_photos_and_class_images_are_weighed(pipe: Path, data: Path, tmp_path: Path) -> None:
    """The loss of a step is that of the photos plus `prior_weight` times that of the class."""
    from pyunictokens.baselines.base import run
    from pyunictokens.baselines.dreambooth import DreamBooth

    concept = load_concept(data, "bo")
    found = {}
    for weight in (0.0, 1.0, 2.0):
        settings = StableDreamBoothSettings(steps=1, prior_images=1, prior_steps=1, prior_weight=weight, lr=1e-9)
        folder = tmp_path / f"{weight}"
        run(DreamBooth(), Job(concept, folder, settings, Sources(str(pipe))))
        found[weight] = json.loads((folder / "denoiser.jsonl").read_text())["loss"]
    assert found[1.0] > found[0.0] and found[2.0] - found[0.0] == pytest.approx(2 * (found[1.0] - found[0.0]), rel=1e-5)


def test_new_rows_stand_where_their_tokens_are_read(pipe: Path) -> None:
    parts = Parts(str(pipe), torch.device("cpu"), torch.float32)
    plain = parts.states(["a photo of !"])
    rows = new_rows(parts, ["<bo>"], "!")
    assert torch.allclose(parts.states(["a photo of <bo>"]), plain, atol=1e-5)
    with torch.no_grad():
        rows.mul_(-3.0)
    assert not torch.allclose(parts.states(["a photo of <bo>"]), plain, atol=1e-2)
    assert torch.allclose(parts.states(["a photo of !"]), plain, atol=1e-6)
