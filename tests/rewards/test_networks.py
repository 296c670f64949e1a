"""ERNIE, BLIP-2 and DINOv2 on small random checkpoints, against the library's own processor and model, step by step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from pyunictokens.rewards import Ber, Der, RewardBatch, Tier
from pyunictokens.rewards.experts.ber import BerConfig, Blip2
from pyunictokens.rewards.experts.der import DerConfig, Dinov2, best_match
from pyunictokens.rewards.experts.tier import SentenceEncoder, TierConfig, tier_score
from pyunictokens.rewards.networks import ImageNetwork
from pyunictokens.utils.errors import UserError

from .checkpoints import SENTENCES, Folders, pil, save_blip2, save_dinov2

SIZES = [(28, 28), (37, 53), (64, 31), (29, 200), (512, 512), (9, 11)]


def pictures(count: int, high: int, wide: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, high, wide, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- preprocessing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("expert", ["ber", "der"])
def test_pixels_are_prepared_as_the_library_does_it(saved: Folders, expert: str, size: tuple[int, int]) -> None:
    folder = saved.blip2 if expert == "ber" else saved.dinov2
    net: ImageNetwork = Blip2(BerConfig(str(folder))) if expert == "ber" else Dinov2(DerConfig(str(folder)))
    pixels = pictures(3, *size)
    got = net.prepare(pixels)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="torchvision")
    want = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in pil(pixels)])
    assert got.shape == (3, 3, 28, 28) and got.dtype == torch.float32
    assert (got - want).abs().max() <= 2e-3
    # Pillow's resize rounds and clips between its two passes: now and then another of the 256 levels where colours run
    # smoothly (noise from black to white overshoots, and differs more), on average next to nothing
    smooth = F.interpolate(pictures(3, 5, 4) * 0.7, size, mode="bilinear")
    other = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    level = 1 / 255 / min(other.image_std)
    pillow = torch.cat([other(images=image, return_tensors="pt")["pixel_values"] for image in pil(smooth)])
    gap = (net.prepare(smooth) - pillow).abs()
    assert gap.max() <= 1.01 * level and gap.mean() <= 2e-3


def test_prepared_pixels_stay_where_they_are(saved: Folders) -> None:
    net = Dinov2(DerConfig(str(saved.dinov2)))
    net.load()
    assert net.prepare(pictures(2, 30, 40)).device == torch.device("cpu")
    with pytest.raises(UserError, match="pixels: values from"):
        net.encode_image(pictures(1, 30, 40) * 3)
    with pytest.raises(UserError, match=r"pixels: \(1, 4, 30, 40\): must be a tensor \[B, 3, H, W\]"):
        net.encode_image(torch.zeros(1, 4, 30, 40))
    with pytest.raises(UserError, match=r"pixels: \(1, 1, 30, 40\)"):
        net.encode_image(torch.zeros(1, 1, 30, 40))


# --- TIER: ERNIE ---------------------------------------------------------------------------------------------------


def test_sentences_are_those_of_the_library(saved: Folders) -> None:
    model = transformers.ErnieModel.from_pretrained(saved.ernie).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved.ernie)
    with torch.no_grad():  # one at a time: no padding, nothing of this package
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in SENTENCES]
    for batch in (1, 3, 32):
        mean = SentenceEncoder(TierConfig(str(saved.ernie), batch=batch)).encode_text(SENTENCES)
        torch.testing.assert_close(mean, torch.stack([state.mean(0) for state in states]), atol=1e-5, rtol=1e-5)
    cls = SentenceEncoder(TierConfig(str(saved.ernie), pooling="cls")).encode_text(SENTENCES)
    torch.testing.assert_close(cls, torch.stack([state[0] for state in states]), atol=1e-5, rtol=1e-5)
    assert (cls - mean).abs().max() > 0.1


def test_tier_over_ernie(saved: Folders) -> None:
    encoder = SentenceEncoder(TierConfig(str(saved.ernie)))
    facts, answers = SENTENCES[:3], [SENTENCES[1], "the toy is red", " "]
    batch = RewardBatch(pictures(3, 8, 8), ["p"] * 3, answers, facts, correct=1)
    score = Tier(encoder).score(batch)
    a, f = (F.normalize(encoder.encode_text(texts).double(), dim=1) for texts in (answers, facts))
    want = tier_score(a @ f.T, 1)
    torch.testing.assert_close(score[:2].double(), want[:2], atol=1e-6, rtol=1e-6)
    assert score[2] == 0


def test_long_texts_keep_their_beginning(saved: Folders) -> None:
    encoder = SentenceEncoder(TierConfig(str(saved.ernie)))
    long = "a red dog " * 40
    frame = 18 - 2  # positions of the checkpoint, without the two tokens around a text
    kept = " ".join(long.split()[:frame])
    torch.testing.assert_close(encoder.encode_text([long]), encoder.encode_text([kept]))
    short = SentenceEncoder(TierConfig(str(saved.ernie), max_tokens=4))
    torch.testing.assert_close(short.encode_text(["a red dog"]), short.encode_text(["a red"]))


def test_ernie_as_it_is_published(saved: Folders, tmp_path: Path) -> None:
    """A fill-mask checkpoint in one .bin file: keys under `ernie.`, a head that is not used, no pooling head."""
    shutil.copytree(saved.ernie, tmp_path, dirs_exist_ok=True)
    weights = load_file(saved.ernie / "model.safetensors")
    published = {f"ernie.{key}": value for key, value in weights.items() if not key.startswith("pooler.")}
    published["cls.predictions.bias"] = torch.zeros(24)
    torch.save(published, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    mine, whole = (SentenceEncoder(TierConfig(str(folder))) for folder in (tmp_path, saved.ernie))
    assert torch.equal(mine.encode_text(SENTENCES), whole.encode_text(SENTENCES))


def test_another_sentence_encoder(tmp_path: Path) -> None:
    from .checkpoints import WORDS, write_vocabulary

    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    write_vocabulary(tmp_path)
    rows = SentenceEncoder(TierConfig(str(tmp_path))).encode_text(SENTENCES)
    assert rows.shape == (4, 16) and rows.isfinite().all()


# --- BER: BLIP-2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_token", [True, False], ids=["image_token", "plain"])
def test_both_heads_are_those_of_the_library(tmp_path: Path, image_token: bool) -> None:
    folder = save_blip2(tmp_path, image_token)
    model = transformers.Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    pixels = pictures(4, 37, 53)
    inputs = processor(images=pil(pixels), text=SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        table = model(**inputs).logits_per_image  # [4 pictures, 4 texts]
        matched = model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(-1)[:, 1]
        parts = model(**inputs)
    for batch in (1, 3, 32):
        net = Blip2(BerConfig(str(folder), batch=batch))
        torch.testing.assert_close(net.encode_image(pixels), parts.image_embeds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.encode_text(SENTENCES), parts.text_embeds, atol=1e-5, rtol=1e-5)
        ber = Ber(net)
        mine = torch.stack([ber.similarity(pixels, [text] * 4) for text in SENTENCES], dim=1)
        torch.testing.assert_close(mine, table, atol=1e-5, rtol=1e-5)
        pairs = Ber(net, head="matching").similarity(pixels, SENTENCES)
        torch.testing.assert_close(pairs, matched, atol=1e-5, rtol=1e-5)
    assert table.std() > 0.02 and matched.std() > 0.01  # the numbers above are not all alike


def test_previews_and_drawings_are_scored_alike(saved: Folders) -> None:
    ber = Ber(Blip2(BerConfig(str(saved.blip2))))
    pixels = pictures(3, 40, 40)
    prompts = SENTENCES[:2]
    scorer = ber.preview_scorer(prompts)
    got = scorer(pixels * 1.02, torch.tensor([1, 0, 1]))  # a decoder overshoots a little
    want = ber.score(RewardBatch((pixels * 1.02).clamp(-1, 1), [prompts[1], prompts[0], prompts[1]]))
    torch.testing.assert_close(got, want)


def test_half_precision_stays_near(saved: Folders) -> None:
    pixels = pictures(2, 33, 47)
    full, half = (Ber(Blip2(BerConfig(str(saved.blip2), dtype=d))) for d in ("float32", "bfloat16"))
    a, b = (ber.similarity(pixels, SENTENCES[:2]) for ber in (full, half))
    assert b.dtype == torch.float32 and (a - b).abs().max() < 0.03
    dino = Dinov2(DerConfig(str(saved.dinov2), dtype="bfloat16"))
    patches = dino.encode_patches(pixels)
    assert patches.dtype == torch.float32
    assert dino.load()[0].dtype == torch.bfloat16


def test_a_matching_head_needs_a_network_that_has_one() -> None:
    from .fakes import HandText, MeanColour

    with pytest.raises(UserError, match="a MeanColour has no match"):
        Ber(MeanColour(), head="matching")
    with pytest.raises(UserError, match="a HandText has no encode_text or no encode_image"):
        Ber(HandText({}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="head='both'"):
        Ber(MeanColour(), head="both")


# --- DER: DINOv2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 3])
def test_patches_are_those_of_the_library(tmp_path: Path, registers: int) -> None:
    folder = save_dinov2(tmp_path, registers)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="torchvision")
    pixels = pictures(3, 41, 66)
    with torch.no_grad():
        states = model(**processor(images=pil(pixels), return_tensors="pt")).last_hidden_state
    patches = states[:, 1 + registers :]
    assert patches.shape[1] == 16  # 28 pixels in patches of 7
    for batch in (2, 32):
        net = Dinov2(DerConfig(str(folder), batch=batch))
        torch.testing.assert_close(net.encode_patches(pixels), patches, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.encode_image(pixels), patches.mean(1), atol=1e-5, rtol=1e-5)


def test_der_over_dinov2(saved: Folders) -> None:
    net = Dinov2(DerConfig(str(saved.dinov2)))
    drawn, photos = pictures(2, 30, 30, 1), pictures(3, 50, 41, 2)
    batch = RewardBatch(drawn, ["p"] * 2, references=photos)
    a, b = net.encode_patches(drawn).double(), net.encode_patches(photos).double()
    mean = F.cosine_similarity(a.mean(1)[:, None], b.mean(1)[None], dim=-1).mean(1)
    torch.testing.assert_close(Der(net).score(batch).double(), mean, atol=1e-6, rtol=1e-6)
    best = []
    for one in a:  # by loops over patches, as the docstring says it
        found = []
        for other in b:
            table = torch.stack([F.cosine_similarity(p[None], other, dim=-1) for p in one])
            found.append((table.max(1).values.mean() + table.max(0).values.mean()) / 2)
        best.append(torch.stack(found).mean())
    got = Der(net, match="best").score(batch).double()
    torch.testing.assert_close(got, torch.stack(best), atol=1e-6, rtol=1e-6)
    assert (got - mean).abs().max() > 1e-3


def test_best_match_by_hand() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    b = torch.tensor([[[3.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    # first photo: a's patches match 1 and 0, its own match 1 and 1; second: the same patches elsewhere
    torch.testing.assert_close(best_match(a, b), torch.tensor([[(0.5 + 1.0) / 2, 1.0]]))
    torch.testing.assert_close(best_match(b, a), best_match(a, b).T)


def test_der_needs_a_network_that_has_patches() -> None:
    from .fakes import MeanColour

    with pytest.raises(UserError, match="a MeanColour has no encode_patches"):
        Der(MeanColour(), match="best")
    with pytest.raises(UserError, match="match='all'"):
        Der(MeanColour(), match="all")

    class Wrong:
        def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.flatten(1)

    with pytest.raises(UserError, match=r"encode_patches returned \(1, 192\) for 1 inputs"):
        Der(Wrong(), match="best").score(
            RewardBatch(torch.zeros(1, 3, 8, 8), ["p"], references=torch.zeros(1, 3, 8, 8))
        )


# --- what all share ------------------------------------------------------------------------------------------------


def test_networks_are_read_late_and_frozen(saved: Folders) -> None:
    net = Dinov2(DerConfig(str(saved.dinov2)))
    assert not net.loaded
    pixels = pictures(1, 28, 28).requires_grad_()
    assert not net.encode_image(pixels).requires_grad
    assert net.loaded and not net.load()[0].training
    assert all(not weight.requires_grad for weight in net.load()[0].parameters())
    weights = sum(p.numel() for p in net.load()[0].parameters())
    assert net.bytes == 4 * weights


def test_references_facts_and_prompts_are_computed_once(saved: Folders) -> None:
    """Rows that go through each network over three steps of a group of 5, counted at the network itself."""
    from pyunictokens.rewards.load import load_rewards

    ensemble = load_rewards({"experts": saved.settings("tier", "ber", "der")})
    seen: dict[str, int] = {}

    def count(name: str, module: torch.nn.Module) -> None:
        def hook(_: object, args: tuple, kwargs: dict, __: object) -> None:
            rows = next(iter(kwargs.values())) if kwargs else args[0]
            seen[name] = seen.get(name, 0) + len(rows)

        module.register_forward_hook(hook, with_kwargs=True)

    for name, expert in ensemble.experts.items():
        net = expert._encoder.load()[0]  # type: ignore[attr-defined]
        if name == "ber":
            count("ber pictures", net.vision_model)
            count("ber texts", net.embeddings)
        else:
            count(name, net)
    photos = pictures(4, 30, 30, 9)
    for step in range(3):
        drawn, answers = pictures(5, 32, 32, step), [f"its toy {'red ' * n}{'blue ' * step}" for n in range(5)]
        ensemble.score(RewardBatch(drawn, SENTENCES[:1] * 5, answers, SENTENCES, 1, photos.clone(), "object"))
    assert seen["der"] == 3 * 5 + 4  # drawings, and the photos once
    assert seen["ber pictures"] == 3 * 5 and seen["ber texts"] == 1  # one prompt
    assert seen["tier"] == 3 * 5 + 4  # answers, all different, and the facts once
