"""CLIP through open_clip: a tiny random model in the library's own folder layout, against the library's own steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pyunictokens.data.images import from_pil
from pyunictokens.evaluate.clip import Embeddings, OpenClip, resized
from pyunictokens.utils.errors import UserError

CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as open_clip saves it for the hub."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(3)
    place = tmp_path_factory.mktemp("clip")
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, place / "open_clip_model.safetensors"
    )
    (place / "open_clip_config.json").write_text(json.dumps(CONFIG))
    return place


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Smooth random colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_embeddings_are_those_of_the_library(folder: Path) -> None:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    net = OpenClip(str(folder))
    assert net.size == 32
    for number, size in enumerate([(32, 32), (75, 53), (41, 90), (160, 160)]):
        image = photo(*size, seed=number)
        with torch.no_grad():
            wanted = model.encode_image(preprocess(image)[None])
        got = net.encode_image(from_pil(image)[None])
        assert F.cosine_similarity(got, wanted).item() > 1 - 1e-4, size
        if size == (32, 32):
            assert torch.allclose(got, wanted, atol=1e-5)
    texts = ["a photo of a dog", "eine Katze im Schnee", "x " * 200]
    with torch.no_grad():
        wanted = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts))
    assert torch.allclose(net.encode_text(texts), wanted, atol=1e-6)


def test_preprocessing_is_that_of_the_checkpoint(folder: Path) -> None:
    import open_clip

    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image = photo(75, 53, seed=9)
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][key]).view(3, 1, 1) for key in ("mean", "std"))
    got = ((resized(from_pil(image)[None], 32)[0].clamp(-1, 1) + 1) / 2 - mean) / std
    # Pillow rounds to 8 bits between its two passes and at the end; more than that would be another resampling
    assert (got - preprocess(image)).abs().max() < 2.5 / 255 / 0.2


def test_an_architecture_with_a_weight_file(folder: Path, tmp_path: Path) -> None:
    """ARCHITECTURE=FILE, on an architecture small enough for a test; and a file of another model."""
    import open_clip
    from safetensors.torch import save_file

    (tmp_path / "tiny-for-tests.json").write_text(json.dumps(CONFIG["model_cfg"]))
    open_clip.add_model_config(tmp_path / "tiny-for-tests.json")
    texts = ["a photo of a dog"]
    got = OpenClip(f"tiny-for-tests={folder / 'open_clip_model.safetensors'}").encode_text(texts)
    assert torch.allclose(got, OpenClip(str(folder)).encode_text(texts), atol=1e-6)
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="its weights cannot be read"):
        OpenClip(f"tiny-for-tests={tmp_path / 'w.safetensors'}").encode_text(texts)
    with pytest.raises(UserError, match="'no-such-net': open_clip knows none"):
        OpenClip(f"no-such-net={tmp_path / 'w.safetensors'}").encode_text(texts)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (" ", "is empty"),
        ("nowhere", "no such folder, and not a hub id"),
        ("ViT-B-32=missing.pt", "missing.pt: no such file"),
        ("./a/b", "no such folder"),
    ],
)
def test_missing_weights_are_named(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        OpenClip(source).encode_text(["x"])


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no open_clip_config\.json"):
        OpenClip(str(tmp_path)).encode_text(["x"])
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="weights cannot be read"):
        OpenClip(str(tmp_path)).encode_text(["x"])
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    )
    with pytest.raises(
        UserError, match=r"open_clip_pytorch_model\.bin: a Git LFS pointer.*run `git lfs pull`"
    ) as caught:
        OpenClip(str(tmp_path)).encode_text(["x"])
    assert "weights_only" not in str(caught.value)


class Counting:
    """An encoder that counts what it is given."""

    size = 16

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images = 0

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.images += len(pixels)
        return pixels.mean(dim=(2, 3)) + 2

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.texts += texts
        return torch.tensor([[float(len(text)), 1.0, 0.0] for text in texts])


def test_each_text_and_each_photo_is_encoded_once(tmp_path: Path) -> None:
    made: list[Counting] = []

    def load() -> Counting:
        made.append(Counting())
        return made[0]

    keeper = Embeddings(load, "counting")
    assert not made
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        photo(20, 30, number).save(paths[-1])
    first = keeper.references(paths[:2])
    keeper.references(paths)
    again = keeper.references([paths[1], paths[0], paths[1]])
    assert len(made) == 1 and made[0].images == 3
    assert torch.equal(again, first[[1, 0, 1]]) and torch.allclose(first.norm(dim=1), torch.ones(2))
    assert torch.equal(keeper.texts(["a", "bb", "a"])[0], keeper.texts(["bb", "a"])[1])
    assert made[0].texts == ["a", "bb"]


def test_a_photo_is_known_again_at_another_size_and_crop(tmp_path: Path) -> None:
    from pyunictokens.evaluate.baselines.real import RealImages
    from pyunictokens.evaluate.result import to_bytes
    from pyunictokens.evaluate.tasks import Subject

    paths = []
    rng = np.random.default_rng(0)
    for number, size in enumerate([(640, 900), (1201, 1000), (257, 999), (90, 61)]):
        rough = np.asarray(photo(*size, seed=number)).astype(int) + rng.integers(-40, 40, (size[1], size[0], 3))
        paths.append(tmp_path / f"{number}.jpg")
        Image.fromarray(rough.clip(0, 255).astype(np.uint8)).save(paths[-1])
    shown = to_bytes(RealImages(Subject("bo", "dog", references=paths)).generate("x", 4, 0)).float() / 127.5 - 1
    keeper = Embeddings(Counting(), "counting", size=224)
    assert torch.equal(keeper.same_image(shown, paths), torch.eye(4, dtype=torch.bool))


def test_a_photo_is_known_again_and_a_sample_of_it_is_not(tmp_path: Path) -> None:
    keeper = Embeddings(Counting(), "counting")
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        photo(80, 80, number).save(paths[-1])
    same = from_pil(photo(80, 80, 1))
    near = (same + 0.1 * torch.randn(same.shape, generator=torch.Generator().manual_seed(0)).abs()).clamp(-1, 1)
    assert keeper.same_image(torch.stack([same, near]), paths).tolist() == [[False, True, False], [False] * 3]
