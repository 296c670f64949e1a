"""Pictures of other things in order of likeness: bands, negatives, the concept's own photos, the page, the command."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.evaluate.clip import Embeddings
from pyunictokens.evaluate.report.retrieval_page import write_page
from pyunictokens.evaluate.retrieval import Picture, Ranking, RetrievalSettings, dealt, pictures_in, rank
from pyunictokens.utils.errors import UserError


class Colours:
    """A tiny CLIP: a picture's embedding is its mean colour, so that likeness can be worked out by hand."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3)) + 1.0

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        raise AssertionError("no text is asked for")


def picture(path: Path, colour: Sequence[int], seed: int) -> Path:
    """A picture of one mean colour with a pattern of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-40, 41, (8, 8, 3))
    levels = np.clip(np.array(colour) + np.kron(noise, np.ones((4, 4, 1))), 0, 255).astype(np.uint8)
    Image.fromarray(levels).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return [picture(tmp_path / "mine" / f"{i}.png", (200, 60, 60), i) for i in range(2)]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Ten pictures from red to blue, five of them in a folder inside."""
    for i in range(10):
        folder = tmp_path / "pool" / ("inner" if i % 2 else "")
        picture(folder / f"{i}.png", (200 - 15 * i, 60, 60 + 15 * i), 100 + i)
    return tmp_path / "pool"


def embeddings() -> Embeddings:
    return Embeddings(Colours(), "colours", 32)


def test_the_order_is_that_of_the_mean_cosine(photos: list[Path], pool: Path) -> None:
    found = rank(embeddings(), "bo", photos, [pool], RetrievalSettings(6, 3, 2, 2))

    def vector(path: Path) -> np.ndarray:
        mean = np.asarray(Image.open(path), dtype=np.float64).mean((0, 1)) / 127.5
        return mean / np.linalg.norm(mean)

    files, _ = pictures_in([pool])
    wanted = {path: np.mean([vector(path) @ vector(photo) for photo in photos]) for path in files}
    assert [each.path for each in found.pictures] == sorted(files, key=lambda path: -wanted[path])
    for each in found.pictures:
        assert each.similarity == pytest.approx(wanted[each.path], abs=1e-6)
    assert [each.band for each in found.pictures] == [3, 3, 2, 2, 1, 1, 0, 0, 0, 0]
    assert [each.negative for each in found.pictures[:2]] == ["hard", "hard"]
    assert sum(each.negative == "easy" and not each.band for each in found.pictures) == 2


@given(st.integers(0, 90), st.integers(1, 20), st.integers(0, 70), st.integers(0, 30), st.integers(0, 30))
def test_bands_are_the_published_division(count: int, bands: int, positives: int, hard: int, easy: int) -> None:
    """Ascending likeness, equal parts, the remainder in the first ones; band b is the b-th part."""
    ranked = [Picture(Path(str(i)), 1 - i / 100, 1 - i / 100) for i in range(count)]
    made = dealt(ranked, RetrievalSettings(positives, bands, hard, easy))
    rising = [place for place in range(min(positives, count))][::-1]
    size, rest = divmod(len(rising), bands)
    parts, start = [], 0
    for part in range(bands):
        end = start + size + (1 if part < rest else 0)
        parts.append(rising[start:end])
        start = end
    for number, part in enumerate(parts, start=1):
        assert {place for place, each in enumerate(made) if each.band == number} == set(part)
    assert [each.negative == "hard" for each in made] == [place < hard for place in range(count)]
    assert sum(each.negative == "easy" for each in made) <= easy


def test_photos_of_the_concept_are_refused_or_left_out(photos: list[Path], pool: Path, tmp_path: Path) -> None:
    with Image.open(photos[0]) as image:
        image.resize((64, 64), Image.Resampling.BICUBIC).save(pool / "again.jpg", quality=95)
        ImageOps.mirror(image).save(pool / "mirrored.png")
    test = picture(tmp_path / "test" / "7.png", (200, 60, 60), 50)
    (pool / "test_half.png").write_bytes(test.read_bytes())
    with pytest.raises(UserError, match=r"3 of the pictures are photos of <bo> itself") as error:
        rank(embeddings(), "bo", photos, [pool], own=[test])
    for name, shown in (("again.jpg", "0.png"), ("mirrored.png", "0.png"), ("test_half.png", "7.png")):
        assert f"{pool / name} shows {shown}" in str(error.value)
    found = rank(embeddings(), "bo", photos, [pool], RetrievalSettings(own="leave-out"), own=[test])
    assert len(found.pictures) == 10
    assert ("is the photo 7.png of <bo> itself") in dict(found.left_out)[str(pool / "test_half.png")]


def test_nearly_the_concept_is_doubtful_and_stays(photos: list[Path], pool: Path) -> None:
    picture(pool / "other_day.png", (200, 60, 60), 77)
    found = rank(embeddings(), "bo", photos, [pool], RetrievalSettings(alike=0.999))
    assert "other_day.png" in {each.path.name for each in found.doubtful}
    assert found.doubtful[0].nearest >= 0.999 > found.pictures[-1].nearest
    assert found.pictures[-1] not in found.doubtful


def test_what_cannot_be_used_is_named(photos: list[Path], pool: Path) -> None:
    (pool / "copy.png").write_bytes((pool / "2.png").read_bytes())
    damaged = (pool / "4.png").read_bytes()
    (pool / "bad.png").write_bytes(damaged[: len(damaged) // 2])
    found = rank(embeddings(), "bo", photos, [pool])
    reasons = dict(found.left_out)
    assert reasons[str(pool / "copy.png")] == "shows the same as 2.png"
    assert "damaged or cut off" in reasons[str(pool / "bad.png")]
    assert len(found.pictures) == 10
    with pytest.raises(UserError, match="no such file or folder"):
        rank(embeddings(), "bo", photos, [pool / "absent"])
    with pytest.raises(UserError, match="has no photos"):
        rank(embeddings(), "bo", [], [pool])
    for wrong in ({"bands": 0}, {"hard": -1}, {"alike": 1.5}, {"own": "maybe"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            RetrievalSettings(**wrong)  # type: ignore[arg-type]


def test_the_ranking_is_read_as_it_was_written(
    photos: list[Path], pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = rank(embeddings(), "bo", photos, ["pool"], RetrievalSettings(6, 3, 2, 2))
    found.save(Path("out/ranked.json"))
    monkeypatch.chdir("/")
    again = Ranking.load(tmp_path / "out")
    pairs = list(zip(again.pictures, found.pictures, strict=True))
    assert all(a.path.samefile(tmp_path / b.path) and (a.band, a.negative) == (b.band, b.negative) for a, b in pairs)
    assert all(a.similarity == pytest.approx(b.similarity, abs=1e-6) for a, b in pairs)
    assert str(tmp_path) not in (tmp_path / "out" / "ranked.json").read_text()
    (tmp_path / found.pictures[0].path).unlink()
    with pytest.raises(UserError, match="names 1 pictures that are not there"):
        Ranking.load(tmp_path / "out")
    (tmp_path / "out" / "ranked.json").write_text('{"concept": "bo"}')
    with pytest.raises(UserError, match="is no ranking of `data negatives`"):
        Ranking.load(tmp_path / "out")


def test_the_page_shows_them_in_order(photos: list[Path], pool: Path, tmp_path: Path) -> None:
    (pool / "<b>odd & name.png").write_bytes(picture(pool / "x.png", (90, 90, 90), 9).read_bytes())
    (pool / "x.png").unlink()
    found = rank(embeddings(), "bo", photos, [pool], RetrievalSettings(9, 3, 2, 2))
    write_page(found, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[-5:] == ["Hard negatives", *(f"Soft positives, band {n}" for n in (3, 2, 1)), "Easy negatives"]
    bands = text[text.index("Soft positives, band 3") : text.index("Easy negatives")]
    shown = re.findall(r"<b>([\d.]+)</b> ", bands)
    assert len(shown) == 9 and shown == sorted(shown, reverse=True)
    assert "<b>odd" not in text and "&lt;b&gt;odd" in text and "http" not in text


def test_the_command(tmp_path: Path) -> None:
    from pyunictokens.toy.concept import write_toy_concept

    data, out = tmp_path / "data", tmp_path / "ranked"
    write_toy_concept(data, seed=5, kind="animal", name="bo")
    words = ["data", "negatives", data, "bo", data / "random_images", "--clip", "toy", "--out", out]
    done = CliRunner().invoke(app, [*map(str, words), "--positives", "6", "--bands", "3", "--hard", "2", "--easy", "2"])
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "ranked.json").read_text())
    assert rows["clip"] == "toy" and [row["band"] for row in rows["pictures"]][:6] == [3, 3, 2, 2, 1, 1]
    assert "6 soft positives in 3 bands, 2 hard and 2 easy negatives" in done.output
    assert (out / "index.html").stat().st_size > 10_000
    done = CliRunner().invoke(app, [*map(str, words), str(data / "concept" / "train" / "bo")])
    assert done.exit_code == 2 and "10 of the pictures are photos of <bo> itself" in done.output
    few = CliRunner().invoke(app, [*map(str, words), "--bands", "200"])
    assert few.exit_code == 0 and "bands are empty" in few.output


def test_the_same_ranking_every_time(photos: list[Path], pool: Path) -> None:
    settings = RetrievalSettings(2, 2, 2, 3, seed=4)
    first, second = (rank(embeddings(), "bo", photos, [pool], settings) for _ in range(2))
    assert first.pictures == second.pictures
    other = rank(embeddings(), "bo", photos, [pool], RetrievalSettings(2, 2, 2, 3, seed=5))
    assert [p.negative for p in other.pictures] != [p.negative for p in first.pictures]
