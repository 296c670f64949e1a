"""Small random checkpoints of the real networks, each saved by its own library in its own layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "dog", "cat", "red", "blue", "ball", "snow"]
WORDS += ["the", "its", "favourite", "toy", "is", "on", "beach", "##s", ".", ","]
SENTENCES = ["a photo of a red dog.", "its favourite toy is the blue ball", "cats, dogs, snow", "beach"]


def write_vocabulary(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")


def save_ernie(folder: Path, **changes: object) -> Path:
    """ErnieModel with its vocabulary alone, as ERNIE 3.0 is published (no tokenizer.json)."""
    from transformers import ErnieConfig, ErnieModel

    torch.manual_seed(1)
    settings = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    settings |= {"max_position_embeddings": 18, "use_task_id": True, "vocab_size": len(WORDS), **changes}
    ErnieModel(_noisy(ErnieConfig(**settings))).save_pretrained(folder)
    write_vocabulary(folder)
    return folder


def save_dinov2(folder: Path, registers: int = 0) -> Path:
    """DINOv2 on 28 pixels of patch 7, with its Bit processor."""
    import transformers

    torch.manual_seed(2)
    settings = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28, "patch_size": 7}
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    if registers:
        settings["num_register_tokens"] = registers
    config = getattr(transformers, f"{name}Config")(**settings)
    getattr(transformers, f"{name}Model")(_noisy(config)).save_pretrained(folder)
    transformers.BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return folder


def save_blip2(folder: Path, image_token: bool = True) -> Path:
    """BLIP-2's retrieval model on 28 pixels of patch 7, with the processor that belongs to it."""
    from transformers import (
        BertTokenizer,
        Blip2Config,
        Blip2ForImageTextRetrieval,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessor,
    )

    torch.manual_seed(3)
    write_vocabulary(folder)
    vision = Blip2VisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=28,
        patch_size=7,
        initializer_range=0.2,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        encoder_hidden_size=24,
        use_qformer_text_input=True,
        initializer_range=0.2,
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        num_query_tokens=4,
        image_text_hidden_size=12,
        image_token_index=len(WORDS) if image_token else None,
        initializer_range=0.2,
    )
    model = Blip2ForImageTextRetrieval(config)
    with torch.no_grad():
        model.query_tokens.normal_()  # made of zeros; trained ones are not
    model.save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(images, tokenizer, num_query_tokens=4 if image_token else None).save_pretrained(folder)
    return folder


@cache
def _facenet_weights() -> dict[str, torch.Tensor]:
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(4)
    net = InceptionResnetV1(classify=True, num_classes=7)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return net.state_dict()


def save_facenet(folder: Path) -> Path:
    """InceptionResnetV1 as published: one state dict, the classifier's rows among it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(_facenet_weights(), folder / "20180402-114759-vggface2.pt")
    return folder


def _noisy(config: object) -> object:
    """The config with weights large enough that every part of the network shows in the result."""
    config.initializer_range = 0.2  # type: ignore[attr-defined]
    return config


class Folders(NamedTuple):
    """A checkpoint of every expert."""

    ernie: Path
    blip2: Path
    dinov2: Path
    facenet: Path

    def settings(self, *names: str) -> dict[str, Any]:
        """The `experts:` table of a run over these folders."""
        table = {"tier": self.ernie, "ber": self.blip2, "der": self.dinov2, "fer": self.facenet}
        return {name: {"path": str(path)} for name, path in table.items() if name in (names or table)}


def pil(pixels: torch.Tensor) -> list[Any]:
    """Pixels [B, 3, H, W] in [-1, 1] as pictures of 8 bits, as a file would hold them."""
    from PIL import Image

    values = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in values]


def pixels_of(picture: Any) -> torch.Tensor:
    """A picture (uint8 array [H, W, 3]) as pixels [1, 3, H, W] in [-1, 1]."""
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
