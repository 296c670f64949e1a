"""The adapter of diffusers' pipelines, on a tiny random Stable Diffusion saved as the library saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyunictokens.evaluate.baselines import baseline, parse
from pyunictokens.evaluate.baselines.diffusion import Diffusion, DiffusionSource, Pipeline, parse_source
from pyunictokens.evaluate.core import Unsupported
from pyunictokens.evaluate.tasks import Subject
from pyunictokens.utils.errors import UserError
from tests.tiny_diffusion import tiny_pipeline

BO = Subject("bo", "dog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("sd"))


def drawn(source: DiffusionSource, prompt: str = "a photo of <bo> in the snow", n: int = 2, seed: int = 3) -> Any:
    return Diffusion(Pipeline(source), BO).generate(prompt, n, seed)


@pytest.fixture(scope="module")
def base(folder: Path) -> DiffusionSource:
    return DiffusionSource(str(folder), steps=2)


def test_drawings_are_the_pipelines_own(base: DiffusionSource) -> None:
    import diffusers

    pixels = drawn(base)
    assert pixels.shape == (2, 3, 16, 16) and pixels.min() >= -1 and pixels.max() <= 1
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base.path)
    made = pipe("a photo of sks dog in the snow", num_inference_steps=2, guidance_scale=7.5, output_type="pt",
                generator=torch.Generator().manual_seed(3001)).images  # fmt: skip
    assert torch.allclose(pixels[1], made[0] * 2 - 1, atol=1e-4)
    assert torch.allclose(drawn(base, n=1)[0], pixels[0], atol=1e-4)  # its number decides, not the batch
    assert not torch.allclose(drawn(base, seed=4), pixels, atol=1e-2)


def test_dreambooth_weights_as_a_lora(base: DiffusionSource, tmp_path: Path) -> None:
    from dataclasses import replace

    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base.path)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    assert not torch.allclose(drawn(replace(base, lora=str(tmp_path))), drawn(base), atol=1e-3)


def test_textual_inversion_puts_its_row_behind_the_name(base: DiffusionSource, tmp_path: Path) -> None:
    from dataclasses import replace

    from safetensors.torch import save_file

    row = torch.randn(16)
    save_file({"<learned>": row}, tmp_path / "learned_embeds.safetensors")
    pipeline = Pipeline(replace(base, embedding=str(tmp_path / "learned_embeds.safetensors")))
    model = Diffusion(pipeline, BO)
    place = pipeline.pipe.tokenizer.convert_tokens_to_ids("<bo>")
    assert torch.equal(pipeline.pipe.text_encoder.get_input_embeddings().weight[place], row)
    assert model.words == "<bo>" and torch.isfinite(model.generate("<bo> in the snow", 1, 0)).all()
    Diffusion(pipeline, BO)  # a second concept of the same token does not load it twice


def test_it_does_not_answer(base: DiffusionSource) -> None:
    with pytest.raises(Unsupported, match="does not answer"):
        Diffusion(Pipeline(base), BO).answer([], "what is it?")


def test_words_of_the_command_line(folder: Path) -> None:
    assert parse_source(["p", "lora=x", "steps=3", "token=my {class}"]) == DiffusionSource(
        "p", "x", None, "my {class}", 3
    )
    row = baseline(parse(f"diffusers:{folder},steps=2,token=sks"))
    assert row.name.startswith("pipe") and row.load(BO).generate("<bo>", 1, 0).shape == (1, 3, 16, 16)
    for words, message in ((["p", "loras=x"], "one of lora, embedding"), (["p", "steps=few"], "'few' is no int")):
        with pytest.raises(UserError, match=message):
            parse_source(words)


def test_what_is_missing_is_named(base: DiffusionSource, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(UserError, match="cannot be loaded as a pipeline"):
        Pipeline(DiffusionSource(str(tmp_path)))
    with pytest.raises(UserError, match=r"lora=.*nowhere.safetensors: no such folder"):
        Pipeline(replace(base, lora=str(tmp_path / "nowhere.safetensors")))
    for file in ("bad.safetensors", "bad.bin"):
        (tmp_path / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        with pytest.raises(UserError, match=rf"{file}: a Git LFS pointer"):
            Diffusion(Pipeline(replace(base, embedding=str(tmp_path / file))), BO)
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"bad.safetensors: cannot be loaded"):
        Diffusion(Pipeline(replace(base, embedding=str(tmp_path / "bad.safetensors"))), BO)
