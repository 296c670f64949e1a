"""Pictures as cameras and strangers write them: values against arithmetic done here, damage against clear errors."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pyunictokens.data import black_image, load_batch, load_pixels, make_grid, read_image, save_image
from pyunictokens.data.images import PIXEL_LIMIT, fit_within, from_pil, to_pil
from pyunictokens.utils.errors import UserError

RED, BLUE = (200, 30, 10), (20, 40, 220)


def in_range(colour) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.float64).div(127.5).sub(1).float()


def halves(left=RED, right=BLUE, size=(32, 32)) -> Image.Image:
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def check_halves(pixels: torch.Tensor, left=RED, right=BLUE, tolerance: float = 0.0) -> None:
    size = pixels.shape[-1]
    torch.testing.assert_close(pixels[:, size // 2, 2], in_range(left), atol=tolerance + 1e-6, rtol=0)
    torch.testing.assert_close(pixels[:, size // 2, -3], in_range(right), atol=tolerance + 1e-6, rtol=0)


def test_values_of_an_untouched_picture(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    pixels = load_pixels(tmp_path / "a.png", 16)
    expected = torch.from_numpy(levels.astype(np.float64)).permute(2, 0, 1) / 127.5 - 1
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    torch.testing.assert_close(pixels.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "height"), [(31, 17), (17, 31), (64, 33), (100, 20)])
def test_shorter_side_is_fitted_and_the_centre_cut_out(tmp_path, width, height):
    # A linear ramp stays a ramp under bicubic scaling, away from the border: the value says which column is shown.
    size = 16
    ramp = np.linspace(0, 255, max(width, height))
    grid = np.broadcast_to(ramp[None, :] if width >= height else ramp[:, None], (height, width))
    Image.fromarray(np.repeat(grid[:, :, None], 3, axis=2).astype(np.uint8)).save(tmp_path / "a.png")
    pixels = load_pixels(tmp_path / "a.png", size)
    line = pixels[0, size // 2] if width >= height else pixels[0, :, size // 2]
    scale = min(width, height) / size
    position = (np.arange(size) + 0.5 - size / 2) * scale + max(width, height) / 2 - 0.5
    expected = np.interp(position, np.arange(len(ramp)), ramp) / 127.5 - 1
    assert np.abs(line.numpy() - expected)[2:-2].max() < 0.05


def test_the_cut_follows_the_published_transform(tmp_path):
    transforms = pytest.importorskip("torchvision.transforms")
    rng = np.random.default_rng(3)
    for width, height, size in [(31, 17, 16), (50, 77, 24), (24, 24, 24), (101, 40, 32), (40, 101, 33)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(tmp_path / "a.png")
        steps = [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
        torch.testing.assert_close(
            load_pixels(tmp_path / "a.png", size), transforms.Compose(steps)(image), atol=1e-6, rtol=0
        )


def test_a_strip_far_longer_than_wide_shows_its_centre(tmp_path):
    image = Image.new("RGB", (9000, 20), BLUE)
    image.paste(RED, (4400, 0, 4600, 20))
    image.save(tmp_path / "strip.png")
    pixels = load_pixels(tmp_path / "strip.png", 8)
    torch.testing.assert_close(pixels, in_range(RED).view(3, 1, 1).expand(3, 8, 8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    # What each tag value demands, written as the transposition that undoes it.
    how = Image.Transpose
    stored = {
        1: None,
        2: how.FLIP_LEFT_RIGHT,
        3: how.ROTATE_180,
        4: how.FLIP_TOP_BOTTOM,
        5: how.TRANSPOSE,
        6: how.ROTATE_90,
        7: how.TRANSVERSE,
        8: how.ROTATE_270,
    }[orientation]
    upright = halves()
    upright.paste((10, 250, 10), (0, 0, 16, 8))  # a corner that tells all eight apart
    image = upright if stored is None else upright.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif.tobytes())
    torch.testing.assert_close(load_pixels(tmp_path / "a.png", 32), from_pil(upright), atol=1e-6, rtol=0)


def test_a_broken_exif_block_is_no_reason_to_refuse(tmp_path):
    halves().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7fgarbage", quality=95)
    check_halves(load_pixels(tmp_path / "a.jpg", 32), tolerance=0.06)


def test_transparency_over_white(tmp_path):
    image = Image.new("RGBA", (32, 32), (*RED, 255))
    image.paste((*BLUE, 0), (16, 0, 32, 32))
    image.save(tmp_path / "a.png")
    check_halves(load_pixels(tmp_path / "a.png", 32), right=(255, 255, 255))
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 51))
    half.save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").getpixel((3, 3)) == (204, 204, 204)


def test_gray_with_alpha_and_palette_with_transparency(tmp_path):
    gray = Image.new("LA", (32, 32), (90, 255))
    gray.paste((90, 0), (16, 0, 32, 32))
    gray.save(tmp_path / "la.png")
    check_halves(load_pixels(tmp_path / "la.png", 32), left=(90, 90, 90), right=(255, 255, 255))
    palette = halves().quantize(4)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((31, 5)))
    check_halves(load_pixels(tmp_path / "p.png", 32), right=(255, 255, 255))
    halves().quantize(4).save(tmp_path / "p.gif")
    check_halves(load_pixels(tmp_path / "p.gif", 32))


@pytest.mark.parametrize(("mode", "left", "right"), [("L", 60, 190), ("1", 0, 1)])
def test_gray_and_black_and_white(tmp_path, mode, left, right):
    image = Image.new(mode, (32, 32), left)
    image.paste(right, (16, 0, 32, 32))
    image.save(tmp_path / "a.png")
    scale = 255 if mode == "1" else 1
    check_halves(load_pixels(tmp_path / "a.png", 32), left=(left * scale,) * 3, right=(right * scale,) * 3)


def test_sixteen_bit_gray_keeps_its_range(tmp_path):
    levels = np.zeros((32, 32), dtype=np.uint16)
    levels[:, 16:] = 40000
    Image.fromarray(levels).save(tmp_path / "a.png")
    check_halves(load_pixels(tmp_path / "a.png", 32), left=(0, 0, 0), right=(round(40000 / 257),) * 3)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    check_halves(load_pixels(tmp_path / "a.tif", 32), left=(0, 0, 0), right=(round(40000 / 257),) * 3)


def test_float_gray(tmp_path):
    for top, name in ((0.8, "unit.tif"), (204.0, "bytes.tif")):
        levels = np.zeros((32, 32), dtype=np.float32)
        levels[:, 16:] = top
        Image.fromarray(levels).save(tmp_path / name)
        check_halves(load_pixels(tmp_path / name, 32), left=(0, 0, 0), right=(204, 204, 204))


def test_cmyk_jpeg(tmp_path):
    halves().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == "CMYK"
    check_halves(load_pixels(tmp_path / "a.jpg", 32), tolerance=0.08)


def test_webp_and_bmp(tmp_path):
    for name in ("a.webp", "a.bmp"):
        halves().save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
        check_halves(load_pixels(tmp_path / name, 32))


def test_a_phone_jpeg_with_a_second_picture_inside(tmp_path):
    halves().save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (32, 32))], quality=95)
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    check_halves(load_pixels(tmp_path / "a.jpg", 32), tolerance=0.06)


def test_a_large_jpeg_reads_as_its_full_decode(tmp_path):
    big = halves().resize((3000, 2000), Image.Resampling.BICUBIC)
    big.save(tmp_path / "big.jpg", quality=92)
    fast = load_pixels(tmp_path / "big.jpg", 32)
    slow = from_pil(read_image(tmp_path / "big.jpg").resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32)))
    assert (fast - slow).abs().max() < 0.03
    assert min(read_image(tmp_path / "big.jpg", at_least=32).size) < 600


def truncated(tmp_path: Path, suffix: str) -> Path:
    buffer = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format={"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix])
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3])
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_file_that_was_cut_off(tmp_path, suffix):
    path = truncated(tmp_path, suffix)
    with pytest.raises(UserError, match=rf"cut\.{suffix}: (the image is damaged or cut off|not an image)"):
        load_pixels(path, 16)


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_a_file_that_is_no_picture(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png: (not an image|the image is damaged)"):
        load_pixels(tmp_path / "a.png", 16)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"none\.png: no such image"):
        load_pixels(tmp_path / "none.png", 16)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_pixels(tmp_path, 16)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_file_that_claims_to_be_huge(tmp_path, width, height):
    assert width * height > PIXEL_LIMIT
    (tmp_path / "bomb.png").write_bytes(png_claiming(width, height))
    with pytest.raises(UserError, match=r"bomb\.png: .*limit"):
        load_pixels(tmp_path / "bomb.png", 16)


@pytest.mark.parametrize("size", [0, -4, 10**6, 2.5, True])
def test_sizes_that_make_no_sense(tmp_path, size):
    halves().save(tmp_path / "a.png")
    with pytest.raises(UserError, match="must be a whole number from 1 to 8192"):
        load_pixels(tmp_path / "a.png", size)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
def test_no_damage_gets_past_as_anything_but_a_user_error(tmp_path, data, suffix):
    buffer = io.BytesIO()
    halves(size=(24, 16)).save(buffer, format=suffix)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        pixels = load_pixels(path, 8)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert pixels.shape == (3, 8, 8) and pixels.min() >= -1 and pixels.max() <= 1


def test_batch_and_black(tmp_path):
    halves().save(tmp_path / "a.png")
    halves(BLUE, RED).save(tmp_path / "b.png")
    batch = load_batch([tmp_path / "a.png", tmp_path / "b.png"], 16)
    assert torch.equal(batch[1], load_pixels(tmp_path / "b.png", 16))
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(black_image(5), -torch.ones(3, 5, 5))
    with pytest.raises(UserError, match="list of files is empty"):
        load_batch([], 16)


def test_save_and_load_give_the_same_picture(tmp_path):
    pixels = torch.linspace(-1.4, 1.4, 3 * 8 * 8).view(3, 8, 8)
    save_image(pixels, tmp_path / "deep" / "a.png")
    again = load_pixels(tmp_path / "deep" / "a.png", 8)
    assert (again - pixels.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]
    save_image(to_pil(again), tmp_path / "b.png")
    assert torch.equal(load_pixels(tmp_path / "b.png", 8), again)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(UserError, match=r"must end in \.png"):
        save_image(black_image(4), tmp_path / "a.xyz")
    with pytest.raises(UserError, match=r"shape \[4, 4\]"):
        save_image(torch.zeros(4, 4), tmp_path / "a.png")
    with pytest.raises(UserError, match="NaN"):
        save_image(torch.full((3, 4, 4), float("nan")), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_image(black_image(4), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_image(torch.ones(3, 4, 4), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_fit_within_shrinks_and_never_enlarges():
    assert fit_within(Image.new("RGB", (1000, 500)), 512).size == (512, 256)
    assert fit_within(Image.new("RGB", (3, 4000)), 512).size == (1, 512)
    assert fit_within(Image.new("RGB", (100, 50)), 512).size == (100, 50)


def test_grid_places_every_picture():
    pixels = torch.stack([in_range((10 * k, 0, 255 - 10 * k)).view(3, 1, 1).expand(3, 8, 8) for k in range(5)])
    grid = make_grid(pixels, 3, gap=2)
    assert grid.size == (3 * 8 + 4 * 2, 2 * 8 + 3 * 2)
    centres = [(2 + 4 + (k % 3) * 10, 2 + 4 + (k // 3) * 10) for k in range(5)]
    assert [grid.getpixel(centre) for centre in centres] == [(10 * k, 0, 255 - 10 * k) for k in range(5)]
    assert grid.getpixel((2 + 4 + 20, 2 + 4 + 10)) == (255, 255, 255)


def test_grid_captions_are_drawn_under_their_picture_and_stay_in_their_column():
    words = "a rather long caption that needs more lines than one, Donaudampfschifffahrtsgesellschaftskapitänsmütze"
    grid = np.asarray(make_grid([black_image(8), black_image(8)], 2, [words, ""], gap=6))
    below = grid[6 + 160 :]
    ink = np.argwhere(below.min(axis=2) < 128)
    assert len(ink) > 400
    assert ink[:, 1].min() >= 6 and ink[:, 1].max() < 6 + 160
    lines = np.diff(np.flatnonzero((below.min(axis=2) < 128).any(axis=1)))
    assert (lines > 1).sum() >= 3  # at least four lines with white between them


def test_grid_refuses_nonsense():
    with pytest.raises(UserError, match="no images"):
        make_grid([], 2)
    with pytest.raises(UserError, match="columns=0"):
        make_grid([black_image(4)], 0)
    with pytest.raises(UserError, match="1 captions for 2 images"):
        make_grid([black_image(4)] * 2, 2, ["one"])
