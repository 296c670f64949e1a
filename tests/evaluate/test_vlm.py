"""The adapter of transformers' image-text-to-text models, on tiny random checkpoints in the library's own layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyunictokens.evaluate.baselines import baseline, parse
from pyunictokens.evaluate.baselines.vlm import Backbone, Vlm
from pyunictokens.evaluate.core import Unsupported
from pyunictokens.evaluate.tasks import Subject
from pyunictokens.utils.errors import UserError

WORDS = [
    "a",
    "the",
    "is",
    "what",
    "colour",
    "dog",
    "pink",
    "bo",
    "picture",
    "first",
    "shows",
    "question",
    "about",
    "last",
    "user",
    "assistant",
    "in",
    "snow",
    "yes",
    "no",
]
TEMPLATE = (
    "{% for m in messages %}user {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant {% endif %}"
)


def tokenizer(*special: str) -> Any:
    """Words and a few special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["[unk]", "[pad]", "[end]", *special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[unk]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[unk]", pad_token="[pad]", eos_token="[end]")
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def llava(place: Path, text: Any = None) -> None:
    """A LLaVA; `text` is the config of its language model, a Llama by default."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = text or LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    processor = LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    LlavaForConditionalGeneration(config).save_pretrained(place)
    processor.save_pretrained(place)


def qwen(place: Path) -> None:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(*special)
    ids = dict(
        zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
            words.convert_tokens_to_ids(list(special)),
            strict=True,
        )
    )
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    images = Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=1024)
    processor = Qwen2_5_VLProcessor(images, words, Qwen2VLVideoProcessor(patch_size=4))
    processor.chat_template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(place)
    processor.save_pretrained(place)


def chameleon(place: Path) -> None:
    from transformers import (
        ChameleonConfig,
        ChameleonForConditionalGeneration,
        ChameleonImageProcessor,
        ChameleonProcessor,
        ChameleonVQVAEConfig,
    )

    words = tokenizer("<image>", "<racm3:break>", "<eoss>", "<reserved08706>")
    taken = len(words)
    codes = {f"IMGIMG{chr(65 + i)}Z": taken + i for i in range(8)}
    vocabulary = {**words.get_vocab(), **codes}
    vq = ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=8,
        latent_channels=8,
        resolution=16,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
    )
    config = ChameleonConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vq_config=vq,
        vocabulary_map=vocabulary,
        bos_token_id=2,
        eos_token_id=2,
    )
    images = ChameleonImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    ChameleonForConditionalGeneration(config).save_pretrained(place)
    ChameleonProcessor(images, words, image_seq_length=64).save_pretrained(place)


@pytest.fixture(scope="module", params=[llava, qwen, chameleon], ids=lambda make: make.__name__)
def backbone(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    torch.manual_seed(0)
    make: Callable[[Path], None] = request.param
    place = tmp_path_factory.mktemp(make.__name__)
    make(place)
    return Backbone(str(place))


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    place = tmp_path_factory.mktemp("photos") / "0.png"
    picture(5).save(place)
    return Subject("bo", "dog", "animal", "<bo> is a pink dog", ["its toy is a ball"], [place])


def test_the_answer_is_the_librarys_own_continuation(backbone: Backbone, subject: Subject) -> None:
    model = Vlm(backbone, subject, max_new_tokens=5)
    asked: list[tuple[int, str]] = []
    backbone._prompt, kept = lambda n, text: asked.append((n, text)) or kept(n, text), backbone._prompt  # type: ignore
    answer = model.answer([picture(1)], "what is the colour?")
    backbone._prompt = kept  # type: ignore[method-assign]
    assert asked == [(1, "<bo> is a pink dog. its toy is a ball. what is the colour?")]
    text = kept(1, asked[0][1])
    inputs = backbone.processor(text=[text], images=[picture(1)], return_tensors="pt")
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(5):  # greedy, by whole forward passes without a cache
            mask = torch.ones_like(ids)
            rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
            if "mm_token_type_ids" in rest:
                grown = torch.zeros_like(ids)
                grown[:, : rest["mm_token_type_ids"].shape[1]] = rest["mm_token_type_ids"]
                rest["mm_token_type_ids"] = grown
            logits = backbone.model(input_ids=ids, attention_mask=mask, **rest).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            if ids[0, -1].item() == 2:
                break
    wanted = backbone.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert answer == wanted.strip()
    assert model.answer([picture(1)], "what is the colour?") == answer


def test_an_image_prompt_shows_the_photo_first(backbone: Backbone, subject: Subject) -> None:
    model = Vlm(backbone, subject, shown=1, max_new_tokens=3)
    seen: list[tuple[int, str]] = []
    backbone.answer, kept = (
        lambda images, text, n: seen.append((len(images), text)) or kept(images, text, n),
        backbone.answer,
    )  # type: ignore
    try:
        assert isinstance(model.answer([picture(1)], "what is it?"), str)
        assert isinstance(model.answer([], "what is it?"), str)
    finally:
        backbone.answer = kept  # type: ignore[method-assign]
    assert seen[0] == (2, "The first picture shows <bo>. The question is about the last picture. what is it?")
    assert seen[1] == (1, "The first picture shows <bo>. what is it?")


def test_questions_without_a_picture(backbone: Backbone, subject: Subject) -> None:
    assert isinstance(Vlm(backbone, subject, max_new_tokens=2).answer([], "what is <bo>?"), str)


def test_it_does_not_draw(backbone: Backbone, subject: Subject) -> None:
    with pytest.raises(Unsupported, match="generates no images"):
        Vlm(backbone, subject).generate("a photo", 1, 0)


def test_bad_checkpoints_and_subjects(backbone: Backbone, subject: Subject, tmp_path: Path) -> None:
    row = baseline(parse(f"transformers:{tmp_path}+ip"))
    assert row.name.endswith("+ IP")
    with pytest.raises(UserError, match="cannot be loaded as an image-text-to-text model"):
        row.load(subject)
    (tmp_path / "config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match=r"config\.json: a Git LFS pointer"):
        row.load(subject)
    with pytest.raises(UserError, match="no references, so there is no image prompt"):
        Vlm(backbone, Subject("bo", "dog"), shown=1)
