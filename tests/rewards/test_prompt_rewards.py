"""Built-in rewards for prompt lists: numbers worked out with the networks' own libraries, and what they refuse."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyunictokens.data.images import load_pixels, save_image
from pyunictokens.rewards import RewardBatch, as_rewards
from pyunictokens.rewards.experts.clip import Aesthetic, AestheticConfig, ClipConfig, ClipScore, HpsConfig, HpsV2
from pyunictokens.rewards.experts.der import DerConfig
from pyunictokens.rewards.experts.likeness import Likeness
from pyunictokens.rewards.experts.objects import Found, Objects, ObjectsConfig, check, colour_of, lies
from pyunictokens.rewards.experts.ocr import Ocr, edits, likeness
from pyunictokens.rewards.experts.pickscore import PickConfig, PickScore
from pyunictokens.rewards.experts.plain import COLOURS, Colour, JpegSize
from pyunictokens.rewards.load import load_rewards
from pyunictokens.rewards.names import named, short_name
from pyunictokens.rewards.networks import resized_and_cropped
from pyunictokens.utils.errors import MissingExtra, UserError

from .checkpoints import pil, save_dinov2, write_vocabulary

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 7},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def batch(rows: int = 4, **columns: Any) -> RewardBatch:
    coarse = torch.rand(rows, 3, 6, 5, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8
    pixels = F.interpolate(coarse, (37, 53), mode="bilinear")
    return RewardBatch(pixels, ["a red dog", "snow", "a red dog", "the beach"][:rows], columns=columns)


# --- over open_clip --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of open_clip small enough for a test, its checkpoint as HPSv2 is published, and a linear head."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch comes with the extra `rewards`")
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-for-rewards.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "tiny-for-rewards.json")
    torch.manual_seed(0)
    net = open_clip.create_model("tiny-for-rewards")
    torch.save({"state_dict": net.state_dict()}, folder / "hps.pt")
    head = torch.nn.Linear(16, 1)
    torch.save(head.state_dict(), folder / "head.pth")
    return {"model": "tiny-for-rewards", "path": str(folder / "hps.pt"), "head": str(folder / "head.pth")}


@pytest.mark.parametrize("size", [(28, 28), (37, 53), (61, 30), (512, 400)], ids=str)
def test_pixels_are_prepared_as_open_clip_does_it(size: tuple[int, int]) -> None:
    open_clip = pytest.importorskip("open_clip")
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    coarse = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.7
    pixels = F.interpolate(coarse, size, mode="bilinear")
    own = open_clip.image_transform(28, is_train=False, mean=mean, std=std)
    want = torch.stack([own(image) for image in pil(pixels)])
    gap = (resized_and_cropped(pixels, 28, mean, std) - want).abs()
    assert gap.mean() <= 2e-3 and gap.max() <= 2.01 / 255 / min(std)  # Pillow rounds twice, on the way too


def test_scores_are_those_of_open_clip(tiny: dict[str, str]) -> None:
    import open_clip

    shared = {"path": tiny["path"], "model": tiny["model"]}
    settings = {"clip": shared, "hpsv2": shared, "aesthetic": {**shared, "head": tiny["head"]}}
    weights = {"clip": 0.5, "hpsv2": 0.25, "aesthetic": 0.25}
    group = batch()
    score = load_rewards({"models": settings, "weights": weights, "batch": 3}).score(group)
    net: Any = open_clip.create_model(tiny["model"]).eval()
    net.load_state_dict(torch.load(tiny["path"], weights_only=True)["state_dict"])
    ready = resized_and_cropped(group.images, 28, net.visual.image_mean, net.visual.image_std)
    with torch.no_grad():
        images = F.normalize(net.encode_image(ready), dim=-1)
        texts = F.normalize(net.encode_text(open_clip.get_tokenizer(tiny["model"])(list(group.prompts))), dim=-1)
        head = torch.nn.Linear(16, 1)
        head.load_state_dict(torch.load(tiny["head"], weights_only=True))
        for name in ("clip", "hpsv2"):
            torch.testing.assert_close(score.parts[name], (images * texts).sum(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(score.parts["aesthetic"], head(images)[:, 0] / 10, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score.total, sum(weights[name] * score.parts[name] for name in weights))
    assert score.parts["clip"].std() > 1e-3


def test_prompts_are_read_once(tiny: dict[str, str]) -> None:
    model = HpsV2.from_settings(HpsConfig(tiny["path"], model=tiny["model"]), "cpu")
    model.score(batch(1))
    seen: list[int] = []
    net: Any = model._encoder.load()[0]
    net.transformer.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    for _ in range(3):
        model.score(batch())
    assert seen == [2]


def test_what_is_no_clip_is_refused(tiny: dict[str, str], tmp_path: Path) -> None:
    torch.save({"state_dict": {"visual.proj": torch.zeros(3, 3)}}, tmp_path / "other.pt")
    for settings, said in [
        (ClipConfig(str(tmp_path / "other.pt"), model=tiny["model"]), r"other\.pt: no checkpoint of tiny-for-rewards"),
        (ClipConfig(tiny["path"], model="ViT-nothing"), "open_clip knows no such architecture"),
    ]:
        with pytest.raises(UserError, match=said):
            ClipScore.from_settings(settings, "cpu").score(batch())
    with pytest.raises(UserError, match=r"none\.pt: no such file"):
        ClipScore.from_settings(ClipConfig(str(tmp_path / "none.pt")), "cpu")
    torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"head\.pth: no linear head"):
        Aesthetic.from_settings(
            AestheticConfig(tiny["path"], model=tiny["model"], head=str(tmp_path / "head.pth")), "cpu"
        )
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"junk\.pt: cannot be read as weights"):
        ClipScore.from_settings(ClipConfig(str(tmp_path / "junk.pt"), model=tiny["model"]), "cpu").score(batch())


# --- over transformers -----------------------------------------------------------------------------------------------


def save_pick(folder: Path) -> Path:
    """A small CLIPModel with a tokenizer and its image processor, in PickScore's layout."""
    from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(8)
    write_vocabulary(folder)
    text = CLIPTextConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=12, projection_dim=16, eos_token_id=3, bos_token_id=2, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=7,
        projection_dim=16, initializer_range=0.3,
    )  # fmt: skip
    net = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    net.save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_pickscore_is_the_published_formula(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    folder = save_pick(tmp_path / "pick")
    model = PickScore.from_settings(PickConfig(str(folder)), "cpu")
    group = batch()
    found = model.score(group)
    net: Any = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(list(group.prompts), padding=True, return_tensors="pt")
    ready = model._encoder.prepare(group.images)
    with torch.no_grad():
        both = net(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=ready
        ).logits_per_image.diagonal()
    torch.testing.assert_close(found, both / 26, atol=1e-5, rtol=1e-5)
    assert found.std() > 1e-4


def test_likeness_is_der_against_the_image_of_each_prompt(tmp_path: Path) -> None:
    folder = save_dinov2(tmp_path / "dino")
    files = []
    for number in range(2):
        files.append(str(tmp_path / f"{number}.png"))
        save_image(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(number)) * 2 - 1, files[-1])
    model = Likeness.from_settings(DerConfig(str(folder)), "cpu")
    group = batch(reference_image=[files[0], files[1], files[1], files[0]])
    network: Any = model._der._encoder
    own = network.encode_image(group.images)
    true = network.encode_image(torch.stack([load_pixels(file, 53) for file in files]))
    want = F.cosine_similarity(own, true[[0, 1, 1, 0]], dim=-1)
    torch.testing.assert_close(model.score(group), want, atol=1e-5, rtol=1e-5)
    itself = RewardBatch(load_pixels(files[0], 53)[None], ["x"], columns={"reference_image": [files[0]]})
    assert model.score(itself).item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="prompt 'snow' has no reference_image"):
        model.score(batch(reference_image=[files[0], None, None, files[0]]))


# --- without a network -----------------------------------------------------------------------------------------------


def test_jpeg_size_is_that_of_the_file() -> None:
    group = batch()
    want = []
    for image in pil(group.images):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        want.append(len(file.getvalue()) / (37 * 53 * 3))
    torch.testing.assert_close(JpegSize("large", 80).score(group), torch.tensor(want))
    torch.testing.assert_close(JpegSize(quality=80).score(group), 1 - torch.tensor(want))
    flat = RewardBatch(torch.zeros(1, 3, 37, 53), ["x"])
    assert JpegSize().score(flat) > JpegSize().score(group).max()
    for wrong in ({"aim": "tiny"}, {"quality": 0}, {"quality": True}):
        with pytest.raises(UserError, match="must be"):
            JpegSize(**wrong)  # type: ignore[arg-type]


def test_colour_is_nearness_in_rgb() -> None:
    def plain(name: str) -> Tensor:
        return (torch.tensor(COLOURS[name]) / 127.5 - 1)[:, None, None].expand(3, 5, 7)

    images = torch.stack([plain("red"), plain("blue"), plain("black")])
    scores = Colour("red").score(RewardBatch(images, ["a", "b", "c"]))
    assert scores.tolist() == pytest.approx([1, 1 - 2**0.5 / 3**0.5, 1 - 1 / 3**0.5], abs=1e-5)
    by_column = Colour("red").score(RewardBatch(images, ["a", "b", "c"], columns={"colour": ["red", "blue", None]}))
    assert by_column.tolist() == pytest.approx([1, 1, 1 - 1 / 3**0.5], abs=1e-5)
    with pytest.raises(UserError, match="prompt 'b': colour='beige': must be one of red"):
        Colour().score(RewardBatch(images, ["a", "b", "c"], columns={"colour": ["red", "beige", None]}))


# --- written text ----------------------------------------------------------------------------------------------------


def test_edits_are_levenshteins() -> None:
    assert [edits(a, b) for a, b in (("", ""), ("abc", ""), ("kitten", "sitting"), ("flaw", "lawn"))] == [0, 3, 3, 2]
    assert likeness("Hello, WORLD!", "hello world") == 1 and likeness("", "abc") == 0
    assert likeness("helo", "hello") == pytest.approx(0.8) and likeness("x" * 30, "abc") == 0


def test_ocr_reads_each_image_once_and_large_enough() -> None:
    seen: list[tuple[int, ...]] = []

    def reader(image: np.ndarray) -> str:
        seen.append(image.shape)
        assert image.dtype == np.uint8
        return "STOP"

    group = batch(text=["stop", "go", "sto p", "Stop!"])
    assert Ocr(reader, least=100).score(group).tolist() == pytest.approx([1, 0, 1, 1])
    assert seen == [(111, 159, 3)] * 4
    with pytest.raises(UserError, match=r"prompt 'snow': text=None: must be a text"):
        Ocr(reader).score(batch(text=["a", None, "b", "c"]))
    with pytest.raises(UserError, match="no column text"):
        Ocr(reader).score(batch())


def test_ocr_reads_rendered_text() -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="comes with the extra `ocr`")
    from PIL import Image, ImageDraw, ImageFont

    texts = ["OPEN", "Coffee", "HELLO 42"]
    pixels = []
    for text in texts:
        image = Image.new("RGB", (256, 96), (245, 240, 230))
        ImageDraw.Draw(image).text((20, 20), text, fill=(20, 30, 80), font=ImageFont.load_default(48))
        pixels.append(torch.tensor(np.asarray(image)).permute(2, 0, 1).float() / 127.5 - 1)
    images = torch.stack(pixels)
    right = Ocr().score(RewardBatch(images, texts, columns={"text": texts}))
    wrong = Ocr().score(RewardBatch(images, texts, columns={"text": ["Bakery", "Garage", "Museum"]}))
    assert right.min() >= 0.8 and wrong.max() <= 0.5


# --- objects ---------------------------------------------------------------------------------------------------------


def found(label: str, left: float, top: float, size: float = 10, **more: Any) -> Found:
    return Found(label, 0.9, (left, top, left + size, top + size), **more)


def test_checks_are_those_of_geneval() -> None:
    pixels = torch.zeros(3, 64, 64)
    pixels[0, 20:40, 5:25] = 1  # a red patch
    red_ball, dog, ball = found("ball", 5, 20, 20), found("dog", 40, 20, 20), found("ball", 40, 45)
    seen = [red_ball, dog]
    assert check([{"class": "ball", "colour": "red", "position": ["left of", 1]}, {"class": "dog"}], seen, pixels) == [
        True, True, True, True,
    ]  # fmt: skip
    assert check([{"class": "ball", "count": 1}], [*seen, ball], pixels) == [True, False]
    assert check([{"class": "ball", "count": 2, "colour": "red"}], [*seen, ball], pixels) == [True, True, False]
    assert check([{"class": "cat"}], seen, pixels) == [False]
    assert check([{"class": "dog", "position": ["left of", 1]}, {"class": "ball"}], seen, pixels)[-1] is False
    own = [found("cat", 0, 0, colour="blue", pattern="striped")]
    assert check([{"class": "cat", "colour": "blue", "pattern": "striped"}], own, pixels) == [True, True]
    assert check([{"class": "cat", "colour": "blue", "pattern": "plain"}], own, pixels) == [True, False]


def test_positions_and_colours() -> None:
    a, b = (0.0, 0.0, 10.0, 10.0), (20.0, 2.0, 30.0, 12.0)
    assert lies(a, "left of", b) and lies(b, "right of", a) and not lies(a, "right of", b)
    assert lies(a, "above", (0, 30, 10, 40)) and lies((0, 30, 10, 40), "below", a)
    assert lies(a, "on", (1, 11, 12, 22)) and not lies(a, "on", (1, 30, 12, 42)) and not lies(a, "on", b)
    pixels = torch.zeros(3, 20, 20)
    for name, rgb in COLOURS.items():
        pixels[:, 5:15, 5:15] = torch.tensor(rgb)[:, None, None] / 255
        assert colour_of((3, 3, 17, 17), pixels) == name


def test_scores_are_shares_or_all_or_nothing() -> None:
    def detector(pixels: Tensor) -> list[list[Found]]:
        assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1
        return [[found("dog", 1, 1), found("dog", 20, 1)] for _ in pixels]

    objects = [[{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}], [{"class": "cat"}], [{"class": "dog"}]]
    assert Objects(detector).score(batch(objects=objects)).tolist() == [1, 0.5, 0, 1]
    assert Objects(detector, strict=True).score(batch(objects=objects)).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "must be a list of objects"),
        ([{"count": 2}], "must be a table with the key class"),
        ([{"class": "dog", "color": "red"}], "color: must be class, count"),
        ([{"class": "dog", "count": 0}], "count=0: must be a whole number"),
        ([{"class": "dog", "colour": "beige"}], "colour='beige': must be one of red"),
        ([{"class": "dog", "position": ["near", 0]}], "must be one of left of"),
        ([{"class": "dog", "position": ["on", 1]}], "and a number of the list"),
    ],
)
def test_objects_that_cannot_be_read_are_named_with_the_prompt(value: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"prompt 'snow': objects.*{said}"):
        Objects(lambda pixels: [[] for _ in pixels]).score(batch(2, objects=[[{"class": "dog"}], value]))


def test_any_detector_of_torchvision(tmp_path: Path) -> None:
    """Boxes, labels and scores are those of the detector itself, in the image's own pixels."""
    from torchvision import models

    torch.manual_seed(3)
    net = models.get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4).eval()
    torch.save(net.state_dict(), tmp_path / "ssd.pt")
    (tmp_path / "classes.txt").write_text("background\ndog\ncat\nball\n")
    settings = ObjectsConfig(
        str(tmp_path / "ssd.pt"), "ssdlite320_mobilenet_v3_large", str(tmp_path / "classes.txt"), score=0.01, least=74
    )
    model = Objects.from_settings(settings, "cpu")
    pixels = (batch(2).images + 1) / 2
    seen = model._detector(pixels)
    large = F.interpolate(pixels, (74, 106), mode="bilinear", align_corners=False)
    with torch.no_grad():
        want = net(list(large))
    names = ["background", "dog", "cat", "ball"]
    for mine, true in zip(seen, want, strict=True):
        keep = true["scores"] >= 0.01
        assert len(mine) == int(keep.sum()) > 0
        assert [f.label for f in mine] == [names[label] for label in true["labels"][keep].tolist()]
        torch.testing.assert_close(torch.tensor([f.box for f in mine]), true["boxes"][keep] / 2)
    assert model.score(batch(2, objects=[[{"class": "dog"}], [{"class": "cat"}]])).shape == (2,)
    with pytest.raises(UserError, match="torchvision has no such detector"):
        Objects.from_settings(ObjectsConfig(str(tmp_path / "ssd.pt"), "nothing"), "cpu").score(
            batch(1, objects=[[{"class": "dog"}]])
        )
    with pytest.raises(UserError, match="no checkpoint of fasterrcnn_mobilenet"):
        Objects.from_settings(
            ObjectsConfig(str(tmp_path / "ssd.pt"), "fasterrcnn_mobilenet_v3_large_fpn", str(tmp_path / "classes.txt")),
            "cpu",
        ).score(batch(1, objects=[[{"class": "dog"}]]))


# --- by name ---------------------------------------------------------------------------------------------------------


def test_rewards_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = batch()
    both = as_rewards(["jpeg_size", "colour"], [1, 0.5])
    score = both.score(group)
    assert score.parts.keys() == {"jpeg_size", "colour"}
    torch.testing.assert_close(score.total, JpegSize().score(group) + 0.5 * Colour().score(group))
    assert short_name("hpsv2=weights/x.pt") == "hpsv2" and short_name("my.mod:Flat") == "flat"
    folder = save_dinov2(tmp_path / "weights" / "dinov2-base")
    monkeypatch.chdir(tmp_path)
    assert isinstance(named("dino"), Likeness), "found where the examples keep it"
    assert isinstance(named(f"dinov2={folder}"), Likeness)
    for word, said in [
        ("jpeg", "'jpeg': must be MODULE:FUNCTION of your own, NAME or NAME=WEIGHTS; names are tier"),
        ("jpeg_size=x", "jpeg_size takes no weights"),
        ("objects", "say where its file is: objects=FILE"),
        ("hpsv2=none.pt", r"none\.pt: no such file"),
        ("no.such:thing", "No module named"),
    ]:
        with pytest.raises(UserError, match=said):
            named(word)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rapidocr_onnxruntime", None)
    with pytest.raises(MissingExtra, match="ocr"):
        Ocr().score(batch(text=["a", "b", "c", "d"]))
